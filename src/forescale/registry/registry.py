"""The registry: which models there are, which are to be served, and what happened."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, text, tuple_

from forescale.core.clock import Clock
from forescale.core.errors import NotFound
from forescale.core.signature import Signature
from forescale.registry import tables
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.audit import write_down
from forescale.registry.database import Database
from forescale.registry.records import (
    AliasChange,
    Deployment,
    DeploymentSpec,
    Event,
    Happening,
    ModelVersion,
    check_alias,
    check_metrics,
    check_name,
    check_text,
)
from forescale.registry.rollouts import Rollouts, lock_model, refuse_while_running
from forescale.registry.rows import row_of, version_of

_REPEATED_WITHIN = 20_000  # events: more than a data plane tells again


class Registry:
    """Every change is one transaction, which also writes down who made it. Use it from any thread.

    A version's file is stored before its row is written: a crash in between leaves a file that nothing
    names, never a name without a file.

    Args:
        url: the database, see :class:`Database`.

    Attributes:
        rollouts: of the same models.
    """

    def __init__(self, url: str, store: ArtifactStore, clock: Clock) -> None:
        self._database = Database(url)
        self._store = store
        self._clock = clock
        self.rollouts = Rollouts(self._database, clock)

    def now_s(self) -> float:
        """By the registry's clock, in seconds since the Unix epoch."""
        return self._clock.wall_s()

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    def add_version(
        self,
        model: str,
        path: Path,
        *,
        format: str,  # noqa: A002 - the word for it
        signature: Signature,
        created_by: str,
        options: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        commit: str | None = None,
    ) -> ModelVersion:
        """Keep a copy of a file as the next version of a model, and make the model if it is the first.

        Raises:
            InvalidInput: a name, a metric or the file.
            RegistryFailed: it could not be kept.
        """
        check_name(model, "a model")
        check_name(format, "a format")
        check_text(created_by, "the maker's name")
        if commit is not None:
            check_text(commit, "the commit")
        check_metrics(metrics or {})
        artifact = self._store.put(path)
        with self._database.writing() as connection:
            version = ModelVersion(
                model=model,
                number=_next_number(connection, model),
                artifact=artifact,
                format=format,
                signature=signature,
                options=dict(options or {}),
                metrics=dict(metrics or {}),
                created_at_s=self._clock.wall_s(),
                created_by=created_by,
                commit=commit,
            )
            connection.execute(insert(tables.versions).values(row_of(version)))
            detail = {"number": version.number, "sha256": artifact.sha256}
            self._write_down(connection, "version_added", model, created_by, detail)
        return version

    def collect_artifacts(self) -> tuple[str, ...]:
        """Remove files that no version names, as crashes leave them; which. Only while nobody adds versions.

        Raises:
            RegistryFailed: they cannot be removed.
        """
        with self._database.reading() as connection:
            return self._store.keep_only(set(connection.scalars(select(tables.versions.c.sha256))))

    def models(self) -> tuple[str, ...]:
        """Names of all models, in alphabetical order."""
        with self._database.reading() as connection:
            return tuple(connection.scalars(select(tables.models.c.name).order_by(tables.models.c.name)))

    def versions(self, model: str) -> tuple[ModelVersion, ...]:
        """All versions of a model, oldest first.

        Raises:
            NotFound: there is no such model.
        """
        of_model = select(tables.versions).where(tables.versions.c.model == model)
        with self._database.reading() as connection:
            rows = connection.execute(of_model.order_by(tables.versions.c.number)).all()
            if not rows:
                raise _no_model(connection, model)
        return tuple(map(version_of, rows))

    def version(self, model: str, reference: int | str) -> ModelVersion:
        """The version with that number or alias.

        Raises:
            NotFound: there is none.
        """
        with self._database.reading() as connection:
            return _find(connection, model, reference)

    def file_bytes(self, versions: Collection[tuple[str, int]]) -> dict[tuple[str, int], int]:
        """Sizes of versions' files; versions that there are not are left out."""
        columns = tables.versions.c
        which = tuple_(columns.model, columns.number).in_(list(versions))
        with self._database.reading() as connection:
            rows = connection.execute(select(columns.model, columns.number, columns.size_bytes).where(which))
            return {(row.model, row.number): row.size_bytes for row in rows}

    def artifact(self, version: ModelVersion) -> Path:
        """The version's file, verified; see :meth:`ArtifactStore.fetch`."""
        return self._store.fetch(version.artifact.sha256)

    def set_alias(self, model: str, alias: str, reference: int | str | None, *, by: str) -> AliasChange:
        """Let an alias point to a version, or (None) take it away.

        Raises:
            InvalidInput: the alias's name.
            NotFound: there is no such version, or no such alias to take away.
        """
        check_alias(alias)
        check_text(by, "the name of who did it")
        with self._database.writing() as connection:
            if reference is None:
                number = None
                _find(connection, model, alias)
            else:
                number = _find(connection, model, reference).number
            change = AliasChange(model=model, alias=alias, number=number, at_s=self._clock.wall_s(), by=by)
            connection.execute(
                insert(tables.alias_changes).values(
                    model=model, alias=alias, number=number, at_s=change.at_s, by=by
                )
            )
            self._write_down(connection, "alias_set", model, by, {"alias": alias, "number": number})
        return change

    def alias_history(self, model: str) -> tuple[AliasChange, ...]:
        """All changes of a model's aliases, oldest first.

        Raises:
            NotFound: there is no such model.
        """
        changes = tables.alias_changes
        with self._database.reading() as connection:
            of_model = select(changes).where(changes.c.model == model)
            rows = connection.execute(of_model.order_by(changes.c.id)).all()
            if not rows and not _exists(connection, model):
                raise _no_model(connection, model)
        return tuple(
            AliasChange(model=row.model, alias=row.alias, number=row.number, at_s=row.at_s, by=row.by)
            for row in rows
        )

    def aliases(self, model: str) -> dict[str, int]:
        """Where each alias of a model points now.

        Raises:
            NotFound: there is no such model.
        """
        latest = {change.alias: change.number for change in self.alias_history(model)}
        return {alias: number for alias, number in sorted(latest.items()) if number is not None}

    def deploy(self, spec: DeploymentSpec, *, by: str) -> Deployment:
        """Ask for a version to be served, in place of the one that is; a model has at most one deployment.

        Raises:
            NotFound: there is no such version.
            InvalidInput: a rollout of another version runs.
        """
        check_text(by, "the name of who did it")
        deployment = Deployment(spec=spec, deployed_at_s=self._clock.wall_s(), deployed_by=by)
        row = {
            "model": spec.model,
            "number": spec.number,
            "min_replicas": spec.min_replicas,
            "max_replicas": spec.max_replicas,
            "latency_s": spec.latency_s,
            "priority": spec.priority,
            "max_batch": spec.max_batch,
            "max_wait_s": spec.max_wait_s,
            "timeout_s": spec.timeout_s,
            "queue": spec.queue,
            "max_threads": spec.max_threads,
        }
        with self._database.writing() as connection:
            _find(connection, spec.model, spec.number)
            lock_model(connection, spec.model)
            of_model = tables.deployments.c.model == spec.model
            before = connection.execute(select(tables.deployments).where(of_model)).one_or_none()
            if before is None or before.number != spec.number:
                refuse_while_running(connection, spec.model)
            connection.execute(delete(tables.deployments).where(of_model))
            deployment = replace(deployment, previous=_previous(before, spec.number))
            when = {"deployed_at_s": deployment.deployed_at_s, "deployed_by": by}
            connection.execute(
                insert(tables.deployments).values({**row, **when, "previous": deployment.previous})
            )
            del row["model"]
            self._write_down(connection, "deployed", spec.model, by, row)
        return deployment

    def deployments(self) -> tuple[Deployment, ...]:
        """All deployments, in alphabetical order of their models."""
        with self._database.reading() as connection:
            rows = connection.execute(select(tables.deployments).order_by(tables.deployments.c.model)).all()
        return tuple(map(_deployment, rows))

    def undeploy(self, model: str, *, by: str) -> None:
        """Ask for a model not to be served any longer.

        Raises:
            NotFound: it is not deployed.
        """
        check_text(by, "the name of who did it")
        with self._database.writing() as connection:
            lock_model(connection, model)
            gone = connection.execute(delete(tables.deployments).where(tables.deployments.c.model == model))
            if not gone.rowcount:
                raise NotFound(f"{model} is not deployed")
            self.rollouts.end(connection, model, f"undeployed by {by}", by=by)
            self._write_down(connection, "undeployed", model, by, {})

    def record(self, happening: Happening, *, at_s: float | None = None) -> None:
        """Write something down for good.

        Args:
            at_s: when it happened (None: now); if exactly that is among the latest events already, it is
                not written a second time.
        """
        with self._database.writing() as connection:
            if at_s is None or not _is_known(connection, happening, at_s):
                write_down(connection, self._clock.wall_s() if at_s is None else at_s, happening)

    def events(self, after: int = 0, limit: int = 1000) -> tuple[Event, ...]:
        """What was written down after the event of that number, oldest first, at most ``limit``."""
        newer = select(tables.events).where(tables.events.c.id > after)
        with self._database.reading() as connection:
            rows = connection.execute(newer.order_by(tables.events.c.id).limit(limit)).all()
        return tuple(map(_event, rows))

    def _write_down(
        self, connection: Connection, kind: str, subject: str, by: str, detail: Mapping[str, Any]
    ) -> None:
        happening = Happening(kind=kind, subject=subject, by=by, detail=detail)
        write_down(connection, self._clock.wall_s(), happening)


def _is_known(connection: Connection, happening: Happening, at_s: float) -> bool:
    events = tables.events.c
    newest = connection.scalar(select(func.max(events.id))) or 0
    same = (events.at_s == at_s, events.kind == happening.kind, events.subject == happening.subject)
    found = select(events.id).where(events.id > newest - _REPEATED_WITHIN, *same).limit(1)
    return connection.scalar(found) is not None


def _next_number(connection: Connection, model: str) -> int:
    """The number of the model's next version; no other transaction gets it."""
    connection.execute(
        text("INSERT INTO models (name) VALUES (:name) ON CONFLICT DO NOTHING"), {"name": model}
    )
    lock_model(connection, model)
    highest = select(func.max(tables.versions.c.number)).where(tables.versions.c.model == model)
    return (connection.scalar(highest) or 0) + 1


def _previous(before: Row[Any] | None, number: int) -> int | None:
    """The version that a deployment replaces; the one that was replaced last, if it is the same one."""
    if before is None:
        return None
    return before.previous if before.number == number else before.number


def _exists(connection: Connection, model: str) -> bool:
    return connection.scalar(select(tables.models.c.name).where(tables.models.c.name == model)) is not None


def _find(connection: Connection, model: str, reference: int | str) -> ModelVersion:
    number = _number(connection, model, str(reference))
    of_number = (tables.versions.c.model == model, tables.versions.c.number == number)
    row = connection.execute(select(tables.versions).where(*of_number)).one_or_none() if number else None
    if row is None:
        raise _no_model(connection, model, f"{model} has no version {str(reference)[:80]}")
    return version_of(row)


def _number(connection: Connection, model: str, reference: str) -> int | None:
    if reference.isascii() and reference.isdecimal():
        return int(reference) if len(reference) < 10 else None  # 32 bits
    if "\0" in reference:  # PostgreSQL takes it for a fault
        return None
    changes = tables.alias_changes
    latest = (
        select(changes.c.number)
        .where(changes.c.model == model, changes.c.alias == reference)
        .order_by(changes.c.id.desc())
        .limit(1)
    )
    return connection.scalar(latest)


def _no_model(connection: Connection, model: str, otherwise: str = "") -> NotFound:
    if otherwise and _exists(connection, model):
        numbers = connection.scalars(
            select(tables.versions.c.number)
            .where(tables.versions.c.model == model)
            .order_by(tables.versions.c.number)
        ).all()
        return NotFound(f"{otherwise}; it has {', '.join(map(str, numbers))}")
    return NotFound(f"there is no model {model[:80]}")


def _deployment(row: Row[Any]) -> Deployment:
    spec = DeploymentSpec(
        model=row.model,
        number=row.number,
        min_replicas=row.min_replicas,
        max_replicas=row.max_replicas,
        latency_s=row.latency_s,
        priority=row.priority,
        max_batch=row.max_batch,
        max_wait_s=row.max_wait_s,
        timeout_s=row.timeout_s,
        queue=row.queue,
        max_threads=row.max_threads,
    )
    return Deployment(
        spec=spec, deployed_at_s=row.deployed_at_s, deployed_by=row.deployed_by, previous=row.previous
    )


def _event(row: Row[Any]) -> Event:
    happening = Happening(kind=row.kind, subject=row.subject, by=row.by, detail=row.detail)
    return Event(number=row.id, at_s=row.at_s, happening=happening)
