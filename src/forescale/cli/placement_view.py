"""A placement as a person reads it, and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from forescale.cli.console import console, status, table
from forescale.cli.placement import Placed
from forescale.cli.units import percent, size

if TYPE_CHECKING:
    from rich.console import Console

    from forescale.plan.placement.baselines import Compared
    from forescale.plan.placement.place import Placement
    from forescale.plan.placement.problem import PlacementProblem

_MOST_REPLANNED = 5000
"""Nodes beyond which planning six times more would be waited for."""
_SHOWN_DEVICES = 64
_WORTH_SAYING = 0.001


def as_json(placed: Placed) -> dict[str, Any]:
    problem, placement = placed.problem, placed.placement
    devices = problem.devices
    result: dict[str, Any] = {
        "objective": placement.objective,
        "minimised": _minimised(placed),
        "lower_bound": placement.lower_bound,
        "gap": placement.gap,
        "feasible": True,
        "contiguous": placed.contiguous,
        "assignment": {
            node: devices[device]
            for node, device in zip(problem.nodes, placement.device_N.tolist(), strict=True)
        },
        "loads": dict(zip(devices, placement.load_D.tolist(), strict=True)),
        "memory_bytes": dict(zip(devices, placement.memory_bytes_D.tolist(), strict=True)),
        "elapsed_s": placed.elapsed_s,
        "rationale": _reasons(placed),
    }
    if placement.start_N is not None:
        result["starts"] = dict(zip(problem.nodes, placement.start_N.tolist(), strict=True))
    if placed.certificate is not None:
        result["proven_optimal"] = placed.certificate.proven_optimal
        result["certify_s"] = placed.certificate.elapsed_s
    if placed.compared is not None:
        result["compared"] = [
            {"name": row.name, "objective": row.objective, "ratio": row.ratio, "fault": row.fault}
            for row in placed.compared
        ]
    return result


def show(placed: Placed) -> None:
    out = console()
    out.print(_devices_table(placed))
    for reason in _reasons(placed):
        out.print(reason, markup=False, soft_wrap=True)
    out.print(f"Found in {placed.elapsed_s:.2f} s.")
    if placed.compared is not None:
        _show_compared(out, placed.compared, _minimised(placed))
    if placed.placement.start_N is None:
        _show_improvements(out, placed)


def _devices_table(placed: Placed) -> Any:
    problem, placement = placed.problem, placed.placement
    times = (">work", ">transfers", ">load") if placement.start_N is None else (">busy", ">from", ">to")
    shown = table("Placement", "device", ">nodes", *times, ">memory")
    longest_first = sorted(range(len(problem.devices)), key=lambda device: -placement.load_D[device])
    counts = [0] * len(problem.devices)
    for device in placement.device_N.tolist():
        counts[device] += 1
    for device in sorted(longest_first[:_SHOWN_DEVICES]):
        shown.add_row(
            problem.devices[device],
            f"{counts[device]:,}",
            *(f"{time:.3f}" for time in _times(problem, placement, device)),
            size(float(placement.memory_bytes_D[device])),
        )
    if (hidden := len(problem.devices) - _SHOWN_DEVICES) > 0:
        shown.caption = f"{hidden} more devices have shorter loads."
    return shown


def _times(problem: PlacementProblem, placement: Placement, device: int) -> tuple[float, float, float]:
    """Work, transfers and load; for latency, work, and when its first node starts and its last one ends."""
    work, load = float(placement.work_D[device]), float(placement.load_D[device])
    if placement.start_N is None:
        return work, load - work, load
    held = np.flatnonzero(placement.device_N == device)
    if not len(held):
        return 0.0, 0.0, 0.0
    end_N = placement.start_N[held] + problem.work_KN[problem.kind_D[device], held]
    return work, float(placement.start_N[held].min()), float(end_N.max())


def _reasons(placed: Placed) -> list[str]:
    """How good it is, and which device sets the pace."""
    from forescale.plan.placement.improvements import bottleneck

    placement, certificate = placed.placement, placed.certificate
    if placement.start_N is not None:
        return _latency_reasons(placed)
    kind = "contiguous" if placed.contiguous else "free"
    found = f"Longest load: {placement.objective:.3f} ({kind}), in {placed.time_unit}."
    if certificate is not None and certificate.proven_optimal:
        bound = "No placement is shorter: proven."
    elif certificate is not None and certificate.note:
        bound = f"{_gap(placed)} ({certificate.note})"
    else:
        bound = _gap(placed)
    improved = certificate is not None and certificate.device_N is not None
    slowest = bottleneck(placed.problem, placement)
    transfers = slowest.transfers / placement.objective if placement.objective else 0.0
    full = (
        f", and {percent(slowest.memory_fraction)} of its memory is full" if slowest.memory_fraction else ""
    )
    return [
        f"{found} {bound}" + " The solver found it." * improved,
        f"{slowest.device} has the longest load; {percent(transfers)} of it are transfers{full}.",
    ]


def _latency_reasons(placed: Placed) -> list[str]:
    placement, problem = placed.placement, placed.problem
    kind = "contiguous" if placed.contiguous else "free"
    used = int((placement.work_D > 0).sum())
    return [
        f"Latency: {placement.objective:.3f} ({kind}), in {placed.time_unit}: one sample through the graph, "
        f"with nothing else there. {_gap(placed)}",
        f"{used} of {len(problem.devices)} devices work; the busiest does for "
        f"{percent(placement.work_D.max() / (placement.objective or 1.0))} of that time.",
    ]


def _minimised(placed: Placed) -> str:
    return "longest load" if placed.placement.start_N is None else "latency"


def _gap(placed: Placed) -> str:
    placement = placed.placement
    return f"None is below {placement.lower_bound:.3f}: at most {100 * placement.gap:.1f}% could be gained."


def _show_compared(out: Console, compared: tuple[Compared, ...], minimised: str) -> None:
    shown = table("Compared", "planner", f">{minimised}", ">of ours", "fault")
    for row in compared:
        shown.add_row(
            row.name,
            "-" if row.objective is None else f"{row.objective:.3f}",
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            row.fault or "",
        )
    out.print(shown)
    if not any(row.name == "METIS" for row in compared):
        out.print("METIS: pip install 'forescale[plan]'", markup=False)


def _show_improvements(out: Console, placed: Placed) -> None:
    from forescale.plan.placement.improvements import what_would_help

    if len(placed.problem.nodes) > _MOST_REPLANNED:
        return
    with status() as say:
        say("planning for better devices and links")
        found = what_would_help(placed.problem, placed.placement)
    helping = [improvement for improvement in found if improvement.gain >= _WORTH_SAYING]
    if not helping:
        out.print("No single faster link, device more, or more memory was found to help.")
        return
    shown = table("What would help most", "change", ">longest load", ">shorter by", ">at most")
    for improvement in helping:
        shown.add_row(
            improvement.change,
            f"{improvement.objective:.3f}",
            f"{100 * improvement.gain:.1f}%",
            f"{100 * improvement.most:.1f}%",
        )
    out.print(shown)
