"""``forescale plan GRAPH.json``: places the nodes of a published cost graph."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forescale.cli.console import console, print_json, table
from forescale.cli.units import percent, size
from forescale.core.errors import InfeasiblePlan, InvalidInput

if TYPE_CHECKING:
    from forescale.plan.placement.place import Placement
    from forescale.plan.placement.problem import PlacementProblem

SUFFIX = ".json"


def place_graph(path: Path, *, accelerators: int | None, contiguous: bool, json: bool) -> None:
    """Reads a graph, places it and shows the result.

    Args:
        accelerators: how many there are, if not as many as the graph says.
    """
    from forescale.plan.placement.place import place

    problem = _read(path)
    if accelerators is not None:
        first, *others = problem.kinds
        problem = replace(problem, kinds=(replace(first, count=accelerators), *others))
    started_s = time.perf_counter()
    try:
        placement = place(problem, contiguous=contiguous)
    except InfeasiblePlan as error:
        if json:
            print_json({"feasible": False, "missing_bytes": error.short_bytes, "reason": str(error)})
        raise
    elapsed_s = time.perf_counter() - started_s
    if json:
        print_json(_as_json(problem, placement, elapsed_s, contiguous=contiguous))
    else:
        _show(problem, placement, elapsed_s, contiguous=contiguous)


def _read(path: Path) -> PlacementProblem:
    from forescale.plan.placement.device_placement import read_device_placement

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read {path}: {error}") from error
    return read_device_placement(text)


def _as_json(
    problem: PlacementProblem, placement: Placement, elapsed_s: float, *, contiguous: bool
) -> dict[str, Any]:
    devices = problem.devices
    return {
        "objective": placement.objective,
        "lower_bound": placement.lower_bound,
        "gap": placement.gap,
        "feasible": True,
        "contiguous": contiguous,
        "assignment": {
            node: devices[device]
            for node, device in zip(problem.nodes, placement.device_N.tolist(), strict=True)
        },
        "loads": dict(zip(devices, placement.load_D.tolist(), strict=True)),
        "memory_bytes": dict(zip(devices, placement.memory_bytes_D.tolist(), strict=True)),
        "elapsed_s": elapsed_s,
        "rationale": [_reason(problem, placement)],
    }


def _show(problem: PlacementProblem, placement: Placement, elapsed_s: float, *, contiguous: bool) -> None:
    shown = table("Placement", "device", ">nodes", ">work", ">transfers", ">load", ">memory")
    counts = [placement.device_N.tolist().count(device) for device in range(len(problem.devices))]
    columns = zip(
        problem.devices,
        counts,
        placement.work_D.tolist(),
        placement.load_D.tolist(),
        placement.memory_bytes_D.tolist(),
        strict=True,
    )
    for device, count, work, load, memory_bytes in columns:
        shown.add_row(
            device, str(count), f"{work:.3f}", f"{load - work:.3f}", f"{load:.3f}", size(memory_bytes)
        )
    out = console()
    out.print(shown)
    kind = "contiguous" if contiguous else "free"
    out.print(
        f"Longest load: {placement.objective:.3f} ({kind}), in the graph's unit of time. None is below "
        f"{placement.lower_bound:.3f}: at most {percent(placement.gap)} could be gained."
    )
    out.print(_reason(problem, placement), markup=False)
    out.print(f"Found in {elapsed_s:.2f} s.")


def _reason(problem: PlacementProblem, placement: Placement) -> str:
    """Which device sets the pace, and what of it is transfers."""
    longest = int(placement.load_D.argmax())
    transfers = float(placement.load_D[longest] - placement.work_D[longest])
    fraction = transfers / placement.objective if placement.objective else 0.0
    return f"{problem.devices[longest]} has the longest load; {percent(fraction)} of it are transfers."
