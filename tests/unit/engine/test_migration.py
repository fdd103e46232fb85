"""Parts of parameters change hands, with threads for workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from chain_model import chain_graph
from forescale.engine.train.holdings import Holdings
from forescale.engine.train.migration import Change, Landing, migrate
from forescale.engine.train.optimizer import OptimizerTemplate, WorkerOptimizer
from forescale.engine.train.parts import cut, paste
from forescale.graph.model import ModelGraph, Parameter
from forescale.graph.sharding import Slice
from forescale.plan.extents import WHOLE, Extent
from forescale.plan.moves import Holding
from unit.engine.threads import on_workers

CPU = torch.device("cpu")
DEVICES = ("a", "b", "c")
RANKS = {device: rank for rank, device in enumerate(DEVICES)}
SHAPES = {"large": (600, 512), "small": (30,)}


def graph() -> ModelGraph:
    parameters = {
        n: Parameter(name=n, aliases=(), shape=shape, dtype="float32", trainable=True)
        for n, shape in SHAPES.items()
    }
    return replace(chain_graph(1), parameters=parameters)


def trained() -> tuple[Mapping[str, nn.Parameter], Mapping[torch.Tensor, dict[str, Any]]]:
    """Parameters that AdamW has stepped, and their state."""
    random = torch.Generator().manual_seed(0)
    parameters = {n: nn.Parameter(torch.randn(shape, generator=random)) for n, shape in SHAPES.items()}
    optimizer = torch.optim.AdamW(parameters.values())
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=random)
    optimizer.step()
    return parameters, optimizer.state


class Prepared(Landing):
    """Complains if there is no room ready for something large."""

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert self._free.get((torch.Size(shape), dtype)) or torch.Size(shape).numel() < 1 << 16
        return super().take(shape, dtype, device)


def parts(*bounds: int, outer: int = 1) -> list[Extent]:
    """Along the first axis, of ten units of every outer."""
    inner = {1: 60, 2: 30}[outer]
    return [
        Extent.of(Slice(axis=0, outer=outer, units=10, inner=inner, start=start, stop=stop))
        for start, stop in zip((0, *bounds), (*bounds, 10), strict=True)
    ]


def held(devices: str, extents: Sequence[Extent]) -> Mapping[str, Sequence[Holding]]:
    """The large parameter in parts, the small one on all of these devices."""
    return {
        "large": [Holding(device=d, replica=0, extent=e) for d, e in zip(devices, extents, strict=True)],
        "small": [Holding(device=device, replica=0) for device in devices],
    }


SPLITS = {
    "7/3": held("ab", parts(7)),
    "5/5": held("ab", parts(5)),
    "of pairs": held("bc", parts(4, outer=2)),
    "in three": held("cab", parts(2, 5)),
    "whole": held("b", [WHOLE]),
    "columns": held(
        "ac",
        [
            Extent.of(Slice(axis=1, outer=1, units=512, inner=1, start=0, stop=300)),
            Extent.of(Slice(axis=1, outer=1, units=512, inner=1, start=300, stop=512)),
        ],
    ),
}


@pytest.mark.parametrize("before", SPLITS)
@pytest.mark.parametrize("after", SPLITS)
def test_every_worker_ends_with_its_part_and_its_state(before: str, after: str) -> None:
    values, states = trained()
    template = OptimizerTemplate(
        optimizer=torch.optim.AdamW([nn.Parameter(torch.zeros(1))]),
        group_of=dict.fromkeys(SHAPES, 0),
        state_ratio=2.0,
    )

    def run(peers: Any) -> tuple[Holdings, int]:
        change = Change.of(graph(), DEVICES[peers.rank], SPLITS[before], SPLITS[after])
        holdings = Holdings(graph=graph(), optimizer=worker_optimizer(template), device=CPU, tensors={})
        for name, extent in change.before.items():
            holdings.hold_part(name, values[name].detach().clone(), dict(states[values[name]]), extent)
        landing = Prepared()
        change.make_room(graph(), 3, landing, CPU)
        return holdings, migrate(holdings, peers, RANKS, change, landing)

    results, _ = on_workers(3, run)
    for device, (holdings, _) in zip(DEVICES, results, strict=True):
        wanted = {n: h.extent for n, of in SPLITS[after].items() for h in of if h.device == device}
        assert set(holdings.tensors) == set(wanted)
        for name, extent in wanted.items():
            whole, state = values[name], holdings.state(name)
            assert torch.equal(holdings.tensors[name], cut(whole, extent))
            assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
            assert state["step"] == 1
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(state[key], cut(states[whole][key], extent))
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in (holdings.tensors[name], state[key]))
    if before == after:
        assert sum(sent for _, sent in results) == 0


def worker_optimizer(template: OptimizerTemplate) -> WorkerOptimizer:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    optimizer.param_groups[0]["params"] = []
    return WorkerOptimizer(replace(template, optimizer=optimizer))


def test_what_is_cut_out_can_be_put_back() -> None:
    tensor = torch.arange(60 * 4).view(60, 4)
    extent = Extent(((0, ((0, 10), (30, 35))), (1, ((1, 2), (3, 4)))))
    part = cut(tensor, extent)
    assert part.shape == extent.shape(tensor.shape) == (15, 2)
    assert part[12].tolist() == [32 * 4 + 1, 32 * 4 + 3]
    again = torch.full_like(tensor, -1)
    paste(again, extent, part)
    assert torch.equal(cut(again, extent), part)
    assert int((again == -1).sum()) == 60 * 4 - 30
