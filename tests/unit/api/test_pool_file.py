"""Deployments of a file: made when it says something new, and never against what people did since."""

from __future__ import annotations

from pathlib import Path

import pytest

from fake_replicas import DOUBLING
from forescale.api.deployment_requests import NewDeployment
from forescale.api.pool_file import deploy_wanted, read_pool_file
from forescale.core.clock import SystemClock
from forescale.registry.artifacts import ArtifactStore
from forescale.registry.records import DeploymentSpec
from forescale.registry.registry import Registry


def test_what_the_file_says_is_deployed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registry(
        f"sqlite:///{tmp_path}/registry.db", ArtifactStore(str(tmp_path / "s")), SystemClock()
    )
    (tmp_path / "model").write_bytes(b"weights")
    for _ in range(3):
        registry.add_version("digits", tmp_path / "model", format="pt2", signature=DOUBLING, created_by="ada")
    memory = tmp_path / "deployed.json"

    def start(**wanted: NewDeployment) -> int:
        """The version that is deployed when a server has started with these."""
        deploy_wanted(registry, wanted, memory)
        return next(found.spec.number for found in registry.deployments() if found.spec.model == "digits")

    first = NewDeployment(version=1)
    assert start(digits=first, absent=first) == 1
    assert "there is no model absent" in capsys.readouterr().out
    registry.deploy(DeploymentSpec(model="digits", number=3), by="ada")
    assert start(digits=first) == 3, "the file has said that before"
    assert start(digits=NewDeployment(version=2)) == 2
    assert start() == 2, "what the file does not name stays"
    assert start(digits=first) == 1
    assert [event.happening.by for event in registry.events() if event.happening.kind == "deployed"] == [
        "pool file",
        "ada",
        "pool file",
        "pool file",
    ]
    registry.close()


def test_a_deployment_is_named_as_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "pool.toml"
    path.write_text('[deployments.digits]\nversion = "production"\nmin = 0\nmax = 3\nthreads = 2\n')
    wanted = read_pool_file(path).deployments["digits"].spec("digits", 7)
    assert wanted == DeploymentSpec(model="digits", number=7, min_replicas=0, max_replicas=3, max_threads=2)
