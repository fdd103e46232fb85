"""The rollouts that run and those that have ended. A model has at most one that runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from forescale.core.clock import Clock
from forescale.core.errors import InvalidInput, NotFound
from forescale.registry import tables
from forescale.registry.audit import write_down
from forescale.registry.database import Database
from forescale.registry.records import Happening, check_text
from forescale.registry.rollout import Counts, Progress, Rollout, RolloutSpec, State, Strategy

_BY = "forescale"
_rollouts = tables.rollouts
_deployments = tables.deployments


class Rollouts:
    """Every change is one transaction. What somebody else has changed in between is not overwritten."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def start(self, spec: RolloutSpec, *, by: str) -> Rollout:
        """Let a new version of a deployed model begin to take over.

        Raises:
            NotFound: the model is not deployed, or there is no such version.
            InvalidInput: another rollout of the model runs, another version than ``spec.stable`` is
                deployed, or requests to one version do not fit the other.
        """
        check_text(by, "the name of who did it")
        with self._database.writing() as connection:
            lock_model(connection, spec.model)
            refuse_while_running(connection, spec.model)
            deployed = connection.scalar(
                select(_deployments.c.number).where(_deployments.c.model == spec.model)
            )
            if deployed is None:
                raise NotFound(f"{spec.model} is not deployed")
            if deployed != spec.stable:
                raise InvalidInput(f"{spec.model}@{deployed} is deployed, not {spec.model}@{spec.stable}")
            _check_alike(connection, spec)
            now_s = self._clock.wall_s()
            progress = Progress(entered_s=now_s)
            row = {
                "model": spec.model,
                "number": spec.number,
                "revision": 0,
                "state": State.RUNNING.value,
                "spec": _spec_as_json(spec),
                "progress": asdict(progress),
                "started_s": now_s,
                "started_by": by,
            }
            key = connection.execute(insert(_rollouts).values(row)).inserted_primary_key
            rollout = Rollout(
                id=key[0] if key else 0,
                revision=0,
                spec=spec,
                state=State.RUNNING,
                progress=progress,
                started_s=now_s,
                started_by=by,
            )
            detail = {"number": spec.number, **_spec_as_json(spec)}
            self._write_down(connection, "rollout_started", rollout, by, detail)
        return rollout

    def running(self) -> tuple[Rollout, ...]:
        """All rollouts that have not ended, in alphabetical order of their models."""
        with self._database.reading() as connection:
            of_now = select(_rollouts).where(_rollouts.c.ended_s.is_(None))
            return tuple(map(_rollout, connection.execute(of_now.order_by(_rollouts.c.model)).all()))

    def latest(self, model: str) -> Rollout | None:
        """The newest rollout of a model, also if it has ended."""
        of_model = select(_rollouts).where(_rollouts.c.model == model)
        with self._database.reading() as connection:
            row = connection.execute(of_model.order_by(_rollouts.c.id.desc()).limit(1)).one_or_none()
        return None if row is None else _rollout(row)

    def latest_of_all(self) -> dict[str, Rollout]:
        """The same of every model that has one."""
        newest = select(func.max(_rollouts.c.id)).group_by(_rollouts.c.model)
        with self._database.reading() as connection:
            rows = connection.execute(select(_rollouts).where(_rollouts.c.id.in_(newest))).all()
        return {row.model: _rollout(row) for row in rows}

    def write(self, rollout: Rollout, *, by: str = _BY) -> Rollout | None:
        """Keep a rollout as it is now; the same transaction makes a promoted version the deployed one.

        Args:
            rollout: with the revision that it was read with.

        Returns:
            It, with its new revision; None: somebody else changed it before, so that nothing was kept.
        """
        with self._database.writing() as connection:
            lock_model(connection, rollout.spec.model)
            return self._write(connection, rollout, by)

    def roll_back(self, model: str, *, by: str) -> int:
        """Go back to the version before: end a rollout that runs, or deploy what was deployed before.

        Returns:
            The number of the version that is deployed now.

        Raises:
            NotFound: the model is not deployed, or has not been deployed with another version.
        """
        check_text(by, "the name of who did it")
        with self._database.writing() as connection:
            lock_model(connection, model)
            running = _running(connection, model)
            if running is not None:
                self._end(connection, running, f"rolled back by {by}", by)
                return running.spec.stable
            of_model = select(_deployments.c.number, _deployments.c.previous)
            row = connection.execute(of_model.where(_deployments.c.model == model)).one_or_none()
            if row is None:
                raise NotFound(f"{model} is not deployed")
            if row.previous is None:
                raise NotFound(f"{model}@{row.number} has replaced no other version")
            _deploy(connection, model, row.previous, row.number, by, self._clock.wall_s())
            detail = {"number": row.previous, "instead_of": row.number}
            happening = Happening(kind="rolled_back", subject=model, by=by, detail=detail)
            write_down(connection, self._clock.wall_s(), happening)
            return row.previous

    def end(self, connection: Connection, model: str, reason: str, *, by: str) -> None:
        """Roll back a model's rollout, if one runs, in a transaction that changes more."""
        running = _running(connection, model)
        if running is not None:
            self._end(connection, running, reason, by)

    def _end(self, connection: Connection, rollout: Rollout, reason: str, by: str) -> None:
        progress = replace(rollout.progress, reason=reason)
        ended = replace(rollout, state=State.ROLLED_BACK, progress=progress, ended_s=self._clock.wall_s())
        self._write(connection, ended, by)

    def _write(self, connection: Connection, rollout: Rollout, by: str) -> Rollout | None:
        kept = replace(rollout, revision=rollout.revision + 1)
        same = (_rollouts.c.id == rollout.id, _rollouts.c.revision == rollout.revision)
        row = {
            "revision": kept.revision,
            "state": kept.state.value,
            "progress": asdict(kept.progress),
            "ended_s": kept.ended_s,
        }
        if not connection.execute(update(_rollouts).where(*same).values(row)).rowcount:
            return None
        progress, spec = kept.progress, kept.spec
        if kept.state is State.RUNNING:
            kind = "rollout_advanced"
        else:
            kind = "rollout_promoted" if kept.state is State.PROMOTED else "rollout_rolled_back"
        if kept.state is State.PROMOTED:
            _deploy(connection, spec.model, spec.number, spec.stable, by, self._clock.wall_s())
        detail = {
            "number": spec.number,
            "stage": progress.stage,
            "is_open": progress.opened_s is not None,
            "is_checked": progress.is_checked,
            "reason": progress.reason,
        }
        self._write_down(connection, kind, kept, by, detail)
        return kept

    def _write_down(
        self, connection: Connection, kind: str, rollout: Rollout, by: str, detail: dict[str, Any]
    ) -> None:
        happening = Happening(kind=kind, subject=rollout.spec.model, by=by, detail=detail)
        write_down(connection, self._clock.wall_s(), happening)


def lock_model(connection: Connection, model: str) -> None:
    """Lets one transaction at a time change a model; SQLite has one writer anyway."""
    connection.execute(select(tables.models).where(tables.models.c.name == model).with_for_update())


def refuse_while_running(connection: Connection, model: str) -> None:
    """What only makes sense without a rollout is not done.

    Raises:
        InvalidInput: a rollout of the model runs.
    """
    running = _running(connection, model)
    if running is not None:
        raise InvalidInput(
            f"{model}@{running.spec.number} is being rolled out: promote it or roll it back first"
        )


def _running(connection: Connection, model: str) -> Rollout | None:
    of_model = (_rollouts.c.model == model, _rollouts.c.ended_s.is_(None))
    row = connection.execute(select(_rollouts).where(*of_model)).one_or_none()
    return None if row is None else _rollout(row)


def _check_alike(connection: Connection, spec: RolloutSpec) -> None:
    versions = tables.versions
    of_model = select(versions.c.number, versions.c.signature).where(versions.c.model == spec.model)
    signatures = {row.number: row.signature for row in connection.execute(of_model)}
    if spec.number not in signatures:
        raise NotFound(f"{spec.model} has no version {spec.number}")
    if signatures[spec.number] != signatures[spec.stable]:
        raise InvalidInput(
            f"{spec.model}@{spec.number} has other inputs or outputs than {spec.model}@{spec.stable}: "
            "one request cannot go to either; deploy it at once"
        )


def _deploy(connection: Connection, model: str, number: int, previous: int, by: str, now_s: float) -> None:
    row = {"number": number, "previous": previous, "deployed_at_s": now_s, "deployed_by": by}
    connection.execute(update(_deployments).where(_deployments.c.model == model).values(row))


def _spec_as_json(spec: RolloutSpec) -> dict[str, Any]:
    fields = asdict(spec)
    del fields["model"], fields["number"]  # columns of their own
    return {**fields, "strategy": spec.strategy.value, "shares": list(spec.shares)}


def _rollout(row: Row[Any]) -> Rollout:
    fields: dict[str, Any] = {
        **row.spec,
        "strategy": Strategy(row.spec["strategy"]),
        "shares": tuple(row.spec["shares"]),
    }
    return Rollout(
        id=row.id,
        revision=row.revision,
        spec=RolloutSpec(model=row.model, number=row.number, **fields),
        state=State(row.state),
        progress=progress_from_json(row.progress),
        started_s=row.started_s,
        started_by=row.started_by,
        ended_s=row.ended_s,
    )


def progress_from_json(kept: Mapping[str, Any]) -> Progress:
    """Inverse of ``asdict``, by way of JSON."""
    fields: dict[str, Any] = {
        **kept,
        "before": {int(number): _counts(counts) for number, counts in kept["before"].items()},
        "reference": _counts(kept["reference"]),
    }
    return Progress(**fields)


def _counts(kept: Mapping[str, Any]) -> Counts:
    fields: dict[str, Any] = {**kept, "answers": tuple(kept["answers"])}
    return Counts(**fields)
