"""One of two equal shards of a whole model, to be timed without the other.

Half the channels take a kernel more than half the time, and how much more no model of it says.

Axes: O = operator of the whole graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from forescale.graph.capture import CapturedModel
from forescale.graph.sharding import Sharded, Slice, shard_operators
from forescale.profile.measurement import Array, OperatorMeasurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """The first of two shards that run all operators; what it would get of the other is made up.

    Attributes:
        captured: its operators with its parts of the state.
        shard: what they are of the whole model.
    """

    captured: CapturedModel
    shard: Sharded

    @classmethod
    def of(cls, captured: CapturedModel) -> Half | None:
        """None if no operator can be split."""
        graph = captured.graph
        shard = shard_operators(graph, range(len(graph.operators)), 0, (1, 1), graph.outputs)
        if not shard.slices:
            return None
        state = {
            name: _cut(value, shard.slices[name]) if name in shard.slices else value
            for name, value in captured.state.items()
        }
        return cls(
            captured=replace(
                captured, graph=shard.graph, state=state, modules={**captured.modules, **_ALONE}
            ),
            shard=shard,
        )

    def unsplit_O(self, whole: OperatorMeasurement, half: OperatorMeasurement) -> Array:
        """Which part of an operator's seconds a shard of it spends however small its part is.

        Args:
            whole, half: the same microbatch, measured with the model and with ``captured``.
        """
        unsplit_O = np.zeros(len(whole.forward_s_O))
        whole_s_O = whole.forward_s_O + whole.backward_s_O
        for index, origin in enumerate(self.shard.origin_O):
            fraction = self.shard.fraction_O[index]
            if origin >= 0 and fraction < 1 and whole_s_O[origin] > 0:
                ratio = (half.forward_s_O[index] + half.backward_s_O[index]) / whole_s_O[origin]
                unsplit_O[origin] = (ratio - fraction) / (1 - fraction)
        return np.clip(unsplit_O, 0.0, 1.0)


def _cut(value: torch.Tensor, part: Slice) -> torch.Tensor:
    split = value.unflatten(part.axis, (part.outer, part.units, part.inner))
    own = split.narrow(part.axis + 1, part.start, part.stop - part.start)
    return own.flatten(part.axis, part.axis + 2).contiguous()


def _gather(own: torch.Tensor, axis: int, outer: int, inner: int, bounds: Sequence[int]) -> torch.Tensor:
    split = own.unflatten(axis, (outer, -1))
    others = (bounds[-1] - bounds[1]) * inner
    shape = [*own.shape[:axis], outer, others, *own.shape[axis + 1 :]]
    return torch.cat([split, own.new_zeros(shape)], axis + 1).flatten(axis, axis + 1)


def _part(whole: torch.Tensor, axis: int, outer: int, inner: int, bounds: Sequence[int]) -> torch.Tensor:
    split = whole.unflatten(axis, (outer, -1))
    return split.narrow(axis + 1, 0, bounds[1] * inner).flatten(axis, axis + 1).clone()


_ALONE: Mapping[str, Any] = {
    "collective:spread": lambda x: x.view_as(x),
    "collective:total": torch.clone,
    "collective:gather": _gather,
    "collective:part": _part,
}
