"""Models of an MLflow registry: ``models:/NAME/VERSION``, fetched with MLflow's own client.

Where the registry is and who asks is what MLflow's environment says (``MLFLOW_TRACKING_URI`` and its like).
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forescale.core.errors import InvalidInput
from forescale.engine.serve.formats import format_of

SCHEME = "models:/"
_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<number>\d+)|@(?P<alias>[^/@]+))")
_ENDINGS = (".pt2", ".onnx", ".safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class MlflowModel:
    """A version of a model.

    Attributes:
        path: its file, until the end of the block that fetched it.
        metrics: of the run that made it; those that are finite numbers.
        commit: of the code that made it, where the run knows.
    """

    path: Path
    format: str
    metrics: Mapping[str, float]
    commit: str | None


@contextmanager
def fetched(reference: str) -> Generator[MlflowModel]:
    """A model's file, in a folder that goes away with the block.

    Raises:
        InvalidInput: there is no such model, it has no file that can be served, or MLflow is not installed.
    """
    found = _REFERENCE.fullmatch(reference)
    if found is None:
        raise InvalidInput(f"{reference!r} is neither models:/NAME/NUMBER nor models:/NAME@ALIAS")
    try:
        from mlflow.artifacts import download_artifacts  # noqa: PLC0415 - heavy, and an extra
        from mlflow.exceptions import MlflowException  # noqa: PLC0415
        from mlflow.tracking import MlflowClient  # noqa: PLC0415
    except ModuleNotFoundError as error:
        message = f"models of MLflow need {error.name}: pip install 'forescale[mlflow]'"
        raise InvalidInput(message) from error
    with tempfile.TemporaryDirectory() as folder:
        try:
            client: Any = MlflowClient()
            name, number, alias = found.group("name", "number", "alias")
            if alias is None:
                version = client.get_model_version(name, number)
            else:
                version = client.get_model_version_by_alias(name, alias)
            run = client.get_run(version.run_id) if version.run_id else None
            download_artifacts(artifact_uri=f"{SCHEME}{name}/{version.version}", dst_path=folder)
        except (MlflowException, OSError) as error:
            raise InvalidInput(f"MLflow: {reference}: {str(error).splitlines()[0]}") from error
        path = _model_file(Path(folder), reference)
        metrics = run.data.metrics if run else {}
        yield MlflowModel(
            path=path,
            format=format_of(path),
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
            commit=run.data.tags.get("mlflow.source.git.commit") if run else None,
        )


def _model_file(folder: Path, reference: str) -> Path:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    models = [path for path in files if path.suffix in _ENDINGS]
    if len(models) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in (models or files)[:5])
        raise InvalidInput(
            f"{reference} has {len(models) or 'no'} files ending in {', '.join(_ENDINGS)} ({names}): log it "
            "with mlflow.onnx, or with mlflow.pytorch as pt2, which hold no pickles"
        )
    return models[0]
