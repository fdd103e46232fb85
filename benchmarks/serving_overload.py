"""Twice what a replica can do, for a minute, in three classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from serving_arrivals import Answer, Kind, offer, post, statuses
from serving_load import wrk
from serving_models import WIDTH, encoder, save, v2_binary_body
from serving_results import Row, Section
from serving_throughput import Bench

from serving_processes import Site

TARGET_S = 0.5
CLASSES = {"first": (1, 0.2), "second": (2, 0.3), "last": (3, 0.5)}
"""Priority and share of all requests."""

LAYERS, TOKENS = 4, 32
TOLD_S = 0.005


def overload(bench: Bench) -> Section:
    seconds = 10 if bench.is_quick else 60
    file = save(encoder(LAYERS), torch.zeros(2, TOKENS, WIDTH), bench.folder / "encoder.pt2")
    x = np.random.default_rng(0).standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
    with Site(bench.processes, "overload") as site:
        site.add("encoder", file)
        site.deploy("encoder", min_replicas=1, max_replicas=1, latency_ms=TARGET_S * 1e3)
        site.settle()
        bench.say("overload: what one replica can do")
        body, json_bytes = v2_binary_body(x, binary_data_output=True)
        header = {"Inference-Header-Content-Length": str(json_bytes)}
        able = wrk(site.infer_url("encoder"), body, connections=64, seconds=5, headers=header)
        bench.say(f"overload: {2 * able.per_s:.0f} requests/s for {seconds} s")
        kinds = [_kind(name, x, *properties) for name, properties in CLASSES.items()]
        answers = offer(site.port, kinds, per_s=2 * able.per_s, seconds=seconds)
    rows = [
        Row(what="one replica at full load", measured=f"{able.per_s:.0f} requests/s"),
        Row(what="offered", measured=f"{len(answers) / seconds:.0f} requests/s"),
        *(_class_row(name, [answer for answer in answers if answer.kind == name]) for name in CLASSES),
    ]
    rows += _refusals([answer for answer in answers if answer.status == 503])
    others = [answer for answer in answers if answer.status not in (200, 503)]
    rows.append(
        Row(
            what="answers that are neither 200 nor 503",
            measured=str(len(others)),
            asked="0",
            is_met=not others,
        )
    )
    lag_ms = 1e3 * float(np.quantile([answer.lag_s for answer in answers], 0.99))
    return Section(
        title="Twice the load that can be served",
        how=f"Encoder, {LAYERS} layers of width {WIDTH}, {TOKENS} tokens a row, one replica with one thread; "
        f"Poisson arrivals for {seconds} s, each with a timeout of {TARGET_S * 1e3:.0f} ms as target, which "
        f"is also the deployment's latency; 99% of the requests were sent at most {lag_ms:.1f} ms late.",
        rows=tuple(rows),
        figures={
            "able_per_s": able.per_s,
            "statuses": {
                name: statuses([answer for answer in answers if answer.kind == name]) for name in CLASSES
            },
        },
    )


def _kind(name: str, x: np.ndarray, priority: int, share: float) -> Kind:
    body, json_bytes = v2_binary_body(
        x, priority=priority, timeout=round(TARGET_S * 1e6), binary_data_output=True
    )
    header = f"Inference-Header-Content-Length: {json_bytes}"
    return Kind(name=name, share=share, request=post("/v2/models/encoder/infer", body, [header]))


def _class_row(name: str, answers: Sequence[Answer]) -> Row:
    ok_s = [answer.latency_s for answer in answers if answer.status == 200]
    share = sum(latency_s <= TARGET_S for latency_s in ok_s) / max(1, len(answers))
    p99 = f", 99% of the answers within {np.quantile(ok_s, 0.99) * 1e3:.0f} ms" if ok_s else ""
    is_top = name == next(iter(CLASSES))
    return Row(
        what=f"class {CLASSES[name][0]} ({CLASSES[name][1]:.0%} of the requests): in time",
        measured=f"{share:.2%} of {len(answers):,}{p99}",
        asked="≥ 99%" if is_top else "",
        is_met=share >= 0.99 if is_top else None,
    )


def _refusals(refused: Sequence[Answer]) -> list[Row]:
    if not refused:
        return [Row(what="refused", measured="none", is_met=None)]
    times_s = np.array([answer.latency_s for answer in refused])
    at_once = [answer for answer in refused if b"too much to do" in answer.body]
    told = float(np.mean(times_s <= TOLD_S))
    rows = [
        Row(
            what="refused ones told within 5 ms",
            measured=f"{told:.1%} of {len(refused):,}; median {np.median(times_s) * 1e3:.1f} ms, "
            f"99% {np.quantile(times_s, 0.99) * 1e3:.1f} ms",
            asked="all",
            is_met=told == 1.0,
        )
    ]
    if at_once:
        early_s = np.array([answer.latency_s for answer in at_once])
        rows.append(
            Row(
                what="of these, refused when they came",
                measured=f"{len(at_once) / len(refused):.1%}; median {np.median(early_s) * 1e3:.1f} ms, "
                f"99% {np.quantile(early_s, 0.99) * 1e3:.1f} ms",
            )
        )
    return rows
