"""Models, versions, aliases, deployments and events, on every database."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from forescale.core.errors import InvalidInput, NotFound, RegistryFailed
from forescale.core.signature import Signature, TensorSpec
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.database import Database
from forescale.registry.records import DeploymentSpec, Happening, ModelVersion
from forescale.registry.registry import Registry
from forescale.registry.tables import METADATA

SIGNATURE = Signature(
    inputs=(TensorSpec(name="image", datatype="FP32", shape=(None, 8, 8)),),
    outputs=(TensorSpec(name="scores", datatype="FP32", shape=(None, 10)),),
)
Open = Callable[[], Registry]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"weights")
    return path


def add(registry: Registry, file: Path, model: str = "digits", **more) -> ModelVersion:
    return registry.add_version(model, file, format="pt2", signature=SIGNATURE, created_by="ada", **more)


def kinds(registry: Registry) -> list[str]:
    return [event.happening.kind for event in registry.events()]


def test_a_version_is_kept_as_it_was_given(open_registry: Open, file: Path) -> None:
    first = open_registry()
    added = add(first, file, options={"threads": 2}, metrics={"accuracy": 0.97}, commit="4f2a9c1")
    first.close()
    again = open_registry()
    assert again.version("digits", 1) == added
    assert added.signature == SIGNATURE
    assert added.reference == "digits@1"
    assert again.artifact(added).read_bytes() == b"weights"
    assert again.models() == ("digits",)


def test_files_that_no_version_names_are_removed(
    registry: Registry, store: ArtifactStore, file: Path
) -> None:
    named = add(registry, file)
    file.write_bytes(b"stored, and then the power failed")
    left = store.put(file).sha256
    assert registry.collect_artifacts() == (left,)
    assert registry.collect_artifacts() == ()
    assert registry.artifact(named).read_bytes() == b"weights"
    with pytest.raises(NotFound):
        store.fetch(left)


def test_versions_are_counted_per_model(registry: Registry, file: Path) -> None:
    numbers = [add(registry, file, model).number for model in ("digits", "words", "digits")]
    assert numbers == [1, 1, 2]
    assert [version.number for version in registry.versions("digits")] == [1, 2]
    assert registry.models() == ("digits", "words")


def test_sizes_of_files_are_known_by_version(registry: Registry, file: Path) -> None:
    add(registry, file)
    add(registry, file, "words")
    found = registry.file_bytes([("digits", 1), ("words", 1), ("words", 2)])
    assert found == {("digits", 1): 7, ("words", 1): 7}


def test_versions_added_at_once_get_numbers_of_their_own(open_registry: Open, file: Path) -> None:
    registries = [open_registry() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        added = list(threads.map(lambda n: add(registries[n % 4], file).number, range(12)))
    assert sorted(added) == list(range(1, 13))


def test_registries_opened_at_once_agree_who_makes_the_tables(open_registry: Open) -> None:
    with ThreadPoolExecutor(4) as threads:
        opened = list(threads.map(lambda _: open_registry(), range(4)))
    assert all(registry.models() == () for registry in opened)


def test_names_that_could_lead_elsewhere(registry: Registry, file: Path, tmp_path: Path) -> None:
    for name in ("", "../digits", "a/b", ".hidden", "a b", "x" * 65, "ä", "a\n", "-x"):
        with pytest.raises(InvalidInput, match="cannot name a model"):
            add(registry, file, name)
    assert registry.models() == ()
    assert not any((tmp_path / "artifacts").glob("??/*"))


def test_metrics_are_finite(registry: Registry, file: Path) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match="metric accuracy"):
            add(registry, file, metrics={"accuracy": value})


def test_a_version_without_a_file_does_not_exist(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="No such file"):
        add(registry, tmp_path / "missing")
    assert registry.models() == ()


def test_a_file_whose_row_was_never_written_does_no_harm(
    registry: Registry, store: ArtifactStore, file: Path
) -> None:
    store.put(file)  # and here the power went
    assert registry.models() == ()
    assert add(registry, file).number == 1


_DIES = """\
import os, signal, sys
from pathlib import Path
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.registry import Registry
from forescale.core.signature import Signature, TensorSpec

class Dying:
    readings = 0
    def wall_s(self):
        self.readings += 1
        if self.readings == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0

tensors = (TensorSpec(name="x", datatype="FP32", shape=(None,)),)
signature = Signature(inputs=tensors, outputs=tensors)
registry = Registry(sys.argv[1], ArtifactStore(sys.argv[2]), Dying())
registry.add_version("digits", Path(sys.argv[3]), format="pt2", signature=signature, created_by="ada")
"""


@pytest.mark.parametrize("reading", [1, 2], ids=["before the row", "before the commit"])
def test_a_process_killed_while_it_adds_leaves_nothing_wrong(
    url: str, open_registry: Open, file: Path, reading: int
) -> None:
    """A transaction reads the clock for the row, and for what it writes down after the row."""
    words = [url, str(file.with_name("artifacts")), str(file), str(reading)]
    died = subprocess.run([sys.executable, "-c", _DIES, *words], check=False)
    assert died.returncode == -signal.SIGKILL
    registry = open_registry()
    assert registry.models() == ()
    assert registry.events() == ()
    added = add(registry, file)
    assert added.number == 1
    assert registry.artifact(added).read_bytes() == b"weights"


def test_aliases_point_to_versions_and_remember_where_they_pointed(registry: Registry, file: Path) -> None:
    for _ in range(3):
        add(registry, file)
    registry.set_alias("digits", "production", 1, by="ada")
    registry.set_alias("digits", "staging", 3, by="ada")
    registry.set_alias("digits", "production", "staging", by="bob")
    assert registry.version("digits", "production").number == 3
    assert registry.aliases("digits") == {"production": 3, "staging": 3}
    registry.set_alias("digits", "staging", None, by="bob")
    assert registry.aliases("digits") == {"production": 3}
    with pytest.raises(NotFound):
        registry.version("digits", "staging")
    history = [(change.alias, change.number, change.by) for change in registry.alias_history("digits")]
    assert history == [
        ("production", 1, "ada"),
        ("staging", 3, "ada"),
        ("production", 3, "bob"),
        ("staging", None, "bob"),
    ]


def test_aliases_that_cannot_be(registry: Registry, file: Path) -> None:
    add(registry, file)
    for alias in ("7", "a/b", ""):
        with pytest.raises(InvalidInput, match="cannot name an alias"):
            registry.set_alias("digits", alias, 1, by="ada")


def test_versions_that_are_not_there(registry: Registry, file: Path) -> None:
    add(registry, file)
    for reference in ("2", 2, "production", "0", "", "9" * 30, "../1", "¹"):
        with pytest.raises(NotFound, match=r"digits has no version .*; it has 1"):
            registry.version("digits", reference)


def test_models_that_are_not_there(registry: Registry) -> None:
    asked: list[Callable[[], object]] = [
        lambda: registry.versions("digits"),
        lambda: registry.version("digits", 1),
        lambda: registry.aliases("digits"),
        lambda: registry.set_alias("digits", "production", 1, by="ada"),
        lambda: registry.deploy(DeploymentSpec(model="digits", number=1), by="ada"),
    ]
    for ask in asked:
        with pytest.raises(NotFound, match="there is no model digits"):
            ask()


def test_a_deployment_replaces_the_one_before(open_registry: Open, file: Path) -> None:
    registry = open_registry()
    for _ in range(2):
        add(registry, file)
    registry.deploy(DeploymentSpec(model="digits", number=1), by="ada")
    spec = DeploymentSpec(
        model="digits",
        number=2,
        max_replicas=3,
        max_batch=8,
        max_wait_s=0.01,
        timeout_s=2.0,
        queue=50,
        max_threads=2,
    )
    newer = registry.deploy(spec, by="bob")
    registry.close()
    again = open_registry()
    assert again.deployments() == (newer,)
    again.undeploy("digits", by="ada")
    assert again.deployments() == ()
    with pytest.raises(NotFound, match="digits is not deployed"):
        again.undeploy("digits", by="ada")
    assert kinds(again) == ["version_added", "version_added", "deployed", "deployed", "undeployed"]


@pytest.mark.parametrize(("least", "most"), [(2, 1), (-1, 1), (0, 0)])
def test_replicas_that_contradict_each_other(least: int, most: int) -> None:
    with pytest.raises(InvalidInput, match="is not possible"):
        DeploymentSpec(model="digits", number=1, min_replicas=least, max_replicas=most)


def test_events_are_read_on_from_where_one_was(registry: Registry, file: Path) -> None:
    add(registry, file)
    seen = registry.events()[-1].number
    registry.record(Happening(kind="replica_lost", subject="digits", by="forescale", detail={"pid": 7}))
    (event,) = registry.events(seen)
    assert event.number > seen
    assert event.happening.detail == {"pid": 7}
    assert registry.events(event.number) == ()
    assert len(registry.events(limit=1)) == 1


def test_a_change_that_fails_leaves_nothing(registry: Registry, file: Path) -> None:
    add(registry, file)
    with pytest.raises(NotFound):
        registry.deploy(DeploymentSpec(model="digits", number=2), by="ada")
    with pytest.raises(InvalidInput, match="printable"):
        registry.set_alias("digits", "production", 1, by="a\x00b")
    assert kinds(registry) == ["version_added"]


def test_a_newer_registry_is_refused(url: str, open_registry: Open) -> None:
    open_registry().close()
    database = Database(url)
    with database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(RegistryFailed, match=r"newer Forescale .*9999.*install that version"):
        open_registry()


def test_migrations_make_the_tables_that_the_code_expects(url: str) -> None:
    database = Database(url)
    with database.writing() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []
    database.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "not the URL of a database"),
        ("oracle://host/name", "is not supported|no driver|not the URL"),
        ("sqlite:////no/such/folder/registry.db", "unable to open"),
        ("postgresql://nobody@/none?host=/no/such/folder", "failed"),
    ],
)
def test_databases_that_cannot_be_opened(url: str, said: str, store: ArtifactStore) -> None:
    with pytest.raises((InvalidInput, RegistryFailed), match=said) as raised:
        Database(url)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_database(file: Path) -> None:
    with pytest.raises(RegistryFailed, match="not a database"):
        Database(f"sqlite:///{file}")
