"""What the planner is asked: a graph, devices, and what each operator costs on each of them.

Axes: D = device (order of ``cluster.devices``), O = operator, R = saved storage (order of ``graph.saved``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from forescale.core.cluster import Cluster
from forescale.graph.model import ModelGraph

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchCosts:
    """Costs of one microbatch of one size. Device speeds are already in the seconds.

    Attributes:
        forward_s_DO, backward_s_DO: seconds of each operator on each device.
        input_s_DO, weight_s_DO: seconds of its backward in two parts: what earlier operators wait for, and
            gradients of parameters that can be computed later (0 where none can).
        loss_forward_s_D, loss_backward_s_D: seconds of the loss, which runs on the last stage.
        tensor_bytes: size of every tensor of the graph, batch inputs included.
        saved_bytes_R: size of each storage that autograd keeps.
        workspace_bytes_O: transient memory an operator's forward or backward needs beside its
            saved storages.
        loss_saved_bytes: memory the loss keeps for its backward.
    """

    forward_s_DO: Array
    backward_s_DO: Array
    input_s_DO: Array
    weight_s_DO: Array
    loss_forward_s_D: Array
    loss_backward_s_D: Array
    tensor_bytes: Mapping[str, int]
    saved_bytes_R: Array
    workspace_bytes_O: Array
    loss_saved_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionProblem:
    """One request to the planner.

    Attributes:
        costs: number of microbatches per step -> costs of one of them; the planner picks among the keys.
        optimizer_s_per_byte_D: seconds of the optimiser step per byte of trainable parameters.
        optimizer_state_ratio: bytes of optimiser state per byte of trainable parameters (AdamW: 2).
        clips_norm: whether the gradients' global norm is needed before any parameter is updated.
        shardable: whether the optimiser can step parts of parameters, so that devices may split operators.
        unsplit_DO: which part of an operator's seconds each shard of it spends, however small its part is.
            None: no part.
    """

    graph: ModelGraph
    cluster: Cluster
    costs: Mapping[int, MicrobatchCosts]
    optimizer_s_per_byte_D: Array
    optimizer_state_ratio: float
    clips_norm: bool = False
    shardable: bool = True
    unsplit_DO: Array | None = None
