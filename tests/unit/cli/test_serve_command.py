"""What ``forescale serve`` makes of its options and its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import forescale.api.server
from forescale.api.server import ServerPlan
from forescale.cli.main import app

TOKEN = "correct-horse-battery"


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[ServerPlan]:
    """Of the servers that were to be started."""
    found: list[ServerPlan] = []
    monkeypatch.setattr(forescale.api.server, "serve", lambda plan, _on_ready: found.append(plan))
    monkeypatch.chdir(tmp_path)
    return found


def serve(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["serve", *words])
    assert result.exit_code == code, result.output
    return result.stderr


def written(text: str) -> str:
    Path("pool.toml").write_text(text)
    return "pool.toml"


def test_the_file_says_what_the_command_line_does_not(plans: list[ServerPlan]) -> None:
    Path("tokens").write_text(TOKEN)
    file = written(
        """
        state = "models"
        port = 9000
        devices = 3
        trust = true
        forecast = false
        factory = ["a:b", "c:d"]
        lease-s = 7
        token-file = "tokens"
        access-log = "access.log"
        allow-host = ["models.example"]

        [deployments.digits]
        version = "production"
        min = 0
        max = 4
        latency-ms = 50
        """
    )
    serve("--config", file, "--port", "9001")
    serve("--port", "9002", "--factory", "e:f", "--forecast", "--config", file)
    first, second = plans
    assert (first.state, first.plane.port, first.plane.devices, first.trust) == (
        Path("models"),
        9001,
        3,
        True,
    )
    assert (first.plane.factories, first.lease_s, first.tokens) == (("a:b", "c:d"), 7, (TOKEN,))
    assert first.plane.access_log == Path("access.log").absolute()
    assert first.plane.names == ("models.example",)
    spec = first.deployments["digits"].spec("digits", 3)
    assert (spec.min_replicas, spec.max_replicas, spec.latency_s, spec.number) == (0, 4, 0.05, 3)
    assert (second.plane.port, second.plane.factories) == (9002, ("e:f",))
    assert (first.is_forecast, second.is_forecast) == (False, True)


def test_without_a_file_there_are_the_defaults(plans: list[ServerPlan]) -> None:
    serve()
    serve("--host", "0.0.0.0")
    serve("--host", "0.0.0.0", "--allow-host", "models.example")
    assert [plan.plane.names for plan in plans] == [(), None, ("models.example",)]
    assert plans[0] == ServerPlan(state=Path("forescale-state"), plane=plans[0].plane)


def test_who_listens_for_everybody_is_told_what_that_means(plans: list[ServerPlan]) -> None:
    Path("tokens").write_text(TOKEN)
    assert "whoever reaches" in serve("--host", "0.0.0.0")
    assert "whoever reaches" not in serve("--host", "0.0.0.0", "--token-file", "tokens")
    assert "whoever reaches" not in serve("--host", "127.0.0.1")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hots = 'x'", "'hots' is no option"),
        ("config = 'x'", "'config' is no option"),
        ("factory = 'a:b'", "factory must be a list"),
        ("port = [1]", "port must be one value"),
        ("port = 'x'", "'--port': Input should be a valid int"),
        ("port = 70000", "'--port': Input should be less"),
        ("port = ", "is not TOML"),
        ("deployments = 3", "[deployments.NAME]"),
        ("[deployments]\ndigits = 3", "deployments.digits: it must be a table"),
        ("[deployments.digits]\nmin = 2", "deployments.digits: version: Field required"),
        ("[deployments.digits]\nversion = 2\nmni = 2", "mni: Extra inputs are not permitted"),
        ("[deployments.digits]\nversion = 2\nmin = 3\nmax = 2", "from 3 to 2 replicas"),
        ("[deployments.'../x']\nversion = 2", "cannot name a model"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_a_line(plans: list[Any], text: str, told: str) -> None:
    said = serve("--config", written(text), code=2)
    assert told in said
    assert said.count("\n") == 1
    assert plans == []


def test_a_file_that_is_not_there(plans: list[Any]) -> None:
    assert "cannot read absent.toml: No such file" in serve("--config", "absent.toml", code=2)
