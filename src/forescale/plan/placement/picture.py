"""A placement as a picture: the load of every device, and which nodes of the graph each holds.

Graphs of up to 400 nodes are drawn node by node, tensors as lines; of larger ones, each device's work along
the graph.

Axes: N = node, D = device.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from forescale.plan.placement.place import Placement
from forescale.plan.placement.problem import PlacementProblem, order_of
from forescale.plan.svg import COLOURS, document, shortened, text

_MARGIN, _WIDTH, _NAME_WIDTH, _VALUE_WIDTH = 24, 1000, 96, 90
_TITLE_HEIGHT, _ROW, _BAR = 84, 26, 16
_MOST_NODES, _MOST_DEVICES = 400, 64
_CELL_MOST, _CELL_HEIGHT, _LANE_GAP = 28.0, 12, 6
_COLUMNS, _LANE_HEIGHT = 200, 44
_PLOT = _WIDTH - 2 * _MARGIN - _NAME_WIDTH


def draw_placement(
    problem: PlacementProblem, placement: Placement, *, lower_bound: float | None = None
) -> str:
    """An SVG document, also fit to be put into HTML.

    Of more than 64 devices, those with the longest loads are shown.

    Args:
        lower_bound: if a better one than the placement's is known.
    """
    bound = placement.lower_bound if lower_bound is None else lower_bound
    longest_first = np.argsort(-placement.load_D, kind="stable")[:_MOST_DEVICES]
    shown = sorted(longest_first.tolist())
    rows, bars_bottom = _bars(problem, placement, shown, bound)
    held = [device for device in shown if (placement.device_N == device).any()]
    draw = _graph if len(problem.nodes) <= _MOST_NODES else _profile
    lanes, bottom = draw(problem, placement, held, bars_bottom + 44)
    bottleneck = problem.devices[int(placement.load_D.argmax())]
    measure = "Longest load" if placement.start_N is None else "Latency"
    summary = f"Placement on {len(problem.devices)} devices, {measure.lower()} {placement.objective:.3f}"
    hidden = len(problem.devices) - len(shown)
    rest = f"; {hidden} more devices have shorter loads" if hidden else ""
    where = f"on {bottleneck}" if placement.start_N is None else f"{bottleneck} works longest"
    subtitle = f"{where}, in the graph's unit of time; none is below {bound:.3f}{rest}"
    heading = [
        text(_MARGIN, 26, f"{measure}: {placement.objective:.3f}", "big"),
        text(_MARGIN, 44, subtitle, "soft"),
        f'<rect class="k0" x="{_MARGIN}" y="57" width="12" height="12"/>',
        text(_MARGIN + 18, 67, "work", "soft"),
        f'<rect class="tint k0" x="{_MARGIN + 60}" y="57" width="12" height="12"/>',
        text(_MARGIN + 78, 67, "transfers", "soft"),
    ]
    return document(summary, _WIDTH, bottom + _MARGIN, [*heading, *rows, *lanes])


def _bars(
    problem: PlacementProblem, placement: Placement, shown: Sequence[int], bound: float
) -> tuple[list[str], float]:
    """A bar per device, and where they end."""
    room = _PLOT - _VALUE_WIDTH
    per_unit = room / placement.objective if placement.objective else 0.0
    left = _MARGIN + _NAME_WIDTH
    parts: list[str] = []
    for row, device in enumerate(shown):
        y = _TITLE_HEIGHT + row * _ROW
        load, work = float(placement.load_D[device]), float(placement.work_D[device])
        hint = f"{problem.devices[device]}: {work:.3f} work, {load - work:.3f} transfers"
        split, end = work * per_unit, load * per_unit
        parts += [
            text(_MARGIN, y + 12, shortened(problem.devices[device], _NAME_WIDTH - 8), ""),
            f'<rect class="lane" x="{left}" y="{y}" width="{room}" height="{_BAR}"/>',
            f'<rect class="k{device % COLOURS}" x="{left}" y="{y}" width="{split:.1f}" height="{_BAR}"/>',
            f'<rect class="tint k{device % COLOURS}" x="{left + split:.1f}" y="{y}" '
            f'width="{end - split:.1f}" height="{_BAR}"><title>{escape(hint)}</title></rect>',
            text(_WIDTH - _MARGIN, y + 12, f"{load:.3f}", "end"),
        ]
    bottom = _TITLE_HEIGHT + len(shown) * _ROW
    at = left + bound * per_unit
    parts += [
        f'<path class="bound" d="M{at:.1f},{_TITLE_HEIGHT - 6} V{bottom}"/>',
        text(at, bottom + 12, "lower bound", "soft end"),
    ]
    return parts, bottom + 12


def _graph(
    problem: PlacementProblem, placement: Placement, held: Sequence[int], top: float
) -> tuple[list[str], float]:
    """Nodes by depth from left to right, in a lane per device."""
    depth_N = _depths(problem)
    cell = min(_PLOT / (max(depth_N) + 1), _CELL_MOST)
    centre_N = [(0.0, 0.0)] * len(depth_N)
    lanes, nodes = [], []
    y = top
    for device in held:
        stacked: dict[int, int] = {}
        for node in np.flatnonzero(placement.device_N == device).tolist():
            level = stacked[depth_N[node]] = stacked.get(depth_N[node], -1) + 1
            x = _MARGIN + _NAME_WIDTH + depth_N[node] * cell
            box_y = y + _LANE_GAP + level * _CELL_HEIGHT
            centre_N[node] = x + cell / 2, box_y + _CELL_HEIGHT / 2 - 1
            time = float(problem.work_KN[problem.kind_D[device], node])
            hint = escape(f"node {problem.nodes[node]} on {problem.devices[device]}: {time:.4g}")
            nodes.append(
                f'<rect class="k{device % COLOURS}" x="{x:.1f}" y="{box_y:.1f}" width="{0.85 * cell:.1f}" '
                f'height="{_CELL_HEIGHT - 2}" rx="2"><title>{hint}</title></rect>'
            )
        height = (max(stacked.values()) + 1) * _CELL_HEIGHT + 2 * _LANE_GAP
        lanes += _lane(problem.devices[device], y, height)
        y += height + _LANE_GAP
    edges = [
        f'<path class="edge{" across" if placement.device_N[a] != placement.device_N[b] else ""}" '
        f'd="M{centre_N[a][0]:.1f},{centre_N[a][1]:.1f} L{centre_N[b][0]:.1f},{centre_N[b][1]:.1f}"/>'
        for a, b in problem.edges
        if centre_N[a] != (0.0, 0.0) != centre_N[b]
    ]
    note = "Every node at its depth in the graph, in the lane of its device; lines are tensors"
    return [text(_MARGIN, top - 12, note, "soft"), *lanes, *edges, *nodes], y


def _profile(
    problem: PlacementProblem, placement: Placement, held: Sequence[int], top: float
) -> tuple[list[str], float]:
    """Each device's work along a topological order, as columns."""
    count = len(problem.nodes)
    column_N = np.empty(count, dtype=np.int64)
    column_N[order_of(count, problem.edges, problem.nodes)] = np.arange(count) * _COLUMNS // count
    work_N = problem.work_KN[problem.kind_D[placement.device_N], np.arange(count)]
    work_DC = np.zeros((len(problem.devices), _COLUMNS))
    np.add.at(work_DC, (placement.device_N, column_N), work_N)
    width = _PLOT / _COLUMNS
    lanes: list[str] = []
    y = top
    for device in held:
        lanes += _lane(problem.devices[device], y, _LANE_HEIGHT)
        most = float(work_DC[device].max()) or 1.0
        steps = "".join(
            f"V{y + _LANE_HEIGHT - work / most * (_LANE_HEIGHT - 4):.1f} h{width:.2f}"
            for work in work_DC[device].tolist()
        )
        start = f"M{_MARGIN + _NAME_WIDTH},{y + _LANE_HEIGHT:.1f}"
        lanes.append(f'<path class="k{device % COLOURS}" d="{start} {steps} V{y + _LANE_HEIGHT:.1f} Z"/>')
        y += _LANE_HEIGHT + _LANE_GAP
    note = f"Work of each device along the graph's {count:,} nodes, from first to last, each to its own scale"
    return [text(_MARGIN, top - 12, note, "soft"), *lanes], y


def _lane(name: str, y: float, height: float) -> list[str]:
    left = _MARGIN + _NAME_WIDTH - 4
    return [
        text(_MARGIN, y + height / 2 + 4, shortened(name, _NAME_WIDTH - 12), ""),
        f'<rect class="lane" x="{left}" y="{y:.1f}" width="{_PLOT + 8}" height="{height:.1f}" rx="4"/>',
    ]


def _depths(problem: PlacementProblem) -> list[int]:
    """Edges on the longest path to each node; what nothing leads to stands just before its first reader."""
    count = len(problem.nodes)
    depth_N = [0] * count
    readers: list[list[int]] = [[] for _ in range(count)]
    for source, target in problem.edges:
        readers[source].append(target)
    for node in order_of(count, problem.edges, problem.nodes):
        for reader in readers[node]:
            depth_N[reader] = max(depth_N[reader], depth_N[node] + 1)
    for node, depth in enumerate(depth_N):
        if not depth and readers[node]:
            depth_N[node] = min(depth_N[reader] for reader in readers[node]) - 1
    return depth_N
