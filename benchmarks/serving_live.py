"""Scaling ahead against scaling after, live: recorded requests to a real server, one rule after the other.

Called by `serving_scaling.py --live`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from serving_arrivals import Answer, Kind, offer_at, post
from serving_models import WIDTH, encoder, save, v2_binary_body

import forescale
from serving_processes import Processes, Site

RULES: dict[str, tuple[str, ...]] = {"reactive": ("--no-forecast",), "ahead": ()}
MODEL = "recorded"
LAYERS, TOKENS = 8, 64
_EVERY_S = 0.25
_PATH = os.pathsep.join((str(Path(forescale.__file__).parents[1]), str(Path(__file__).parent)))


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveOutcome:
    """What came of it.

    Attributes:
        late: requests answered later than the target, or not at all.
        refused: those of them that were refused.
        failed: with neither answer nor refusal.
        replica_s: seconds of replicas that start or serve.
        process_s: seconds of all processes for replicas, spares included.
        most: replicas at the same time.
        lag_s: how much later than recorded requests were sent, 99%.
    """

    requests: int
    late: int
    refused: int
    failed: int
    replica_s: float
    process_s: float
    most: int
    lag_s: float


class Meter:
    """Counts replicas and processes while a ``with`` block runs."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.replica_s, self.process_s, self.most = 0.0, 0.0, 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        before_s = time.perf_counter()
        while not self._end.wait(_EVERY_S):
            (deployment,) = self._site.client.deployments()
            replicas = sum(replica["state"] != "draining" for replica in deployment["replicas"])
            processes = len(self._site.crew())
            now_s = time.perf_counter()
            self.replica_s += replicas * (now_s - before_s)
            self.process_s += processes * (now_s - before_s)
            self.most = max(self.most, replicas)
            before_s = now_s


def live(
    processes: Processes,
    rule: str,
    times_s: Sequence[float],
    *,
    row_s: float | None,
    latency_s: float,
    devices: int,
    most: int,
) -> LiveOutcome:
    """Send recorded requests to a server of its own that scales by a rule.

    Args:
        row_s: what a row takes, by waiting: as if each replica had a core. None: a transformer that computes.
        most: replicas.
    """
    rows = np.zeros((1, 4) if row_s is not None else (1, TOKENS, WIDTH), np.float32)
    options = ("--devices", str(devices), "--factory", "paced_model:paced", *RULES[rule])
    with Site(processes, rule, *options, environment={"PYTHONPATH": _PATH}) as site:
        _add(site, processes.folder, row_s)
        site.deploy(MODEL, min_replicas=1, max_replicas=most, latency_ms=latency_s * 1e3)
        site.settle()
        body, json_bytes = v2_binary_body(rows, binary_data_output=True)
        header = f"Inference-Header-Content-Length: {json_bytes}"
        kind = Kind(name=MODEL, share=1.0, request=post(f"/v2/models/{MODEL}/infer", body, [header]))
        with Meter(site) as meter:
            answers = offer_at(site.port, kind, times_s)
    return _outcome(answers, latency_s, meter)


def _outcome(answers: Sequence[Answer], latency_s: float, meter: Meter) -> LiveOutcome:
    # What the client sent late is not the server's, but the wait from then on is.
    return LiveOutcome(
        requests=len(answers),
        late=sum(answer.status != 200 or answer.latency_s > latency_s for answer in answers),
        refused=sum(answer.status == 503 for answer in answers),
        failed=sum(answer.status not in (200, 503) for answer in answers),
        replica_s=meter.replica_s,
        process_s=meter.process_s,
        most=meter.most,
        lag_s=float(np.quantile([answer.lag_s for answer in answers], 0.99)),
    )


def _add(site: Site, folder: Path, row_s: float | None) -> None:
    if row_s is None:
        site.add(MODEL, save(encoder(LAYERS), torch.zeros(2, TOKENS, WIDTH), folder / "encoder.pt2"))
        return
    file = folder / "paced"
    file.write_text(str(row_s))
    tensor = {"datatype": "FP32", "shape": [-1, 4]}
    signature = {"inputs": [{"name": "x", **tensor}], "outputs": [{"name": "y", **tensor}]}
    site.client.add_model(
        MODEL, file, format="factory", options={"factory": "paced_model:paced"}, signature=signature
    )
