from __future__ import annotations

import pytest
import torch
from torch import nn

from forescale.engine.train.optimizer import OptimizerTemplate, WorkerOptimizer

META = torch.device("meta")  # stands for a GPU


def worker_optimizer(*, fused: bool) -> WorkerOptimizer:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], fused=fused)
    return WorkerOptimizer(OptimizerTemplate(optimizer=optimizer, group_of={}, state_ratio=2.0))


@pytest.mark.parametrize(("fused", "step_device"), [(False, "cpu"), (True, "meta")])
def test_saved_state_goes_where_the_optimizer_keeps_it(fused: bool, step_device: str) -> None:
    state = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4), "note": "kept"}
    placed = worker_optimizer(fused=fused).placed(state, META)
    assert placed["exp_avg"].device == META
    assert placed["step"].device.type == step_device
    assert placed["note"] == "kept"
