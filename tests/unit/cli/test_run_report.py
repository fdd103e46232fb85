from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from chain_model import ChainCosts, batch, chain_graph
from forescale.cli.comparison import Phase, saved_s
from forescale.cli.run_report import NO_PLOTS, write_report
from forescale.control.costs import ProfiledCosts
from forescale.control.policy import Policy
from forescale.control.report import TrainingReport
from forescale.engine.messages import RunStarted, StepFinished
from forescale.profile.model import ModelProfile
from simulated_training import train

STEPS, SLOW_FROM, LONG_FROM = 60, 20, 40
PHASES = (
    Phase(name="steady", first_step=0, end_step=SLOW_FROM),
    Phase(name="slowed", first_step=SLOW_FROM, end_step=STEPS),
)
HOSTILE = "<script>alert(\"1\")</script> & '$\\frac{' </td>"


def simulated_report(*, adapt: bool = True) -> TrainingReport:
    """One device slows down, then batches get long; the real controller decides."""
    run = train(
        STEPS,
        speeds=lambda step: {"cpu1": 0.6} if step >= SLOW_FROM else {},
        lengths=lambda step: 256 if step >= LONG_FROM else 128,
        policy=Policy(adapt=adapt),
    )
    started = next(record for record in run.records if isinstance(record, RunStarted))
    graph = chain_graph()
    return TrainingReport(
        steps=tuple(record for record in run.records if isinstance(record, StepFinished)),
        repartitions=tuple(run.repartitions),
        plans=(started.plan, *(change.after for change in run.repartitions)),
        costs=ProfiledCosts(
            profile=ModelProfile(graph=graph, kinds={}, optimizer_state_ratio=2.0),
            cluster=ChainCosts().problem(batch(128), {}).cluster,
            rows_symbol="rows",
            rows=8,
            microbatches=(1, 2, 4, 8),
            clips_norm=False,
            shardable=True,
        ),
        overhead_s=0.01,
        log_path=Path("run") / "log.jsonl",
        checkpoint=None,
        _state={},
    )


@pytest.fixture(scope="module")
def runs() -> dict[str, TrainingReport]:
    return {"adaptive": simulated_report(), "fixed plan": simulated_report(adapt=False)}


def page(path: Path) -> ElementTree.Element:
    """The page's tree: the parser raises if an element is not closed or a character not escaped."""
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def texts(element: ElementTree.Element, tag: str) -> list[str]:
    return ["".join(found.itertext()) for found in element.iter(tag)]


def test_every_repartition_is_in_the_table(tmp_path: Path, runs: dict[str, TrainingReport]) -> None:
    write_report(tmp_path / "report.html", runs, phases=PHASES)
    cells = texts(page(tmp_path / "report.html"), "td")
    changes = runs["adaptive"].repartitions
    assert len(changes) >= 2
    assert not runs["fixed plan"].repartitions
    for change in changes:
        assert change.reason in cells
        assert str(change.step) in cells


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path, runs: dict[str, TrainingReport]) -> None:
    write_report(tmp_path / "report.html", runs, phases=PHASES)
    root = page(tmp_path / "report.html")
    assert not list(root.iter("script")) + list(root.iter("link")) + list(root.iter("img"))
    references = [
        value
        for element in root.iter()
        for name, value in element.attrib.items()
        if name.split("}")[-1] in {"href", "src"}
    ]
    assert [reference for reference in references if not reference.startswith("#")] == []


def test_plots_and_plans_are_drawn_once_each(tmp_path: Path, runs: dict[str, TrainingReport]) -> None:
    write_report(tmp_path / "report.html", runs, phases=PHASES)
    root = page(tmp_path / "report.html")
    figures = list(root.iter("figure"))
    assert len(figures) == 3 + len(set(runs["adaptive"].plans))
    identifiers = [value for element in root.iter() if (value := element.get("id"))]
    assert len(identifiers) == len(set(identifiers))


def test_hostile_text_is_shown_as_text(tmp_path: Path, runs: dict[str, TrainingReport]) -> None:
    run = runs["adaptive"]
    changes = tuple(replace(change, reason=HOSTILE) for change in run.repartitions)
    hostile = replace(run, repartitions=changes, log_path=Path("<b>") / HOSTILE)
    phases = (Phase(name=HOSTILE, first_step=0, end_step=STEPS),)
    write_report(tmp_path / "report.html", {HOSTILE: hostile}, title=HOSTILE, phases=phases)
    root = page(tmp_path / "report.html")
    assert texts(root, "h1") == [HOSTILE]
    assert HOSTILE in texts(root, "td")
    assert not list(root.iter("script")) + list(root.iter("b"))


def test_a_run_alone_has_no_gains(tmp_path: Path, runs: dict[str, TrainingReport]) -> None:
    write_report(tmp_path / "one.html", {"run": runs["adaptive"]})
    write_report(tmp_path / "two.html", runs)
    assert not any("saved" in head for head in texts(page(tmp_path / "one.html"), "th"))
    assert any("saved" in head for head in texts(page(tmp_path / "two.html"), "th"))


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, runs: dict[str, TrainingReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(tmp_path / "report.html", runs)
    root = page(tmp_path / "report.html")
    assert NO_PLOTS in texts(root, "p")
    assert len(list(root.iter("figure"))) == len(set(runs["adaptive"].plans))


def test_what_repartitions_saved_adds_up(runs: dict[str, TrainingReport]) -> None:
    adaptive, fixed = runs["adaptive"], runs["fixed plan"]
    first = adaptive.repartitions[0].step
    expected = sum(fixed.step_s[first:]) - sum(adaptive.step_s[first:])
    assert sum(saved_s(adaptive, fixed)) == pytest.approx(expected)
    assert expected > 0
