"""What many requests and many models cost the gateway, and how soon a replica is there."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Generator
from typing import Any

import psutil
import torch
from serving_load import wrk
from serving_models import PIXELS, pixels, save, v2_body
from serving_results import Row, Section
from serving_throughput import MANY, Bench, mlp_site
from torch import nn

from serving_processes import Site, wait_until

_IDLE_S = 60.0  # after which a model that may have no replicas has none
_BODY = v2_body(pixels(), (1, PIXELS))


def memory(bench: Bench) -> Section:
    """The gateway's resident memory over a million requests."""
    wanted, seconds = (40_000, 2) if bench.is_quick else (1_000_000, 10)
    sizes: list[tuple[int, float]] = []
    with mlp_site(bench, "memory") as site:
        gateway = site.gateway()
        done = 0
        while done < wanted:
            done += wrk(site.infer_url("mlp"), _BODY, connections=MANY, seconds=seconds).requests
            sizes.append((done, gateway.memory_info().rss / 1e6))
            bench.say(f"memory: {done:,} requests, {sizes[-1][1]:.1f} MB")
    # From a tenth on: pools of the allocator and of the server are as large as they get by then.
    first = next(size for size in sizes if size[0] >= wanted / 10)
    grown_mb = sizes[-1][1] - first[1]
    per_million_mb = grown_mb / max(1, sizes[-1][0] - first[0]) * 1e6
    is_flat = grown_mb <= max(1.0, 0.01 * first[1])
    return Section(
        title="Memory of the gateway",
        how=f"Resident memory of the process that listens, while wrk sends it the MLP's requests over {MANY} "
        "connections. Flat: it grows by no more than 1% from the first tenth of the requests on.",
        rows=(
            Row(what=f"after {first[0]:,} requests", measured=f"{first[1]:.1f} MB"),
            Row(
                what=f"after {sizes[-1][0]:,} requests",
                measured=f"{sizes[-1][1]:.1f} MB ({grown_mb:+.1f} MB)",
                asked="flat",
                is_met=is_flat,
            ),
        ),
        figures={"requests_and_mb": sizes, "mb_per_million": per_million_mb},
    )


def many_models(bench: Bench) -> Section:
    """Throughput of a model that is alone, and of the same among a thousand that sleep."""
    others, seconds, rounds = (20, 1, 1) if bench.is_quick else (999, 4, 4)
    small = save(nn.Linear(8, 2).eval(), torch.zeros(2, 8), bench.folder / "small.pt2")
    per_s: dict[str, list[float]] = {"alone": [], "among others": []}
    with mlp_site(bench, "alone") as alone, mlp_site(bench, "among") as among:
        start_s = time.monotonic()
        for number in range(others):
            among.add(f"m{number}", small)
            among.client.deploy(f"m{number}", 1, min_replicas=0, max_replicas=1)
        added_s = time.monotonic() - start_s
        bench.say(f"many models: {others} added and deployed in {added_s:.0f} s; waiting until they sleep")
        wait_until(lambda: _sleeping(among) >= others, "they sleep", 5 * _IDLE_S, among.controller, every_s=2)
        among.settle()
        gateway_mb = among.gateway().memory_info().rss / 1e6
        for _ in range(rounds):
            for name, site, other in (("alone", alone, among), ("among others", among, alone)):
                with suspended(other):
                    wrk(site.infer_url("mlp"), _BODY, connections=MANY, seconds=1)
                    load = wrk(site.infer_url("mlp"), _BODY, connections=MANY, seconds=seconds)
                    per_s[name].append(load.per_s)
    medians = {name: statistics.median(values) for name, values in per_s.items()}
    cost = 1 - medians["among others"] / medians["alone"]
    return Section(
        title="A thousand models",
        how=f"Two servers with the MLP, one of them with {others} more models deployed that sleep; {rounds} "
        f"rounds of {seconds} s in turn, the other server suspended meanwhile; medians.",
        rows=(
            Row(what="alone", measured=f"{medians['alone']:,.0f} requests/s"),
            Row(
                what=f"with {others} others",
                measured=f"{medians['among others']:,.0f} requests/s, gateway of {gateway_mb:.0f} MB",
            ),
            Row(what="cost", measured=f"{cost:.1%}", asked="< 5%", is_met=cost < 0.05),
            Row(what="adding and deploying one of them", measured=f"{added_s / others * 1e3:.0f} ms"),
        ),
        figures={"per_s": per_s, "gateway_mb": gateway_mb},
    )


def starts(bench: Bench) -> Section:
    """From the order for one more replica until it serves, and a sleeping model's first request."""
    repeats = 2 if bench.is_quick else 5
    sleepers = [f"sleeper{number}" for number in range(repeats)]
    with mlp_site(bench, "starts") as site:
        for name in sleepers:
            site.add(name, bench.folder / "mlp.pt2")
            site.deploy(name, min_replicas=0, max_replicas=1)
        site.settle()
        more_s: list[float] = []
        for _ in range(repeats):
            start_s = time.perf_counter()
            site.deploy("mlp", min_replicas=2)
            wait_until(lambda: len(site.replicas("mlp")) == 2, "two serve", 60, site.controller)
            more_s.append(time.perf_counter() - start_s)
            site.deploy("mlp", min_replicas=1)
            wait_until(lambda: len(site.replicas("mlp")) == 1, "one serves", 60, site.controller)
            site.settle()
        bench.say("starts: waiting until models sleep")
        wait_until(
            lambda: _sleeping(site) >= repeats, "they sleep", 2 * _IDLE_S, site.controller, every_s=0.5
        )
        first_s: list[float] = []
        for name in sleepers:
            site.settle()
            start_s = time.perf_counter()
            site.ask(name, _BODY)
            first_s.append(time.perf_counter() - start_s)
    return Section(
        title="Until a replica serves",
        how=f"The MLP, with warm spares there; {repeats} times each, medians and the worst.",
        rows=(
            _seconds_row("from the order for a second replica until it serves", more_s, 1.0),
            _seconds_row("first request to a model scaled to zero", first_s, 1.5),
        ),
        figures={"scale_up_s": more_s, "first_request_s": first_s},
    )


def _seconds_row(what: str, seconds: list[float], limit_s: float) -> Row:
    median_s = statistics.median(seconds)
    return Row(
        what=what,
        measured=f"{median_s:.2f} s (at most {max(seconds):.2f} s)",
        asked=f"< {limit_s:g} s",
        is_met=median_s < limit_s,
    )


def _sleeping(site: Site) -> int:
    """Models that want no replica and have none."""
    found: list[dict[str, Any]] = site.client.deployments()
    return sum(one["scaling"]["wanted"] == 0 and not one["replicas"] for one in found)


@contextlib.contextmanager
def suspended(site: Site) -> Generator[None]:
    """A server that does nothing meanwhile, not even on its own account."""
    family = site.family()
    for process in family:
        process.suspend()
    try:
        yield
    finally:
        for process in reversed(family):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
