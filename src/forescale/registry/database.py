"""The database behind the registry: opened, brought up to date, and its failures said in one line."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from forescale.core.errors import InvalidInput, RegistryFailed

_MIGRATIONS = str(Path(__file__).parent / "migrations")
_BUSY_TIMEOUT_S = 30.0
_LOCK_KEY = 0x464F5245  # any number: whoever brings this database up to date holds it


class Database:
    """Transactions on SQLite (with a write-ahead log) or PostgreSQL.

    Args:
        url: ``sqlite:///path`` or ``postgresql://...``.

    Raises:
        InvalidInput: the URL makes no sense, or its driver is not installed.
        RegistryFailed: the database cannot be opened, or a newer Forescale has changed its tables.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self._reading = self._engine.execution_options(read_only=True)
        try:
            with _opening(self._engine.url), self.writing() as connection:
                _migrate(connection)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def writing(self) -> Generator[Connection]:
        """A transaction that changes something: all of it or, if the block raises, nothing."""
        with _failures(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Generator[Connection]:
        """A transaction that only looks, at one state of the database."""
        with _failures(), self._reading.begin() as connection:
            yield connection

    def close(self) -> None:
        """Let go of the database. Harmless the second time."""
        self._engine.dispose()


@contextmanager
def _opening(url: URL) -> Generator[None]:
    """One at a time: of two that switch a new SQLite file to its log together, one is refused at once."""
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        yield
        return
    path = f"{url.database}.opening"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise RegistryFailed(
            f"the registry's database failed: unable to open {path}: {error.strerror}"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "postgresql" and "+" not in parsed.drivername:
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() == "sqlite":
            return _sqlite(create_engine(parsed, connect_args={"timeout": _BUSY_TIMEOUT_S}))
        if parsed.get_backend_name() == "postgresql":
            return create_engine(parsed, pool_pre_ping=True)
    except ImportError as error:
        raise InvalidInput(
            f"no driver for this database: pip install 'forescale[postgres]' ({error})"
        ) from error
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise InvalidInput(f"not the URL of a database: {_first_line(error)}") from error
    raise InvalidInput(f"{parsed.get_backend_name()} is not supported; use sqlite or postgresql")


def _sqlite(engine: Engine) -> Engine:
    """Transactions begin where SQLAlchemy says so, and writers queue instead of failing half-way."""

    def connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver would begin transactions by itself, and late
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    def begin(connection: Connection) -> None:
        only_reads = connection.get_execution_options().get("read_only", False)
        connection.exec_driver_sql("BEGIN" if only_reads else "BEGIN IMMEDIATE")

    event.listen(engine, "connect", connect)
    event.listen(engine, "begin", begin)
    return engine


def _migrate(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", _MIGRATIONS.replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision for script in scripts.walk_revisions()}
    current = MigrationContext.configure(connection).get_current_revision()
    if current is not None and current not in known:
        raise RegistryFailed(
            f"the registry was changed by a newer Forescale (its tables are {current}, "
            f"this one knows {scripts.get_current_head()}); install that version"
        )
    if current != scripts.get_current_head():
        command.upgrade(config, "head")


@contextmanager
def _failures() -> Generator[None]:
    try:
        yield
    except DBAPIError as error:
        raise RegistryFailed(f"the registry's database failed: {_first_line(error.orig)}") from error
    except SQLAlchemyError as error:
        raise RegistryFailed(f"the registry's database failed: {_first_line(error)}") from error


def _first_line(error: BaseException | None) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
