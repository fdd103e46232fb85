"""A new version takes over, and is taken back, under requests of which none may fail; with real processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from forescale.api.client import Client
from forescale.core.errors import ServerFailed
from serving_processes import Model, Server, command, make_models, requests_all_the_time

QUICK = ("--stage-s", "0", "--min-requests", "20", "--max-slowdown", "1000")
CHECK = """
import os, sys
import numpy as np
from forescale.api.client import Client
with Client(os.environ["FORESCALE_URL"]) as client:
    answer = client.infer(
        os.environ["FORESCALE_MODEL"],
        {"input": np.zeros((1, 16), np.float32)},
        version=os.environ["FORESCALE_VERSION"],
    )
sys.exit(int(abs(answer["output"].sum() - 1.0) > 1e-5))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def options(tmp_path: Path) -> Iterator[tuple[Path, str, str, str, str]]:
    """Of servers on one state folder; no data plane is left in it."""
    check = tmp_path / "check.py"
    check.write_text(CHECK, encoding="utf-8")
    yield tmp_path / "state", "--devices", "1", "--check", f"quality={sys.executable} {check}"
    for process in psutil.process_iter(["cmdline"]):
        if str(tmp_path / "state") in (process.info["cmdline"] or ()):
            process.kill()


def wait_for_stage(client: Client, stage: int) -> None:
    for found in client.wait_for_rollout("digits", timeout_s=60):
        if found["stage"] >= stage and found["is_open"]:
            return


def test_versions_change_and_no_request_is_lost(
    models: list[Model], options: tuple[Path, str, str, str, str]
) -> None:
    old, new = models
    server = Server(*options)
    with Client(server.url) as client:
        for model in models:
            client.add_model("digits", model.file)
        client.deploy("digits", 1)
        for _ in client.wait("digits", timeout_s=60):
            pass
        with requests_all_the_time(server.url, old.inputs) as wait_for_more:
            rollout = ("--canary", "20%,50%", "--check", "quality", "--proof-s", "1000", *QUICK)
            said = command(server.url, "deploy", "digits@2", *rollout)
            assert "digits@2 is being rolled out beside digits@1" in said
            wait_for_stage(client, 1)
            server.kill()
            wait_for_more()
            server = Server(*options)
            wait_for_stage(client, 2)
            assert new.is_what(client)
            shown = " ".join(command(server.url, "status").split())
            assert "digits@2" in shown
            assert "canary" in shown
            assert "goes on to: 100%" in command(server.url, "promote", "digits")
            for found in client.wait_for_rollout("digits", timeout_s=60):
                assert found["state"] != "rolled back"
            wait_for_more()
            assert "goes back to digits@1" in command(server.url, "rollback", "digits")
            for found in client.wait("digits", timeout_s=60):
                assert found["version"] == 1
            wait_for_more()
            assert old.is_what(client)
        counts = {each["version"]: each["requests"] for each in client.deployments()[0]["versions"]}
        assert all(count["ok"] == sum(count.values()) for count in counts.values())
    assert server.end(signal.SIGTERM)[0] == 0


def test_a_damaged_version_is_taken_back(
    models: list[Model], options: tuple[Path, str, str, str, str]
) -> None:
    server = Server(*options)
    with Client(server.url) as client:
        for model in models:
            client.add_model("digits", model.file)
        client.deploy("digits", 1)
        damaged = client.model("digits")["versions"][1]["sha256"]
        (kept,) = (options[0] / "artifacts").glob(f"*/{damaged}")
        kept.chmod(0o644)
        with kept.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
        client.roll_out("digits", 2, "shadow", [1.0])
        with pytest.raises(
            ServerFailed, match=r"digits@2 is rolled back: it cannot be served: artifact .* damaged"
        ):
            for _ in client.wait_for_rollout("digits", timeout_s=60):
                pass
        for _ in client.wait("digits", timeout_s=60):
            pass
        np.testing.assert_allclose(
            client.infer("digits", {"input": models[0].inputs})["output"], models[0].outputs, rtol=1e-5
        )
    assert server.end(signal.SIGTERM)[0] == 0
