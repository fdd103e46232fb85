"""Models from a real MLflow registry, in a SQLite file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from served_app import served_app

LOG = """
import json, math, sys
from pathlib import Path
from mlflow import MlflowClient
client = MlflowClient()
def log(name, files, **metrics):
    run = client.create_run("0", tags={"mlflow.source.git.commit": "4f2a9c1"})
    folder = Path(sys.argv[1], run.info.run_id)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(file.encode())
    client.log_artifacts(run.info.run_id, str(folder), "model")
    for metric, value in metrics.items():
        client.log_metric(run.info.run_id, metric, value)
    version = client.create_model_version(name, f"{run.info.artifact_uri}/model", run_id=run.info.run_id)
    return version.version
for name in ("digits", "pickled", "two"):
    client.create_registered_model(name)
log("digits", ["MLmodel", "model.onnx"], accuracy=0.5)
second = log("digits", ["MLmodel", "data/model.pt2"], accuracy=0.97, loss=math.nan)
client.set_registered_model_alias("digits", "champion", second)
log("pickled", ["MLmodel", "data/model.pth"])
log("two", ["a.onnx", "b.onnx"])

from forescale.api.client import Client
from forescale.core.errors import InvalidInput
with Client(sys.argv[2]) as ours:
    told = {}
    for reference in sys.argv[3:]:
        try:
            told[reference] = ours.add_model("digits", reference)
        except InvalidInput as error:
            told[reference] = str(error)
print(json.dumps(told))
"""
REFUSED = {
    "models:/digits": "neither models:/NAME/NUMBER nor",
    "models:/digits/Production": "neither models:/NAME/NUMBER nor",
    "models:/digits/7": "MLflow: models:/digits/7: .*not found",
    "models:/digits@nobody": "nobody.* not found",
    "models:/pickled/1": r"no files ending in .*data/model.pth.*as pt2",
    "models:/two/1": r"has 2 files .*a.onnx, b.onnx",
}


def test_models_are_added_with_what_their_runs_know(tmp_path: Path) -> None:
    # In a process of its own: MLflow warns while it is imported, and changes logging.
    taken = ("models:/digits/1", "models:/digits@champion")
    environment = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }
    (tmp_path / "served").mkdir()
    with served_app(tmp_path / "served") as url:
        said = subprocess.run(
            [sys.executable, "-c", LOG, tmp_path, url, *taken, *REFUSED],
            env={**os.environ, **environment},
            cwd=tmp_path,
            check=False,
            capture_output=True,
            text=True,
        )
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout.splitlines()[-1])
    first, second = (told[reference] for reference in taken)
    assert (first["format"], first["metrics"], first["commit"]) == ("onnx", {"accuracy": 0.5}, "4f2a9c1")
    assert (second["format"], second["metrics"], second["commit"]) == ("pt2", {"accuracy": 0.97}, "4f2a9c1")
    assert second["size_bytes"] == len("data/model.pt2")
    for reference, words in REFUSED.items():
        assert re.search(words, told[reference]), told[reference]
