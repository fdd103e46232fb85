"""Other model servers: an environment for each, how it is started, and the body that it takes.

Each has one replica of the model, its own batching where it has it, and one thread for the model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from serving_models import MOST_ROWS, PIXELS, pixels, v2_body

from serving_processes import Processes, free_port, wait_until

BENCHMARKS = Path(__file__).resolve().parent
CONSTRAINTS = BENCHMARKS.parent / "constraints.txt"
TORCH = "torch==2.13.0"
_START_S = 90.0
_PLAIN = json.dumps({"x": pixels()}).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server to compare with.

    Attributes:
        packages: what pip installs into its environment.
        command: its command line after the environment's ``bin/``, from a port and a folder of its own.
        is_peer: not so for what only shows how far one could get.
    """

    name: str
    packages: tuple[str, ...]
    command: Callable[[int, Path], tuple[str, ...]]
    path: str = "/infer"
    body: bytes = _PLAIN
    settings: str
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = 0
    is_peer: bool = True

    @property
    def home(self) -> str:
        """Name of its environment, which is that of its first package."""
        return self.packages[0].partition("[")[0]

    @property
    def package(self) -> str:
        """Whose version is told."""
        return self.home if self.is_peer else "uvicorn"


def _script(name: str) -> Callable[[int, Path], tuple[str, ...]]:
    return lambda port, folder: ("python", str(BENCHMARKS / "peers" / name), str(port), str(folder))


def _mosec(port: int, _folder: Path) -> tuple[str, ...]:
    return ("python", str(BENCHMARKS / "peers" / "mosec_app.py"), "--port", str(port), "--log-level", "error")


def _mlserver(port: int, folder: Path) -> tuple[str, ...]:
    settings = {
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": free_port(),
        "metrics_port": free_port(),
        "parallel_workers": 0,
        "debug": False,
        "use_structured_logging": False,
    }
    model = {
        "name": "mlp",
        "implementation": "mlserver_runtime.Classifier",
        "max_batch_size": MOST_ROWS,
        "max_batch_time": 0.001,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    return ("mlserver", "start", str(folder))


def _bentoml(port: int, _folder: Path) -> tuple[str, ...]:
    service = ("bentoml_service:Classifier", "--working-dir", str(BENCHMARKS / "peers"))
    return ("bentoml", "serve", *service, "--host", "127.0.0.1", "--port", str(port))


_UVICORN = ("fastapi", "uvicorn[standard]", "numpy")
_RAY_PORT = 30_000
PEERS = (
    Peer(
        name="uvicorn alone",
        packages=_UVICORN,
        command=_script("asgi_app.py"),
        settings="reads the same body, answers a constant",
        is_peer=False,
    ),
    Peer(
        name="FastAPI + uvicorn",
        packages=_UVICORN,
        command=_script("fastapi_app.py"),
        settings="uvloop, httptools, typed body and answer, no batching",
    ),
    Peer(
        name="LitServe",
        packages=("litserve", "uvicorn[standard]", "numpy"),
        command=_script("litserve_app.py"),
        settings=f"fast queue, batches up to {MOST_ROWS}, 1 ms",
    ),
    Peer(
        name="BentoML",
        packages=("bentoml", "uvicorn[standard]", "numpy"),
        command=_bentoml,
        body=json.dumps({"x": [pixels()]}).encode(),
        settings=f"adaptive batching up to {MOST_ROWS}",
        environment={"BENTOML_DO_NOT_TRACK": "1"},
    ),
    Peer(
        name="mosec",
        packages=("mosec", "orjson", "numpy"),
        command=_mosec,
        settings=f"orjson, batches up to {MOST_ROWS}, 1 ms",
    ),
    Peer(
        name="MLServer",
        packages=("mlserver", "uvicorn[standard]", "numpy"),
        command=_mlserver,
        path="/v2/models/mlp/infer",
        body=v2_body(pixels(), (1, PIXELS)),
        settings=f"uvloop, adaptive batching up to {MOST_ROWS}, 1 ms, model in the HTTP process",
    ),
    Peer(
        name="Ray Serve",
        packages=("ray[serve]", "uvicorn[standard]", "orjson", "numpy"),
        command=_script("ray_app.py"),
        settings=f"direct ingress, throughput optimised, batches up to {MOST_ROWS}, 1 ms",
        environment={
            "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(_RAY_PORT),
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        port=_RAY_PORT,
    ),
)


def install(folder: Path, say: Callable[[str], None]) -> None:
    """Make what is missing of the environments: one with torch, and one for each peer that sees it, too."""
    shared = _environment(folder, "torch", (TORCH, "numpy"), ("-c", str(CONSTRAINTS)), "", say)
    for peer in PEERS:
        _environment(folder, peer.home, peer.packages, (), str(_site_packages(shared)), say)


def versions(folder: Path) -> dict[str, str]:
    """What is installed of each peer."""
    found = {}
    for peer in PEERS:
        code = f"from importlib.metadata import version; print(version({peer.package!r}))"
        found[peer.name] = subprocess.run(
            [str(folder / peer.home / "bin" / "python"), "-c", code],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    return found


def _environment(
    folder: Path,
    name: str,
    packages: tuple[str, ...],
    options: tuple[str, ...],
    also: str,
    say: Callable[[str], None],
) -> Path:
    home = folder / name
    ready = home / ".ready"  # written last, so that an interrupted installation is repeated
    if ready.exists():
        return home
    say(f"installing {' '.join(packages)} into {home}")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    if also:
        (_site_packages(home) / "torch.pth").write_text(also)
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, *options, *packages], check=True)
    ready.touch()
    return home


def _site_packages(home: Path) -> Path:
    return home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


class Running:
    """A peer that answers, in a ``with`` block."""

    def __init__(self, peer: Peer, environments: Path, processes: Processes) -> None:
        self._processes = processes
        port = free_port()
        folder = processes.folder / f"{peer.home}-{port}"
        folder.mkdir()
        home = environments / peer.home / "bin"
        program, *arguments = peer.command(port, folder)
        sources = f"{BENCHMARKS}{os.pathsep}{BENCHMARKS / 'peers'}"
        self.url = f"http://127.0.0.1:{peer.port or port}{peer.path}"
        self.process: psutil.Popen = processes.start(
            [str(home / program), *arguments],
            log=f"{peer.home}.log",
            cwd=folder,
            environment={
                "PYTHONPATH": sources,
                "PATH": f"{home}{os.pathsep}{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
                "HOME": str(folder),
                **peer.environment,
            },
        )
        self._body = peer.body

    def __enter__(self) -> str:
        try:
            wait_until(self._answers, f"{self.url} answers", _START_S, self.process)
        except RuntimeError:
            self._processes.stop(self.process)
            raise
        return self.url

    def __exit__(self, *exc_info: object) -> None:
        self._processes.stop(self.process)

    def _answers(self) -> bool:
        request = urllib.request.Request(
            self.url, data=self._body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False
