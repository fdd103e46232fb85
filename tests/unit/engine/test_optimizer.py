from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from forescale.core.errors import InvalidInput, TaskFailed
from forescale.engine.train.optimizer import OptimizerTemplate, WorkerOptimizer, optimizer_template
from forescale.engine.train.task import TrainingTask
from forescale.plan.partition_plan import PartitionPlan, Prediction, Schedule, Shard, Stage


def template(make: Any, model: nn.Module | None = None) -> OptimizerTemplate:
    model = model or nn.Linear(3, 3)
    task = TrainingTask(model=model, loss=lambda output, _: output.sum(), optimizer=make, batches=[])
    return optimizer_template(task, dict(model.named_parameters()))


def two_groups(parameters: Iterable[nn.Parameter]) -> Optimizer:
    weight, bias = parameters
    return torch.optim.AdamW([{"params": [weight], "lr": 0.5}, {"params": [bias]}], lr=0.1)


def test_groups_and_their_options_are_kept() -> None:
    found = template(two_groups)
    assert found.group_of == {"weight": 0, "bias": 1}
    assert [group["lr"] for group in found.optimizer.param_groups] == [0.5, 0.1]
    assert all(group["params"] == [] for group in found.optimizer.param_groups)


@pytest.mark.parametrize(
    ("make", "ratio"),
    [
        (torch.optim.AdamW, 2.0),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0.0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1.0),
    ],
    ids=["adamw", "sgd", "momentum"],
)
def test_the_size_of_the_state_is_known(make: Callable[..., Optimizer], ratio: float) -> None:
    assert template(make).state_ratio == ratio


class Lamb(Optimizer):
    """You et al., 2020, without its moments: the step of a parameter is as long as the parameter."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        for parameter in group["params"]:
            parameter.sub_(group["lr"] * parameter.grad * parameter.norm() / parameter.grad.norm())


class Flat(Optimizer):
    """Momentum that is not of the parameter's shape."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter).flatten())
            mean.mul_(0.9).add_(parameter.grad.flatten())
            parameter.sub_(0.1 * mean.view_as(parameter))


def some_by_muon(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=0.1)


@pytest.mark.parametrize(
    ("make", "shardable"),
    [
        (torch.optim.AdamW, True),
        (lambda p: torch.optim.AdamW(p, lr=0.0, amsgrad=True, foreach=True), True),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1), True),
        (torch.optim.RMSprop, True),
        (torch.optim.Adagrad, True),
        (torch.optim.Adafactor, False),
        (Flat, False),
        (Lamb, False),
        (lambda p: Lamb(p, lr=0.0), False),  # a scheduler will warm it up
        (some_by_muon, False),
    ],
    ids=[
        "adamw",
        "amsgrad",
        "momentum",
        "rmsprop",
        "adagrad",
        "adafactor",
        "flat",
        "lamb",
        "lamb at rest",
        "muon",
    ],
)
def test_whether_parts_of_parameters_may_be_stepped_is_found_by_trying(make: Any, shardable: bool) -> None:
    assert template(make).shardable == shardable


def test_an_optimizer_that_needs_whole_parameters_is_refused_for_shards() -> None:
    shard = Stage(device="a", operators=(0,), shard=Shard(index=0, weights=(1, 1)))
    stages = (shard, replace(shard, device="b", shard=Shard(index=1, weights=(1, 1))))
    plan = PartitionPlan(
        stages=stages, microbatches=1, schedule=Schedule.GPIPE, prediction=Prediction(step_s=0.0, stages=())
    )
    template(torch.optim.AdamW).check(plan)
    adafactor = template(torch.optim.Adafactor)
    adafactor.check(replace(plan, stages=(Stage(device="a", operators=(0,)),)))
    with pytest.raises(InvalidInput, match=r"Adafactor cannot step a part of a parameter by itself.*AdamW"):
        adafactor.check(plan)


def test_an_optimizer_that_is_there_already_is_taken_with_its_groups() -> None:
    model = nn.Linear(3, 3)
    assert template(two_groups(model.parameters()), model).group_of == {"weight": 0, "bias": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, "LBFGS"),
        (lambda _: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), "not the model's"),
        (lambda _: 3, "returned int"),
        (lambda _: 1 / 0, "could not be made: division by zero"),
        (3, "must be a torch optimizer"),
    ],
)
def test_what_cannot_be_used_is_refused(make: Any, message: str) -> None:
    with pytest.raises(TaskFailed, match=message):
        template(make)


def test_parameters_come_and_go_with_their_state() -> None:
    """Two workers, between which a parameter moves, do what one optimizer does."""
    torch.manual_seed(0)
    whole = nn.Linear(3, 3)
    reference = two_groups(whole.parameters())
    workers = [WorkerOptimizer(template(two_groups)) for _ in range(2)]
    own = {name: nn.Parameter(p.detach().clone()) for name, p in whole.named_parameters()}
    workers[0].hold("weight", own["weight"])
    workers[1].hold("bias", own["bias"])
    for step in range(4):
        if step == 2:
            state = workers[0].state(own["weight"])
            workers[1].hold("weight", own["weight"], dict(state))
            workers[0].release([own["weight"]])
            assert workers[0].state(own["weight"]) == {}
        for name, parameter in whole.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            own[name].grad = parameter.grad.clone()
        reference.step()
        for worker in workers:
            worker.optimizer.step()
    for name, parameter in whole.named_parameters():
        assert torch.equal(own[name], parameter)
