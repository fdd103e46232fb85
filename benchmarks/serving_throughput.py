"""Requests per second and time to answer, beside other servers; a transformer beside its own bare loop."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_load import Load, wrk
from serving_models import (
    LAYERS,
    MOST_ROWS,
    PIXELS,
    TOKENS,
    WIDTH,
    encoder,
    mlp,
    pixels,
    save,
    v2_binary_body,
    v2_body,
)
from serving_peers import PEERS, Peer, Running, install, versions
from serving_results import Row, Section

from serving_processes import NotStarted, Processes, Site

MANY = 32
OURS = "Forescale"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What every part is given.

    Attributes:
        environments: folder of the peers' environments; None: without peers.
        is_quick: fewer and shorter runs, for trying the script.
    """

    processes: Processes
    environments: Path | None
    is_quick: bool
    say: Callable[[str], None]

    @property
    def folder(self) -> Path:
        return self.processes.folder


def throughput(bench: Bench) -> Section:
    """The MLP with JSON bodies, at 32 connections and at one."""
    seconds, rounds = (1, 1) if bench.is_quick else (3, 3)
    contenders: list[Peer | None] = [None]
    known: dict[str, str] = {}
    if bench.environments is not None:
        install(bench.environments, bench.say)
        known = versions(bench.environments)
        contenders += PEERS
    many: dict[str, list[Load]] = {}
    one: dict[str, list[Load]] = {}
    absent: dict[str, str] = {}
    _mlp_file(bench)
    for round_ in range(rounds):
        for peer in contenders if round_ % 2 == 0 else reversed(contenders):
            name = peer.name if peer else OURS
            if name in absent:
                continue
            bench.say(f"throughput, round {round_ + 1} of {rounds}: {name}")
            try:
                with _running(bench, peer, round_) as (url, body):
                    wrk(url, body, connections=MANY, seconds=1)
                    many.setdefault(name, []).append(wrk(url, body, connections=MANY, seconds=seconds))
                    one.setdefault(name, []).append(
                        wrk(url, body, connections=1, seconds=max(1, seconds // 2))
                    )
            except NotStarted as error:
                if peer is None:
                    raise
                absent[name] = str(error)
    per_s = {name: statistics.median(load.per_s for load in loads) for name, loads in many.items()}
    median_s = {name: statistics.median(load.median_s for load in loads) for name, loads in one.items()}
    rows = [
        _row(peer, many[name], per_s, median_s, known)
        for peer in contenders
        if (name := peer.name if peer else OURS) in many
    ]
    rows += [Row(what=f"{name} {known[name]}", measured=why) for name, why in absent.items()]
    rows += _verdicts(per_s, median_s)
    return Section(
        title="Throughput and time to answer",
        how=f"MLP {PIXELS}-512-512-10, JSON bodies with {PIXELS} values, one replica with one thread, wrk on "
        f"the same {len(os.sched_getaffinity(0))} cores. {rounds} rounds of {seconds} s in turn, every "
        "server started anew; medians of the rounds.",
        rows=tuple(rows),
        figures={
            "per_s": {name: [load.per_s for load in loads] for name, loads in many.items()},
            "one_connection_median_s": {n: [load.median_s for load in loads] for n, loads in one.items()},
            "versions": known,
        },
    )


def _row(
    peer: Peer | None,
    loads: list[Load],
    per_s: dict[str, float],
    median_s: dict[str, float],
    known: dict[str, str],
) -> Row:
    name = peer.name if peer else OURS
    failed = sum(load.failed for load in loads)
    lowest, highest = min(load.per_s for load in loads), max(load.per_s for load in loads)
    measured = (
        f"{per_s[name]:,.0f} requests/s ({lowest:,.0f} to {highest:,.0f}) at {MANY}, "
        f"{median_s[name] * 1e3:.2f} ms at 1" + (f", {failed} failed" if failed else "")
    )
    what = f"{name} {known[name]}: {peer.settings}" if peer else f"{name}, defaults"
    return Row(what=what, measured=measured)


def _verdicts(per_s: dict[str, float], median_s: dict[str, float]) -> list[Row]:
    rivals = {peer.name: per_s[peer.name] for peer in PEERS if peer.is_peer and peer.name in per_s}
    if not rivals:
        return []
    best = max(rivals, key=rivals.__getitem__)
    ratio = per_s[OURS] / rivals[best]
    slower = median_s[OURS] / median_s["FastAPI + uvicorn"]
    return [
        Row(
            what=f"{MANY} connections: {OURS} against the best, {best}",
            measured=f"{ratio:.2f} ×",
            asked="≥ 3 ×",
            is_met=ratio >= 3,
        ),
        Row(
            what=f"1 connection: {OURS} against FastAPI",
            measured=f"{slower:.2f} ×",
            asked="≤ 1.5 ×",
            is_met=slower <= 1.5,
        ),
    ]


def _mlp_file(bench: Bench) -> Path:
    path = bench.folder / "mlp.pt2"
    return path if path.exists() else save(mlp(), torch.zeros(2, PIXELS), path)


@contextmanager
def _running(bench: Bench, peer: Peer | None, round_: int) -> Generator[tuple[str, bytes]]:
    if peer is not None:
        assert bench.environments is not None
        with Running(peer, bench.environments, bench.processes) as url:
            yield url, peer.body
        return
    with mlp_site(bench, f"throughput-{round_}") as site:
        yield site.infer_url("mlp"), v2_body(pixels(), (1, PIXELS))


@contextmanager
def mlp_site(bench: Bench, name: str, *options: str, **deployment: Any) -> Generator[Site]:
    """A server that serves the MLP as ``mlp``, with its warm spares there."""
    with Site(bench.processes, name, *options) as site:
        site.add("mlp", _mlp_file(bench))
        site.deploy("mlp", **deployment)
        site.settle()
        yield site


# ---- a model that takes its time ---------------------------------------------------------------------


def transformer_share(bench: Bench) -> Section:
    """A transformer of 25 MB: through the gateway beside the same batches in a bare loop."""
    # A batch takes a third of a second, and those that are under way at the end are not counted.
    seconds, rounds = (5, 1) if bench.is_quick else (20, 3)
    rows = 4  # of a request; full batches of the bare loop have as many as a full batch here
    file = save(encoder(LAYERS), torch.zeros(2, TOKENS, WIDTH), bench.folder / "transformer.pt2")
    x = np.random.default_rng(0).standard_normal((rows, TOKENS, WIDTH)).astype(np.float32)
    body, json_bytes = v2_binary_body(x, binary_data_output=True)
    headers = {"Inference-Header-Content-Length": str(json_bytes)}
    served: list[float] = []
    bare: dict[str, list[float]] = {"replica": [], "torch": []}
    with Site(bench.processes, "transformer") as site:
        site.add("transformer", file)
        site.deploy("transformer")
        site.settle()
        cores = sorted(site.replicas("transformer")[0].cpu_affinity())
        url = site.infer_url("transformer")
        wrk(url, body, connections=16, seconds=2, headers=headers)
        for round_ in range(rounds):
            bench.say(f"transformer, round {round_ + 1} of {rounds}")
            for how, per_s in bare.items():
                per_s.append(_bare_rows_per_s(how, file, cores, seconds))
            load = wrk(url, body, connections=2 * MOST_ROWS // rows, seconds=seconds, headers=headers)
            served.append(load.per_s * rows)
    share = statistics.median(served) / statistics.median(bare["replica"])
    return Section(
        title="A transformer, 25 MB of weights",
        how=f"Encoder, 8 layers, width {WIDTH}, {TOKENS} tokens a row; requests of {rows} rows as bytes, "
        f"{2 * MOST_ROWS // rows} connections; the bare loop runs batches of {MOST_ROWS} rows of the "
        f"same archive on the replica's own cores ({len(cores)}). {rounds} rounds of {seconds} s in turn; "
        "medians.",
        rows=(
            Row(
                what="bare loop, as torch loads it", measured=f"{statistics.median(bare['torch']):.1f} rows/s"
            ),
            Row(
                what="bare loop, as a replica loads it",
                measured=f"{statistics.median(bare['replica']):.1f} rows/s",
            ),
            Row(what="through the gateway", measured=f"{statistics.median(served):.1f} rows/s"),
            Row(what="share of the latter", measured=f"{share:.3f}", asked="≥ 0.97", is_met=share >= 0.97),
        ),
        figures={"bare_rows_per_s": bare, "served_rows_per_s": served},
    )


def _bare_rows_per_s(how: str, file: Path, cores: list[int], seconds: int) -> float:
    shape = MOST_ROWS, TOKENS, WIDTH
    values = file, ",".join(map(str, cores)), seconds, ",".join(map(str, shape))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "bare_loop.py"), how, *map(str, values)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(len(cores))},
    )
    return float(done.stdout)
