"""The command line with real processes: results, and how every kind of failure ends."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

import forescale as fs
from forescale.cli.main import app
from forescale.cli.measurement import MeasuredTask
from forescale.cli.task_file import load_task
from forescale.cli.units import size
from forescale.control.costs import ProfiledCosts
from forescale.control.log import Header, decode
from forescale.control.planner import Planner
from forescale.engine.runlog import read_run_log
from forescale.plan.partition import predict
from forescale.plan.partition_plan import PartitionPlan, Schedule, Shard, Stage

TASKS = Path(__file__).parent / "cli_tasks.py"
COMMAND = (sys.executable, "-m", "forescale")
STEPS, CHECKPOINT, ROWS = 6, 4, 8
LIMIT_S = 200


def forescale(
    *words: str | Path, cwd: Path, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=LIMIT_S, check=False, preexec_fn=before
    )


def train(task: str, steps: int, folder: Path, *options: str) -> Sequence[str | Path]:
    where = ("--devices", "2", "--dir", folder.name)
    return ("train", f"{TASKS}:{task}", "--steps", str(steps), *where, *options)


def error_of(done: subprocess.CompletedProcess[str], exit_code: int = 2) -> str:
    """The one line in which a command says why it failed."""
    assert done.returncode == exit_code, done.stderr
    assert not done.stdout
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == done.stderr.splitlines()[-1:]
    return errors[0]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run's folder and what ``--json`` said."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    options = ("--checkpoint-every", str(CHECKPOINT), "--json", "--report", "run/report.html")
    done = forescale(*train("task", STEPS, folder, *options), cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "a task file may print" in done.stderr
    return folder, json.loads(done.stdout)


@pytest.fixture
def copied(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the run's folder without its last checkpoint, to go on with."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    return folder


def test_json_holds_the_whole_run(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, said = finished
    assert len(said["losses"]) == len(said["step_s"]) == len(said["predicted_s"]) == STEPS
    assert said["losses"][-1] < said["losses"][0]
    assert said["plans"][0]["stages"]
    assert said["log_path"] == "run/log.jsonl"
    assert said["checkpoint"] == f"run/checkpoints/step-{STEPS:08d}"
    assert fs.load_checkpoint(folder / "checkpoints").keys() >= {"0.0.weight", "3.0.bias"}


def test_the_report_is_of_this_run(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, said = finished
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f'<td>steps</td><td class="figure">{STEPS}</td>' in page
    assert f"{sum(said['losses']) / STEPS:.4f}" in page


@pytest.fixture
def measured(finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> MeasuredTask:
    """What ``plan`` and ``profile`` get to know: the finished run's costs, without measuring again."""
    header = decode(next(iter(read_run_log(finished[0] / "log.jsonl"))))
    assert isinstance(header, Header)
    # Of shards the exact peak is not known, and which plan is best depends on how busy this machine was.
    task, costs = load_task(str(TASKS)), replace(ProfiledCosts.from_json(header.run), shardable=False)
    batches = list(islice(task.batches, 2))
    bindings = ({costs.rows_symbol or "": ROWS},) * len(batches)
    known = MeasuredTask(task=replace(task, batches=batches), costs=costs, bindings=bindings)
    for command in ("plan", "profile"):
        monkeypatch.setattr(f"forescale.cli.{command}.measure_task", lambda *_: known)
    return known


def test_plan_shows_the_exact_peak_memory(measured: MeasuredTask, tmp_path: Path) -> None:
    best = Planner(measured.costs).best(measured.bindings[0], {})
    peaks_bytes = measured.costs.peak_bytes(best, measured.bindings[0])
    bounds_bytes = [stage.memory_bytes for stage in best.prediction.stages]
    assert peaks_bytes != tuple(bounds_bytes), "else this shows nothing"
    stages = json.loads(invoke("plan", "x.py", "--json"))["stages"]
    assert [stage["peak_memory_bytes"] for stage in stages] == list(peaks_bytes)
    assert [stage["memory_bytes"] for stage in stages] == bounds_bytes
    shown = invoke("plan", "x.py", "--svg", str(tmp_path / "plan.svg"))
    assert all(f"{size(peak_bytes)} of" in shown for peak_bytes in peaks_bytes)
    assert "<svg" in (tmp_path / "plan.svg").read_text(encoding="utf-8")


def test_shards_have_the_peak_memory_that_is_predicted(measured: MeasuredTask) -> None:
    (binding, *_) = measured.bindings
    problem = measured.costs.problem(binding, {})
    operators = tuple(range(len(problem.graph.operators)))
    whole = (Stage(device="cpu0", operators=operators),)
    shards = tuple(
        Stage(device=f"cpu{index}", operators=operators, shard=Shard(index=index, weights=(3, 1)))
        for index in range(2)
    )
    plans = [
        PartitionPlan(
            stages=stages,
            microbatches=1,
            schedule=Schedule.ONE_F_ONE_B,
            prediction=predict(problem, stages, 1, Schedule.ONE_F_ONE_B),
        )
        for stages in (whole, shards)
    ]
    (whole_bytes,), peaks_bytes = (measured.costs.peak_bytes(plan, binding) for plan in plans)
    assert peaks_bytes == tuple(stage.memory_bytes for stage in plans[1].prediction.stages)
    assert peaks_bytes[1] < peaks_bytes[0] < whole_bytes


def test_profile_shows_the_exact_peak_memory(measured: MeasuredTask) -> None:
    best = Planner(measured.costs).best(measured.bindings[0], {})
    peaks_bytes = measured.costs.peak_bytes(best, measured.bindings[0])
    said = json.loads(invoke("profile", "x", "--json"))
    assert [batch["peak_memory_bytes"] for batch in said["upcoming"]] == [list(peaks_bytes)] * 2
    operators = tuple(range(said["totals"]["operators"]))
    alone = replace(
        best,
        stages=(Stage(device="cpu0", operators=operators),),
        microbatches=1,
        prediction=replace(best.prediction, stages=best.prediction.stages[:1]),
    )
    assert (said["totals"]["peak_memory_bytes"],) == measured.costs.peak_bytes(alone, measured.bindings[0])
    assert all(size(peak_bytes) in invoke("profile", "x") for peak_bytes in peaks_bytes)


def invoke(*words: str) -> str:
    """What a command prints that runs in this process."""
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_run_can_be_replayed(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    done = forescale("replay", folder, "--json", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["identical"]
    done = forescale("replay", "run/log.jsonl", "--policy", "min_gain=0.9", cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "by a policy with min_gain=0.9" in done.stdout


def test_a_record_that_was_changed_is_noticed(copied: Path) -> None:
    log = copied / "log.jsonl"
    log.write_text(log.read_text() + json.dumps({"type": "Stop", "reason": "invented"}) + "\n")
    done = forescale("replay", copied, cwd=copied.parent)
    assert done.returncode == 1
    assert "recorded: stop (invented); derived: nothing" in done.stdout


def test_wrong_policy(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    for change, said in (("gain=1", "has no 'gain'; it has adapt"), ("min_gain=x", "'x' is not a value")):
        assert said in error_of(forescale("replay", folder, "--policy", change, cwd=folder))


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(
    finished: tuple[Path, dict[str, Any]], copied: Path
) -> None:
    resumed = forescale(*train("task", STEPS, copied, "--json", "--resume"), cwd=copied.parent)
    assert resumed.returncode == 0, resumed.stderr
    losses = json.loads(resumed.stdout)["losses"]
    assert losses == pytest.approx(finished[1]["losses"][CHECKPOINT:], abs=1e-6)
    replayed = forescale("replay", copied, cwd=copied.parent)
    assert replayed.returncode == 0, replayed.stdout


def test_a_folder_with_a_run_is_not_overwritten(copied: Path) -> None:
    done = forescale(*train("task", STEPS, copied), cwd=copied.parent)
    assert "already holds a run" in error_of(done)


def test_another_models_checkpoint_is_refused(copied: Path) -> None:
    done = forescale(*train("longer", STEPS, copied, "--resume"), cwd=copied.parent)
    assert "is of another model: it lacks 4.0.weight" in error_of(done)


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    done = forescale(*train("task", STEPS, tmp_path / "run", "--resume"), cwd=tmp_path)
    assert "no complete checkpoint in run/checkpoints" in error_of(done)


def test_a_full_disk_loses_nothing(copied: Path) -> None:
    """The operating system refuses to write more than 300 kB into any file; a checkpoint's are larger."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = forescale(*train("task", STEPS, copied, "--resume"), cwd=copied.parent, before=limit)
    kept = f"step-{CHECKPOINT:08d}"
    assert re.search(
        rf"step {STEPS} could not be written.*resume from run/checkpoints/{kept}", error_of(done)
    )
    assert checkpoints(copied) == [kept]


def test_a_loss_that_is_not_finite_stops_the_run_there(tmp_path: Path) -> None:
    done = forescale(*train("spoilt", 20, tmp_path / "run", "--checkpoint-every", "2"), cwd=tmp_path)
    assert "the loss is nan at step 5; resume from run/checkpoints/step-00000004" in error_of(done)
    # That of step 6 would hold nothing but NaN.
    assert checkpoints(tmp_path / "run")[:2] == ["step-00000002", "step-00000004"]
    assert "step-00000006" not in checkpoints(tmp_path / "run")


def test_more_devices_than_operators(tmp_path: Path) -> None:
    done = forescale("plan", f"{TASKS}:one_operator", "--devices", "2", cwd=tmp_path)
    assert "ask for at most 1" in error_of(done)


def test_control_flow_that_depends_on_data(tmp_path: Path) -> None:
    line = TASKS.read_text().split("# the line that the error names")[0].count("\n") + 1
    done = forescale("plan", f"{TASKS}:branching", "--devices", "2", cwd=tmp_path)
    assert f"cli_tasks.py:{line}" in error_of(done)


class Started:
    """A training that goes on until something ends it.

    Args:
        until: what it must have said before the constructor returns.
    """

    def __init__(self, folder: Path, *options: str, until: str) -> None:
        words = [*COMMAND, *map(str, train("task", 10**6, folder, *options))]
        self.popen = subprocess.Popen(
            words, cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.popen.stderr is not None
        self.said = ""
        while until not in self.said:
            line = self.popen.stderr.readline()
            assert line, self.said
            self.said += line
        self.workers = psutil.Process(self.popen.pid).children(recursive=True)

    def end(self) -> subprocess.CompletedProcess[str]:
        """Waits until it and all its workers are gone."""
        stdout, stderr = self.popen.communicate(timeout=LIMIT_S)
        _, alive = psutil.wait_procs(self.workers, timeout=LIMIT_S)
        assert alive == []
        return subprocess.CompletedProcess((), self.popen.returncode, stdout, self.said + stderr)

    def worker(self, device: str) -> psutil.Process:
        return next(worker for worker in self.workers if device in worker.cmdline()[-1])


def test_ctrl_c_leaves_a_checkpoint_and_no_process(tmp_path: Path) -> None:
    run = Started(tmp_path / "run", "--report", "report.html", until="step 1/")
    assert len(run.workers) == 2
    run.popen.send_signal(signal.SIGINT)
    said = re.search(r"interrupted after (\d+) steps; resume from (\S+)", error_of(run.end(), exit_code=130))
    assert said
    assert said[2] == f"run/checkpoints/step-{int(said[1]):08d}"
    assert checkpoints(tmp_path / "run") == [Path(said[2]).name]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f'<td>steps</td><td class="figure">{said[1]}</td>' in page


def test_a_worker_that_is_killed_is_named_with_the_last_checkpoint(tmp_path: Path) -> None:
    run = Started(tmp_path / "run", "--checkpoint-every", "1", until=": checkpoint")
    run.worker("cpu1").send_signal(signal.SIGKILL)
    error = error_of(run.end())
    said = re.search(r"the worker on cpu1 was lost \(killed by SIGKILL.*\); resume from (\S+)", error)
    assert said, error
    assert (tmp_path / said[1] / "trainer.json").exists()
