"""``pool.toml``: options of ``forescale serve``, and what is to be deployed.

```toml
host = "0.0.0.0"
token-file = "/run/secrets/forescale"

[deployments.digits]
version = "production"
max = 4
latency-ms = 50
```
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from forescale.api.deployment_requests import NewDeployment
from forescale.api.http import first_fault
from forescale.core.errors import InvalidInput
from forescale.registry.records import check_name
from forescale.registry.registry import Registry

# As the options of ``forescale deploy`` are called.
_SHORT = {"min": "min_replicas", "max": "max_replicas", "threads": "max_threads"}
_BY = "pool file"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFile:
    """What such a file says.

    Attributes:
        options: of the command, by their long names without dashes.
        deployments: by model.
    """

    options: Mapping[str, Any]
    deployments: Mapping[str, NewDeployment]


def read_pool_file(path: Path) -> PoolFile:
    """Read one.

    Raises:
        InvalidInput: it cannot be read, is not TOML, or says of deployments what cannot be.
    """
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput(f"{path} is not TOML: {error}") from error
    deployments = said.pop("deployments", {})
    if not isinstance(deployments, dict):
        raise InvalidInput(f"{path}: write deployments as tables, [deployments.NAME]")
    wanted = {model: _deployment(path, model, fields) for model, fields in deployments.items()}
    return PoolFile(options=said, deployments=wanted)


def deploy_wanted(registry: Registry, wanted: Mapping[str, NewDeployment], memory: Path) -> None:
    """Deploy what a file says, unless it has said the same before: people may have changed it since.

    What cannot be deployed is logged, and tried again the next time.

    Args:
        memory: file that keeps what was said before.
    """
    try:
        before = json.loads(memory.read_bytes())
    except FileNotFoundError:
        before = {}
    done: dict[str, Any] = {}
    for model, deployment in wanted.items():
        said = deployment.model_dump(mode="json")
        if before.get(model) != said:
            try:
                number = registry.version(model, deployment.version).number
                registry.deploy(deployment.spec(model, number), by=_BY)
            except InvalidInput as error:
                structlog.get_logger().error("not_deployed", model=model, error=str(error))
                continue
        done[model] = said
    part = memory.with_suffix(".part")
    part.write_text(json.dumps(done))
    part.replace(memory)


def _deployment(path: Path, model: str, fields: Any) -> NewDeployment:
    try:
        check_name(model, "a model")
        if not isinstance(fields, dict):
            raise InvalidInput("it must be a table with a version")
        named = {name.replace("-", "_"): value for name, value in fields.items()}
        found = NewDeployment.model_validate({_SHORT.get(name, name): value for name, value in named.items()})
        found.spec(model, 1)
    except ValidationError as error:
        raise InvalidInput(f"{path}: deployments.{model}: {first_fault(error)}") from error
    except InvalidInput as error:
        raise InvalidInput(f"{path}: deployments.{model}: {error}") from error
    return found
