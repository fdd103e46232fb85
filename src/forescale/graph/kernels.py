"""Memory that kernels take for themselves on a real device, beside the tensors they return.

A convolution of oneDNN, for example, copies its operands to another layout first. One real pass, one
operator after another, shows how far above the record of tensors each of them goes.

Axes: O = operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from forescale.graph.capture import CapturedModel
from forescale.graph.cost import cost_table
from forescale.graph.model import ModelGraph
from forescale.graph.onebyone import OneByOne
from forescale.graph.peak import Array, KernelWorkspace, LossMemory
from forescale.graph.size import compile_sizes

_CPU = torch.device("cpu")


def measure_peak_bytes(run: Callable[[], object], device: torch.device = _CPU) -> int:
    """How far the allocator's total rises above its start while ``run`` runs."""
    ...
