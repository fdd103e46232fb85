"""What is said about a command line before anything runs, and how failures end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from forescale.cli.failure import OneLineErrors
from forescale.cli.main import app
from forescale.core.errors import InvalidInput, RunFailed

COMMANDS = [
    *("devices", "profile", "plan", "train", "forecast", "replay"),
    *("serve", "models", "deploy", "promote", "rollback", "undeploy", "status"),
]
NOWHERE = ("--url", "http://127.0.0.1:9")


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def fails_in_one_line(result: Result, exit_code: int = 2) -> str:
    """The error's text."""
    assert result.exit_code == exit_code
    assert not result.stdout
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"forescale {command}" in result.stdout.split("Examples:")[1]


def test_help_lists_every_command() -> None:
    assert [name for name in COMMANDS if name not in run("--help").stdout] == []


def test_version() -> None:
    assert run("--version").stdout.startswith("forescale 0.")


def test_no_command_shows_the_help() -> None:
    result = run()
    assert "Commands" in result.output
    assert "error:" not in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "some.py"], "--steps"),
        (["train", "some.py", "--steps", "0"], "--steps"),
        (["train", "some.py", "--steps", "3", "--resume"], "--dir"),
        (["plan"], "FILE.py"),
        (["plan", "some.py", "--devices", "two"], "--devices"),
        (["devices", "--devices", "0"], "at least 1"),
        (["plan", "missing.py"], "there is no file missing.py"),
        (["replay", "missing"], "missing"),
        (["plan", "task.py", "--svg", "none/plan.svg"], "there is no folder none"),
        (["train", "task.py", "--steps", "3", "--report", "none/report.html"], "there is no folder none"),
        (["train", "task.py", "--steps", "3", "--report", "."], "it is a folder"),
        (["demo", "--steps", "3"], "nothing to see"),
        (["serve", "--port", "70000"], "--port"),
        (["serve", "--state", "/dev/null"], "cannot keep state in /dev/null"),
        (["status", *NOWHERE], "no server at http://127.0.0.1:9: start one"),
        (["status", "--url", "nonsense"], "'nonsense' is not a server's URL"),
        (["deploy", "digits@1", "--min", "-1"], "--min"),
        (["deploy", "digits@1", *NOWHERE], "no server at"),
        (
            ["deploy", "digits@2", "--canary", "10%", "--blue-green", *NOWHERE],
            "one of --canary, --shadow and",
        ),
        (["deploy", "digits@2", "--canary", "0.1", *NOWHERE], "'0.1' is not a share such as 10%"),
        (["deploy", "digits@2", "--canary", "10%,%", *NOWHERE], "'%' is not a share such as 10%"),
        (["deploy", "digits@2", "--canary", "10%", "--max", "3", *NOWHERE], "for --max, deploy the old"),
        (["deploy", "digits@2", "--check", "quality", *NOWHERE], "--check needs --canary, --shadow or"),
        (["deploy", "digits@2", "--canary", "10%", "--wait", *NOWHERE], "no server at"),
        (["promote", "digits", *NOWHERE], "no server at"),
        (["rollback", "digits", *NOWHERE], "no server at"),
        (["serve", "--check", "python check.py"], "is not of the form NAME=COMMAND"),
        (["undeploy", "digits", *NOWHERE], "no server at"),
        (["models", "list", *NOWHERE], "no server at"),
        (["models", "add", "digits", "missing.pt2", *NOWHERE], "cannot read missing.pt2"),
        (["models", "add", "digits", "missing.txt", *NOWHERE], "name its format"),
        (["models", "add", "digits", "m.pt2", "--metric", "accuracy", *NOWHERE], "NAME=VALUE"),
        (["models", "add", "digits", "m.pt2", "--metric", "accuracy=nan", *NOWHERE], "only finite"),
        (["models", "add", "digits", "m.pt2", "--signature", "no.json", *NOWHERE], "cannot read no.json"),
        (["models", "alias", "digits", "production", *NOWHERE], "or --remove"),
        (["forecast"], "SERIES.csv"),
        (["forecast", "missing.csv"], "missing.csv: No such file"),
        (["forecast", "."], "it is a folder"),
        (["forecast", "missing.csv", "--step-s", "0"], "give seconds above 0"),
        (["forecast", "missing.csv", "--horizon-s", "nan"], "give seconds above 0"),
        (["forecast", "missing.csv", "--season-s", "inf"], "give seconds above 0"),
        (["forecast", "missing.csv", "--combine", "max"], "sum, mean or count, not max"),
        (["forecast", "missing.csv", "--plot", "none/fan.svg"], "there is no folder none"),
        (["forecast", "missing.csv", "--plot=fan.gif"], ".svg, .png, .pdf, not fan.gif"),
    ],
)
def test_wrong_command_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    line = result.stderr.splitlines()[-1]  # a command that had begun has said so
    assert result.exit_code == 2
    assert line.startswith("error: ")
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_a_report_without_matplotlib_names_the_extra_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = tmp_path / "ran"
    task = tmp_path / "task.py"
    task.write_text(f"open({str(ran)!r}, 'w').close()\n", encoding="utf-8")
    result = run("train", task, "--steps", "3", "--report", tmp_path / "report.html")
    assert "pip install 'forescale[report]'" in fails_in_one_line(result)
    assert not ran.exists()


def failing(error: BaseException) -> Result:
    broken = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)

    @broken.command()
    def fail() -> None:
        raise error

    @broken.command()
    def other() -> None: ...

    return CliRunner().invoke(broken, ["fail"])


def test_errors_raised_on_purpose_end_with_2() -> None:
    assert "two\nlines".replace("\n", " ") in fails_in_one_line(failing(InvalidInput("two\nlines")))


def test_an_interrupted_run_ends_with_130_and_names_its_checkpoint() -> None:
    error = RunFailed("interrupted after 3 steps", checkpoint="runs/a/checkpoints/step-00000003")
    error.__cause__ = KeyboardInterrupt()
    assert "step-00000003" in fails_in_one_line(failing(error), exit_code=130)


def test_ctrl_c_outside_a_run_ends_with_130() -> None:
    assert "interrupted" in fails_in_one_line(failing(KeyboardInterrupt()), exit_code=130)


def test_an_unexpected_error_leaves_its_traceback_in_a_file() -> None:
    line = fails_in_one_line(failing(ZeroDivisionError("by zero")), exit_code=1)
    assert "ZeroDivisionError: by zero" in line
    kept = Path(line.split("the traceback is in ")[1].strip().removesuffix(")"))
    assert "in fail" in kept.read_text(encoding="utf-8")
    kept.unlink()
