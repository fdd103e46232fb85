"""``forescale replay``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forescale.cli import options
from forescale.cli.console import console, late_fraction_bar, print_json, table
from forescale.core.errors import InvalidInput
from forescale.plan.wording import spell_count

if TYPE_CHECKING:
    from forescale.control.log import Record
    from forescale.control.policy import Policy
    from forescale.control.replay import Difference, ReplayReport
    from forescale.control.state import UseForecast
    from forescale.engine.messages import Command

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or its log.jsonl.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--policy", metavar="KEY=VALUE", help="Decide by another threshold than the run did; repeatable."
    ),
]


def replay(run: Run, policy: Changes = None, json: options.Json = False) -> None:
    """Derives every decision of a run again from its log, and says why it was taken.

    Exit code 1 when the decisions are not those on record (and no other policy was asked for).
    """
    changed = policy or []
    reports = _reports(run / "log.jsonl" if run.is_dir() else run, changed)
    if json:
        print_json(_as_json(reports))
    else:
        _show(reports, changed)
    if not changed and not all(report.identical for report in reports):
        raise typer.Exit(1)


def _reports(path: Path, changed: Sequence[str]) -> list[ReplayReport]:
    """One for the run, and one for each of its resumptions."""
    from forescale.control.log import decode
    from forescale.engine.runlog import read_run_log

    with late_fraction_bar("replay:") as progress:
        records: list[Record] = []
        for values in read_run_log(path):
            progress("reading the log", 0.0)
            records.append(decode(values))
        decided = count()

        def told(part: Sequence[Record]) -> Iterator[Record]:
            for record in part:
                progress("deciding again", next(decided) / len(records))
                yield record

        return [_replay(part, told(part), changed) for part in _parts(records)]


def _parts(records: Iterable[Record]) -> Iterator[list[Record]]:
    """The run and its resumptions, each with costs of its own."""
    from forescale.control.log import Header

    part: list[Record] = []
    for record in records:
        if isinstance(record, Header) and part:
            yield part
            part = []
        part.append(record)
    yield part


def _replay(part: Sequence[Record], records: Iterable[Record], changed: Sequence[str]) -> ReplayReport:
    from forescale.control.costs import ProfiledCosts
    from forescale.control.log import Header
    from forescale.control.planner import Planner
    from forescale.control.replay import replay as decide_again

    header = part[0] if part else None
    if not isinstance(header, Header):
        raise InvalidInput("not a run log: it does not begin with a header")
    planner = Planner(ProfiledCosts.from_json(header.run))
    return decide_again(records, planner, _changed(header.policy, changed) if changed else None)


def _changed(policy: Policy, changes: Sequence[str]) -> Policy:
    """The policy with some fields replaced, each change written ``KEY=VALUE``."""
    values: dict[str, Any] = {}
    known = asdict(policy)
    for change in changes:
        key, _, text = change.partition("=")
        if key not in known:
            raise InvalidInput(f"the policy has no {key!r}; it has {', '.join(known)}")
        kind = type(known[key])
        try:
            values[key] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError) as error:
            raise InvalidInput(f"{change!r}: {text!r} is not a value of type {kind.__name__}") from error
    return replace(policy, **values)


def _as_json(reports: Sequence[ReplayReport]) -> dict[str, Any]:
    from forescale.control.log import encode

    def commands(found: Iterable[Command]) -> list[dict[str, Any]]:
        return [encode(command) for command in found]

    return {
        "identical": all(report.identical for report in reports),
        "events": sum(report.events for report in reports),
        "decisions": [asdict(decision) for report in reports for decision in report.decisions],
        "commands": [command for report in reports for command in commands(report.commands)],
        "differences": [
            {
                "step": difference.step,
                "event": difference.event,
                "recorded": commands(difference.recorded),
                "derived": commands(difference.derived),
            }
            for report in reports
            for difference in report.differences
        ],
        "expected_use": {device: asdict(use) for device, use in reports[-1].expected_use.items()},
    }


def _show(reports: Sequence[ReplayReport], changed: Sequence[str]) -> None:
    out = console()
    decisions = table("Decisions", ">before step", "about", "acted", "reason")
    for report in reports:
        for decision in report.decisions:
            acted = "yes" if decision.acted else "no"
            decisions.add_row(str(decision.step), decision.trigger, acted, decision.reason)
    if decisions.row_count:
        out.print(decisions)
    if expected := reports[-1].expected_use:
        _show_expected(expected)
    differences = [difference for report in reports for difference in report.differences]
    for difference in differences:
        out.print(_sentence(difference), markup=False, soft_wrap=True)
    events = sum(report.events for report in reports)
    derived = sum(len(report.commands) for report in reports)
    verdict = (
        f"{spell_count(len(differences), 'difference')} from the record"
        if differences
        else "identical to the record"
    )
    by = f" by a policy with {', '.join(changed)}" if changed else ""
    again = f"{spell_count(events, 'event')}, {spell_count(derived, 'command')} derived again{by}: {verdict}"
    out.print(again, markup=False, soft_wrap=True)


def _show_expected(expected: Mapping[str, UseForecast]) -> None:
    from forescale.control.utilisation import spell_quantiles
    from forescale.plan.wording import spell_time

    shown = table("Expected use", "device", ">busy", ">for", ">memory")
    for device, use in expected.items():
        memory = spell_quantiles(use.memory_L) if use.memory_L else "not measured"
        middle_s, high_s = map(spell_time, use.busy_s_L)
        shown.add_row(device, spell_quantiles(use.busy_L), f"{middle_s} (up to {high_s})", memory)
    console().print(shown)
    console().print("What the step after the last will use of time and memory; up to: in 95 of 100 steps.\n")


def _sentence(difference: Difference) -> str:
    recorded, derived = (
        "; ".join(map(_command, commands)) or "nothing"
        for commands in (difference.recorded, difference.derived)
    )
    return (
        f"before step {difference.step} (event {difference.event}): recorded: {recorded}; derived: {derived}"
    )


def _command(command: Command) -> str:
    """What was decided, not only why: two commands for the same reason may differ."""
    from forescale.engine.messages import Stop
    from forescale.plan.wording import spell_microbatches

    if isinstance(command, Stop):
        return f"stop ({command.reason})"
    plan = command.plan
    stages = ", ".join(f"{len(stage.operators)} on {stage.device}" for stage in plan.stages)
    when = "as soon as possible" if command.before_step is None else f"before step {command.before_step}"
    return f"{when} operators {stages}, microbatches: {spell_microbatches(plan)} ({command.reason})"
