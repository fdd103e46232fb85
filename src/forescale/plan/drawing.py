"""A plan as a picture: one lane per device, modules as boxes, cut tensors as arrows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

from forescale.graph.cost import cost_table
from forescale.graph.model import ModelGraph
from forescale.graph.size import evaluate, tensor_bytes
from forescale.plan.partition_plan import PartitionPlan, pipeline_positions, replicas
from forescale.plan.problem import Array
from forescale.plan.replicas import microbatch_counts
from forescale.plan.svg import CHARACTER_WIDTH, document, shortened, text
from forescale.plan.wording import SCHEDULE_NAMES, spell_bytes, spell_count, spell_microbatches, spell_time

_LANE_WIDTH, _GAP, _MARGIN = 250, 140, 24
_LEAST_WIDTH = 440
_TITLE_HEIGHT, _HEAD_HEIGHT, _FULL_HEIGHT = 54, 74, 420
_BOX_GAP, _LEAST_BOX, _FEW_BOXES, _MOST_BOXES = 3, 20, 5, 14
_DETOUR = 26
# FLOPs a processor does while it moves one byte: only shares of a stage's predicted time depend on it.
_FLOPS_PER_BYTE = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """Operators of one stage that one label stands for; ``compute_s``: per step."""

    label: str
    operators: tuple[int, ...]
    compute_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """A box in its place: ``y`` of its upper edge, in user units like ``height``."""

    box: _Box
    y: float
    height: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """Everything one stage sends another; ``maker`` and ``reader`` are at the ends of the largest tensor."""

    source: int
    target: int
    names: tuple[str, ...]
    size_bytes: int
    maker: int
    reader: int | None


def draw_svg(graph: ModelGraph, plan: PartitionPlan) -> str:
    """An SVG document, also fit to be put into HTML.

    The height of a box is its part of the stage's predicted time per step, divided among the stage's
    operators by a roofline at the batch the graph was captured with; that batch's are the bytes, too.
    """
    weight_O = _weights(graph)
    boxes = _boxes(graph, plan, weight_O)
    longest_s = max(sum(box.compute_s for box in lane) for lane in boxes) or 1.0
    lanes = [_stack(lane, _FULL_HEIGHT / longest_s) for lane in boxes]
    cuts = _cuts(graph, plan)
    detours = [cut for cut in cuts if cut.target > cut.source + 1]
    bottom = max(lane[-1].y + lane[-1].height for lane in lanes) + 10
    width = max(2 * _MARGIN + len(lanes) * (_LANE_WIDTH + _GAP) - _GAP, _LEAST_WIDTH)
    height = bottom + _DETOUR * len(detours) + _MARGIN
    parts = [
        *_title(plan),
        *(part for stage, lane in enumerate(lanes) for part in _lane(plan, stage, lane, bottom)),
        *(part for cut in cuts if cut not in detours for part in _straight(cut, lanes)),
        *(
            part
            for level, cut in enumerate(detours)
            for part in _detour(cut, lanes, bottom + _DETOUR * (level + 0.6))
        ),
    ]
    devices = len({stage.device for stage in plan.stages})
    summary = f"Plan over {devices} devices, predicted step {spell_time(plan.prediction.step_s)}"
    return document(summary, width, height, parts)


def _weights(graph: ModelGraph) -> Array:
    """Relative time of every operator, forward and backward (Williams et al., roofline, 2009)."""
    costs = cost_table(graph)(graph.example)
    forward_O = np.maximum(costs.forward_flops_O, _FLOPS_PER_BYTE * costs.forward_bytes_O)
    return forward_O + np.maximum(costs.backward_flops_O, _FLOPS_PER_BYTE * costs.backward_bytes_O)


def _boxes(graph: ModelGraph, plan: PartitionPlan, weight_O: Array) -> list[list[_Box]]:
    """Boxes of every stage: modules at the deepest level at which they fit a lane and still tell it apart."""
    deepest = max(operator.module_path.count(".") + 1 for operator in graph.operators)
    chosen: list[list[_Box]] = []
    for depth in range(1, deepest + 1):
        lanes = [_modules(graph, plan, stage, depth, weight_O) for stage in range(len(plan.stages))]
        if max(map(len, lanes)) > _MOST_BOXES and max(map(len, chosen), default=0) >= _FEW_BOXES:
            break
        chosen = lanes
        if max(map(len, lanes)) > _MOST_BOXES:
            break
    return [_merged(lane) for lane in chosen]


def _modules(graph: ModelGraph, plan: PartitionPlan, stage: int, depth: int, weight_O: Array) -> list[_Box]:
    operators = plan.stages[stage].operators
    predicted = plan.prediction.stages[stage]
    total_s = microbatch_counts(plan)[stage] * (predicted.forward_s + predicted.backward_s)
    whole = float(weight_O[list(operators)].sum()) or 1.0
    members: dict[str, list[int]] = {}
    for index in operators:
        path = ".".join(graph.operators[index].module_path.split(".")[:depth])
        members.setdefault(path, []).append(index)
    return [
        _Box(label=path, operators=tuple(o), compute_s=total_s * float(weight_O[o].sum()) / whole)
        for path, o in members.items()
    ]


def _merged(boxes: list[_Box]) -> list[_Box]:
    """Neighbours made one, the smallest first, until the lane is short enough to read."""
    boxes = list(boxes)
    while len(boxes) > _MOST_BOXES:
        sums = [a.compute_s + b.compute_s for a, b in pairwise(boxes)]
        place = sums.index(min(sums))
        first, second = boxes[place : place + 2]
        label = f"{first.label.split(' … ')[0]} … {second.label.split(' … ')[-1]}"
        together = (*first.operators, *second.operators)
        boxes[place : place + 2] = [_Box(label=label, operators=together, compute_s=sums[place])]
    return boxes


def _stack(boxes: Iterable[_Box], units_per_s: float) -> list[_Placed]:
    placed: list[_Placed] = []
    y = float(_TITLE_HEIGHT + _HEAD_HEIGHT)
    for box in boxes:
        height = max(box.compute_s * units_per_s, _LEAST_BOX)
        placed.append(_Placed(box=box, y=y, height=height))
        y += height + _BOX_GAP
    return placed


def _cuts(graph: ModelGraph, plan: PartitionPlan) -> list[_Cut]:
    # One arrow stands for all replicas' and meets the last of them.
    stage_of = {operator: index for index, stage in enumerate(plan.stages) for operator in stage.operators}
    sizes = {
        name: evaluate(tensor_bytes(t.shape, t.dtype), graph.example) for name, t in graph.tensors.items()
    }
    sent: dict[tuple[int, int], dict[str, int | None]] = {}
    for name, tensor in graph.tensors.items():
        if tensor.producer is None:
            continue
        source = stage_of[tensor.producer]
        readers: dict[int, int | None] = {}
        if name in graph.outputs:
            readers[len(plan.stages) - 1] = None  # the loss
        for consumer in reversed(tensor.consumers):
            readers[stage_of[consumer]] = consumer
        for target, reader in readers.items():
            if target != source:
                sent.setdefault((source, target), {})[name] = reader
    return [_cut(graph, ends, readers, sizes) for ends, readers in sorted(sent.items())]


def _cut(
    graph: ModelGraph, ends: tuple[int, int], readers: Mapping[str, int | None], sizes: Mapping[str, int]
) -> _Cut:
    largest = max(readers, key=lambda name: sizes[name])
    maker = graph.tensors[largest].producer
    assert maker is not None, "a batch input is not sent between stages"
    return _Cut(
        source=ends[0],
        target=ends[1],
        names=tuple(readers),
        size_bytes=sum(sizes[name] for name in readers),
        maker=maker,
        reader=readers[largest],
    )


def _title(plan: PartitionPlan) -> list[str]:
    count = plan.microbatches
    run = f"{count} microbatches, {SCHEDULE_NAMES[plan.schedule]}" if count > 1 else "1 microbatch"
    if pipeline_positions(plan.stages)[-1] == 0 and (number := len(replicas(plan.stages))) > 1:
        run = f"{number} replicas, microbatches {spell_microbatches(plan)}"
    return [
        text(_MARGIN, 26, f"Predicted step: {spell_time(plan.prediction.step_s)}", "big"),
        text(_MARGIN, 44, f"{run}; a box's height is its computing time in a step", "soft"),
    ]


def _lane(plan: PartitionPlan, stage: int, placed: Sequence[_Placed], bottom: float) -> list[str]:
    planned, predicted = plan.stages[stage], plan.prediction.stages[stage]
    left, colour = _left(stage), f"k{stage % 4}"
    right, top = left + _LANE_WIDTH - 10, _TITLE_HEIGHT
    busy = min(predicted.busy_s / plan.prediction.step_s, 1.0) if plan.prediction.step_s else 0.0
    rail, rail_y = _LANE_WIDTH - 20, top + 29
    again = ", recomputes" if planned.recompute else ""
    part = f", shard {planned.shard.index + 1} of {len(planned.shard.weights)}" if planned.shard else ""
    return [
        f'<rect class="lane" x="{left}" y="{top}" width="{_LANE_WIDTH}" height="{bottom - top:.1f}" rx="8"/>',
        text(left + 10, top + 20, shortened(planned.device, rail - 80), "name"),
        text(right, top + 20, f"{busy:.0%} busy", "end"),
        f'<rect class="rail" x="{left + 10}" y="{rail_y}" width="{rail}" height="6" rx="3"/>',
        f'<rect class="{colour}" x="{left + 10}" y="{rail_y}" width="{rail * busy:.1f}" height="6" rx="3"/>',
        text(left + 10, top + 54, f"{len(planned.operators)} operators{part}{again}", "soft"),
        text(right, top + 54, spell_bytes(predicted.memory_bytes), "soft end"),
        *(part for box in placed for part in _drawn(box, left, colour)),
    ]


def _drawn(placed: _Placed, left: float, colour: str) -> list[str]:
    box, width = placed.box, _LANE_WIDTH - 20
    label, seconds = box.label or "(the model itself)", spell_time(box.compute_s)
    middle = placed.y + placed.height / 2 + 4
    hint = escape(f"{label}: {len(box.operators)} operators, {seconds} per step")
    room = width - 20 - len(seconds) * CHARACTER_WIDTH
    return [
        f'<rect class="tint {colour}" x="{left + 10}" y="{placed.y:.1f}" width="{width}" '
        f'height="{placed.height:.1f}" rx="4"><title>{hint}</title></rect>',
        text(left + 18, middle, shortened(label, room), ""),
        text(left + width + 2, middle, seconds, "soft end"),
    ]


def _straight(cut: _Cut, lanes: Sequence[Sequence[_Placed]]) -> list[str]:
    """Through the gap between neighbouring lanes."""
    x, y = _left(cut.source) + _LANE_WIDTH, _centre(lanes[cut.source], cut.maker)
    end_x, end_y = _left(cut.target), _centre(lanes[cut.target], cut.reader)
    middle = (x + end_x) / 2
    path = (
        f"M{x - 10},{y:.1f} H{x} C{middle},{y:.1f} {middle},{end_y:.1f} {end_x - 2},{end_y:.1f} H{end_x + 4}"
    )
    lines = (spell_count(len(cut.names), "tensor"), spell_bytes(cut.size_bytes))
    if abs(y - end_y) < 60:
        label_x, label_y = middle, min(y, end_y) - 24
    else:  # on that side of a steep arrow where it leaves more room
        label_x, label_y = middle + 20, (y + end_y) / 2 + (44 if end_y < y else -58)
    return [
        *_arrow(cut, path, end_x + 10, end_y),
        text(label_x, label_y, lines[0], "soft mid"),
        text(label_x, label_y + 14, lines[1], "mid"),
    ]


def _detour(cut: _Cut, lanes: Sequence[Sequence[_Placed]], level_y: float) -> list[str]:
    """Below the lanes between."""
    x, y = _left(cut.source) + _LANE_WIDTH, _centre(lanes[cut.source], cut.maker)
    end_x, end_y = _left(cut.target), _centre(lanes[cut.target], cut.reader)
    out, back = x + 12 + 4 * cut.target, end_x - 12 - 4 * cut.source
    path = f"M{x - 10},{y:.1f} H{out} V{level_y:.1f} H{back} V{end_y:.1f} H{end_x + 4}"
    label = f"{spell_count(len(cut.names), 'tensor')}, {spell_bytes(cut.size_bytes)}"
    return [*_arrow(cut, path, end_x + 10, end_y), text((out + back) / 2, level_y - 5, label, "soft mid")]


def _arrow(cut: _Cut, path: str, tip_x: float, tip_y: float) -> list[str]:
    shown = ", ".join(cut.names[:8]) + (" …" if len(cut.names) > 8 else "")
    tip = f"{tip_x},{tip_y:.1f} {tip_x - 8},{tip_y - 4.5:.1f} {tip_x - 8},{tip_y + 4.5:.1f}"
    return [
        f'<path class="arrow" d="{path}"><title>{escape(shown)}</title></path>',
        f'<polygon class="tip" points="{tip}"/>',
    ]


def _left(stage: int) -> int:
    return _MARGIN + stage * (_LANE_WIDTH + _GAP)


def _centre(lane: Sequence[_Placed], operator: int | None) -> float:
    """Height at which an operator's box has its middle; the loss is at the lane's end."""
    placed = next((p for p in lane if operator in p.box.operators), lane[-1])
    return placed.y + placed.height / 2
