"""What ``forescale replay`` says about a simulated run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from chain_model import ChainCosts
from forescale.cli.main import app
from forescale.control.costs import ProfiledCosts
from forescale.control.log import Record, encode
from forescale.engine.messages import Repartition
from simulated_training import SimulatedRun, train


@pytest.fixture(scope="module")
def run() -> SimulatedRun:
    return train(60, speeds=lambda step: {"cpu1": 0.4} if step >= 30 else {}, max_chunks=None)


@dataclass(frozen=True)
class Replayed:
    """Replays records that are written to a log first."""

    folder: Path

    def __call__(self, records: list[Record], *options: str) -> Result:
        lines = [json.dumps(encode(record)) + "\n" for record in records]
        (self.folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")
        return CliRunner().invoke(app, ["replay", str(self.folder), *options])


@pytest.fixture
def replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Replayed:
    def costs(value: Mapping[str, Any]) -> ChainCosts:
        return ChainCosts()

    monkeypatch.setattr(ProfiledCosts, "from_json", costs)
    return Replayed(tmp_path)


def forged(run: SimulatedRun) -> list[Record]:
    """The run's records with another number of microbatches in the first command."""
    at, command = next((i, r) for i, r in enumerate(run.records) if isinstance(r, Repartition))
    other = replace(command, plan=replace(command.plan, microbatches=3))
    return [*run.records[:at], other, *run.records[at + 1 :]]


def test_decisions_and_expected_use_are_shown(run: SimulatedRun, replayed: Replayed) -> None:
    result = replayed(run.records)
    assert result.exit_code == 0
    assert "cpu1 computes" in result.stdout
    assert "the step after the last will use" in result.stdout
    assert "1 command derived again: identical to the record" in result.stdout
    assert result.stderr == ""


def test_json_holds_the_expected_use(run: SimulatedRun, replayed: Replayed) -> None:
    said = json.loads(replayed(run.records, "--json").stdout)["expected_use"]
    assert {device: tuple(use["busy_L"]) for device, use in said.items()} == {
        device: use.busy_L for device, use in run.state.use.items()
    }


def test_a_difference_says_what_was_decided(run: SimulatedRun, replayed: Replayed) -> None:
    result = replayed(forged(run))
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if "recorded:" in line]
    recorded, derived = line.split("derived:")
    assert "microbatches: 3" in recorded
    assert "microbatches: 3" not in derived
    assert "1 difference from the record" in result.stdout


def test_a_long_replay_says_that_it_goes_on(
    run: SimulatedRun, replayed: Replayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forescale.cli.console._SOON_S", 0.0)
    result = replayed(run.records)
    assert result.stderr.splitlines() == ["replay: reading the log", "replay: deciding again"]
