"""Every test of the registry runs on SQLite and, where it is installed, on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from databases import new_postgres_database, postgres_is_here, postgres_server
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.registry import Registry

Open = Callable[[], Registry]


@dataclass
class Ticks:
    """A clock that goes on by one second whenever it is read."""

    now_s: float = field(default=1000.0)

    def monotonic_s(self) -> float:
        return self.wall_s()

    def wall_s(self) -> float:
        self.now_s += 1.0
        return self.now_s


@pytest.fixture(scope="session")
def postgres() -> Iterator[Path | None]:
    if not postgres_is_here():
        yield None
        return
    with postgres_server() as folder:
        yield folder


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/registry.db"
    folder: Path | None = request.getfixturevalue("postgres")
    if folder is None:
        pytest.skip("PostgreSQL is not installed")
    return new_postgres_database(folder)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "artifacts"))


@pytest.fixture
def open_registry(url: str, store: ArtifactStore) -> Iterator[Open]:
    """Opens the same registry again and again."""
    opened: list[Registry] = []

    def open_it() -> Registry:
        opened.append(Registry(url, store, Ticks()))
        return opened[-1]

    yield open_it
    for registry in opened:
        registry.close()


@pytest.fixture
def registry(open_registry: Open) -> Registry:
    return open_registry()
