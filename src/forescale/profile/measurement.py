"""What was measured on one device kind for one size of microbatch. Plain numbers: JSON, no torch.

Axes: O = operator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from forescale.graph.peak import Growth, KernelWorkspace, LossMemory

Array = npt.NDArray[np.float64]

_PHASES = ("forward", "backward", "kept")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorMeasurement:
    """One microbatch on one device at full speed.

    Attributes:
        binding: the graph's symbols in that microbatch.
        forward_s_O, backward_s_O: seconds of every operator; they add up to the measured whole pass.
        input_s_O, weight_s_O: seconds of the backward in two parts: what earlier operators wait for, and
            gradients of parameters that can be computed later (0 where none can).
        loss_saved_bytes: memory the loss keeps for its backward beside the model's outputs.
    """

    binding: Mapping[str, int]
    forward_s_O: Array
    backward_s_O: Array
    input_s_O: Array
    weight_s_O: Array
    loss_forward_s: float
    loss_backward_s: float
    loss_saved_bytes: float

    @property
    def total_s(self) -> float:
        """Seconds of the microbatch, forward and backward, loss included."""
        operators_s = float(self.forward_s_O.sum() + self.backward_s_O.sum())
        return operators_s + self.loss_forward_s + self.loss_backward_s

    def to_json(self) -> dict[str, Any]:
        return {
            "binding": dict(self.binding),
            "forward_s_O": self.forward_s_O.tolist(),
            "backward_s_O": self.backward_s_O.tolist(),
            "input_s_O": self.input_s_O.tolist(),
            "weight_s_O": self.weight_s_O.tolist(),
            "loss_forward_s": self.loss_forward_s,
            "loss_backward_s": self.loss_backward_s,
            "loss_saved_bytes": self.loss_saved_bytes,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> OperatorMeasurement:
        return cls(
            binding=value["binding"],
            forward_s_O=np.asarray(value["forward_s_O"], dtype=np.float64),
            backward_s_O=np.asarray(value["backward_s_O"], dtype=np.float64),
            input_s_O=np.asarray(value["input_s_O"], dtype=np.float64),
            weight_s_O=np.asarray(value["weight_s_O"], dtype=np.float64),
            loss_forward_s=value["loss_forward_s"],
            loss_backward_s=value["loss_backward_s"],
            loss_saved_bytes=value["loss_saved_bytes"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryMeasurement:
    """Memory that the graph's tensors do not tell of, measured on one device kind."""

    workspace: KernelWorkspace
    loss: LossMemory

    def to_json(self) -> dict[str, Any]:
        growths = {
            phase: {"fixed_bytes_O": g.fixed_bytes_O.tolist(), "ratio_O": g.ratio_O.tolist()}
            for phase in _PHASES
            for g in [getattr(self.workspace, phase)]
        }
        return {"workspace": growths, "loss": asdict(self.loss)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MemoryMeasurement:
        growths = {
            phase: Growth(**{name: np.asarray(array, dtype=np.float64) for name, array in growth.items()})
            for phase, growth in value["workspace"].items()
        }
        return cls(workspace=KernelWorkspace(**growths), loss=LossMemory(**value["loss"]))


def typical(measurements: Sequence[OperatorMeasurement]) -> OperatorMeasurement:
    """The median over several devices of one kind that measured the same microbatch."""

    def middle(values: Sequence[Any]) -> Any:
        return np.median(np.asarray(values), axis=0)

    return OperatorMeasurement(
        binding=measurements[0].binding,
        forward_s_O=middle([m.forward_s_O for m in measurements]),
        backward_s_O=middle([m.backward_s_O for m in measurements]),
        input_s_O=middle([m.input_s_O for m in measurements]),
        weight_s_O=middle([m.weight_s_O for m in measurements]),
        loss_forward_s=float(middle([m.loss_forward_s for m in measurements])),
        loss_backward_s=float(middle([m.loss_backward_s for m in measurements])),
        loss_saved_bytes=float(middle([m.loss_saved_bytes for m in measurements])),
    )
