"""Whether requests fail while replicas or the controller are killed and versions change."""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
from serving_arrivals import Answer, Kind, Traffic, post, statuses
from serving_models import PIXELS, pixels, v2_body
from serving_results import Row, Section
from serving_throughput import Bench, mlp_site

from serving_processes import Site, wait_until

_PER_S = 200
_SETTLING_S = 30.0
_KINDS = (Kind(name="mlp", share=1.0, request=post("/v2/models/mlp/infer", v2_body(pixels(), (1, PIXELS)))),)
_HOW = f"The MLP with two replicas; Poisson arrivals, {_PER_S} a second, over connections that are kept. "


def killed_replicas(bench: Bench) -> Section:
    """kill -9 of a random replica that serves, every 2 s."""
    seconds = 10 if bench.is_quick else 60
    rng = np.random.default_rng(0)
    kills = unserved = 0
    with mlp_site(bench, "killed", min_replicas=2) as site:
        start_s = time.monotonic()
        with Traffic(site.port, _KINDS, per_s=_PER_S) as traffic:
            while (left_s := seconds - (time.monotonic() - start_s)) > 0:
                serving = site.replicas("mlp")
                unserved += not serving
                if serving:
                    serving[int(rng.integers(len(serving)))].send_signal(signal.SIGKILL)
                    kills += 1
                time.sleep(min(2.0, left_s))
        lost = sum(event["kind"] == "replica_lost" for event in site.client.events())
    return Section(
        title="Killed replicas",
        how=_HOW + f"For {seconds} s, every 2 s one of those that serve is killed with SIGKILL.",
        rows=(
            Row(
                what="replicas killed",
                measured=f"{kills}, noticed {lost}" + (f"; {unserved} times none served" if unserved else ""),
            ),
            *_outcome(traffic.answers),
        ),
        figures={"statuses": statuses(traffic.answers), "kills": kills},
    )


def killed_controller(bench: Bench) -> Section:
    """kill -9 of the controller, and a new one on the same state."""
    repeats = 1 if bench.is_quick else 3
    kept = 0
    with mlp_site(bench, "controller", min_replicas=2) as site:
        if site.gateway().pid == site.controller.pid:
            raise RuntimeError("controller and gateway are one process: its death is an outage")
        before = _whole(site)
        with Traffic(site.port, _KINDS, per_s=_PER_S) as traffic:
            for _ in range(repeats):
                time.sleep(2)
                site.controller.send_signal(signal.SIGKILL)
                site.controller.wait(10)
                time.sleep(3)
                site.start()
                wait_until(lambda: _serves(site), "all is known again", 30, site.controller)
                kept += _whole(site) == before
            time.sleep(2)
    return Section(
        title="A killed controller",
        how=_HOW + f"{repeats} times: SIGKILL to the controller, 3 s without one, then a new one on the same "
        "state folder. Whole: models, versions, deployments, replicas and their processes are the same.",
        rows=(
            *_outcome(traffic.answers),
            Row(
                what="state whole after the restart",
                measured=f"{kept} of {repeats} times",
                asked="always",
                is_met=kept == repeats,
            ),
        ),
        figures={"statuses": statuses(traffic.answers)},
    )


def _serves(site: Site) -> bool:
    return all(one["state"] == "serving" for one in site.client.deployments()) and bool(site.replicas("mlp"))


def _whole(site: Site) -> object:
    deployments = site.client.deployments()
    return (
        site.client.model("mlp")["versions"],
        [(one["model"], one["version"]) for one in deployments],
        sorted((each["name"], each["process"]) for one in deployments for each in one["replicas"]),
        sorted(process.pid for process in site.replicas("mlp")),
    )


CHANGES = {
    "rolling update to 2": ("2", ("deploy mlp@2 --min 2 --wait",)),
    "canary of 3, promoted by itself": (
        "3",
        ("deploy mlp@3 --canary 50% --stage-s 3 --proof-s 2 --min-requests 50 --max-slowdown 5 --wait",),
    ),
    "canary of 4, rolled back": ("3", ("deploy mlp@4 --canary 50% --stage-s 300", "rollback mlp")),
    "blue-green to 4": (
        "4",
        ("deploy mlp@4 --blue-green --proof-s 3 --min-requests 50 --max-slowdown 5 --wait",),
    ),
    "rolled back from 4": ("3", ("rollback mlp",)),
}
"""What is done, and which version answers afterwards."""


def version_changes(bench: Bench) -> Section:
    """Rolling update, canary and promotion, canary and rollback, blue-green and rollback."""
    rows: list[Row] = []
    figures: dict[str, object] = {}
    body = v2_body(pixels(), (1, PIXELS))
    with mlp_site(bench, "changes", min_replicas=2) as site:
        for _ in range(3):
            site.add("mlp", bench.folder / "mlp.pt2")
        for what, (wanted, steps) in CHANGES.items():
            bench.say(f"version changes: {what}")
            with Traffic(site.port, _KINDS, per_s=_PER_S) as traffic:
                for step in steps:
                    time.sleep(1)
                    site.run(*step.split())
                    time.sleep(5)
                version = _settled(site, body, wanted)
            rows += _outcome(traffic.answers, what)
            rows.append(
                Row(
                    what="... answered by versions",
                    measured=f"{_by_version(traffic.answers)}; in the end {version}",
                    asked=f"in the end {wanted}",
                    is_met=version == wanted,
                )
            )
            figures[what] = statuses(traffic.answers)
    return Section(
        title="Changes of version",
        how=_HOW + "Each change by the commands of the CLI; 1 s of traffic before each, 5 s after.",
        rows=tuple(rows),
        figures=figures,
    )


def _settled(site: Site, body: bytes, wanted: str) -> str:
    """The version that answers, which may become the wanted one for a while yet."""
    deadline_s = time.monotonic() + _SETTLING_S
    while (version := str(site.ask("mlp", body)["model_version"])) != wanted:
        if time.monotonic() > deadline_s:
            break
        time.sleep(0.1)
    return version


def _by_version(answers: Sequence[Answer]) -> str:
    found = Counter(
        version[1] for answer in answers if (version := re.search(rb'"model_version":"(\d+)"', answer.body))
    )
    shares = (f"{int(version)}: {count / found.total():.0%}" for version, count in sorted(found.items()))
    return ", ".join(shares)


def _outcome(answers: Sequence[Answer], what: str = "") -> list[Row]:
    failed = [answer for answer in answers if answer.status != 200]
    latencies_s = [answer.latency_s for answer in answers if answer.status == 200] or [float("nan")]
    found = f" ({', '.join(f'{n} x {status}' for status, n in statuses(failed).items())})" if failed else ""
    median_s, most_s = np.quantile(latencies_s, (0.5, 0.99))
    return [
        Row(
            what=f"{what}: failed requests" if what else "failed requests",
            measured=f"{len(failed)} of {len(answers):,}{found}; median {median_s * 1e3:.1f} ms, "
            f"99% {most_s * 1e3:.0f} ms, longest {max(latencies_s) * 1e3:.0f} ms",
            asked="0",
            is_met=not failed,
        )
    ]
