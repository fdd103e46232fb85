"""One optimizer per worker whose parameters come and go while the plan changes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from forescale.core.errors import InvalidInput, TaskFailed
from forescale.engine.train.task import TrainingTask
from forescale.plan.partition_plan import PartitionPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerTemplate:
    """An optimizer without parameters, and the group each parameter belongs to.

    Attributes:
        group_of: index of the parameter group, by parameter name; frozen ones and those the user
            left out are absent.
        state_ratio: bytes of optimiser state per byte of parameters (AdamW: 2).
        shardable: whether a parameter may be stepped in parts, each by itself.
    """

    optimizer: Optimizer
    group_of: Mapping[str, int]
    state_ratio: float
    shardable: bool = True

    def fresh(self, parameters: list[nn.Parameter]) -> Optimizer:
        """A new optimizer of this kind, with the options of the first group."""
        optimizer = _emptied(self.optimizer)
        optimizer.param_groups = [{**optimizer.param_groups[0], "params": parameters}]
        return optimizer

    def check(self, plan: PartitionPlan) -> None:
        """Checks that it can train under a plan.

        Raises:
            InvalidInput: devices would hold parts of parameters, which it cannot step by themselves.
        """
        if not self.shardable and any(stage.shard is not None for stage in plan.stages):
            raise InvalidInput(
                f"{type(self.optimizer).__name__} cannot step a part of a parameter by itself, so devices "
                "cannot share operators; use an optimizer that treats numbers one by one, such as AdamW, "
                "or a plan without shards"
            )


def optimizer_template(task: TrainingTask, parameters: Mapping[str, torch.Tensor]) -> OptimizerTemplate:
    """Learns the task's optimizer: its class, options and groups.

    Args:
        parameters: the model's distinct parameters by name.

    Raises:
        TaskFailed: the optimizer cannot be split over devices, or its factory raised.
    """
    optimizer = task.optimizer if isinstance(task.optimizer, Optimizer) else _made(task)
    if isinstance(optimizer, LBFGS):
        raise TaskFailed(
            "LBFGS evaluates the loss several times a step, which a pipeline cannot; use another optimizer"
        )
    names = {id(parameter): name for name, parameter in parameters.items()}
    group_of: dict[str, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise TaskFailed(
                    "the optimizer holds a parameter that is not the model's; pass model.parameters()"
                )
            group_of[names[id(parameter)]] = index
    _check_scheduler(task, optimizer)
    return OptimizerTemplate(
        optimizer=_emptied(optimizer),
        group_of=group_of,
        state_ratio=_state_ratio(optimizer),
        shardable=_shardable(optimizer),
    )


def _check_scheduler(task: TrainingTask, optimizer: Optimizer) -> None:
    if task.scheduler is None:
        return
    if not callable(task.scheduler):
        raise TaskFailed("scheduler must be a callable that makes one from the optimizer")
    try:
        _check_steps_alone(task.scheduler(_emptied(optimizer)))
    except TaskFailed:
        raise
    except Exception as error:
        raise TaskFailed(f"the scheduler could not be made: {error}") from error


def _check_steps_alone(scheduler: object) -> None:
    if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
        raise TaskFailed(
            f"{type(scheduler).__name__} needs more than the number of steps; use another scheduler"
        )


def _made(task: TrainingTask) -> Optimizer:
    if not callable(task.optimizer):
        raise TaskFailed("optimizer must be a torch optimizer, or a callable that makes one from parameters")
    try:
        return _checked(task.optimizer(list(task.model.parameters())))
    except TaskFailed:
        raise
    except Exception as error:
        raise TaskFailed(f"the optimizer could not be made: {error}") from error


def _checked(made: object) -> Optimizer:
    if not isinstance(made, Optimizer):
        raise TaskFailed(f"the optimizer callable returned {type(made).__name__}, not a torch optimizer")
    return made


def _emptied(optimizer: Optimizer) -> Optimizer:
    empty = copy.copy(optimizer)
    empty.param_groups = [
        {
            key: [] if key == "params" else copy.deepcopy(value)
            for key, value in group.items()
            if key != "param_names"
        }
        for group in optimizer.param_groups
    ]
    empty.state = type(optimizer.state)(optimizer.state.default_factory)
    return empty


def _state_ratio(optimizer: Optimizer) -> float:
    """Steps a copy of the optimizer on one small parameter and looks at the state it made.

    Raises:
        TaskFailed: the copy cannot step, and neither could a worker's.
    """
    trial = _emptied(optimizer)
    parameter = nn.Parameter(torch.zeros(64, 64))
    parameter.grad = torch.ones(64, 64)
    trial.param_groups = [{**trial.param_groups[0], "params": [parameter]}]
    try:
        trial.step()
    except Exception as error:
        raise TaskFailed(
            f"a copy of the optimizer {type(optimizer).__name__} cannot step a dense parameter: {error}; "
            "what it needs must be in its groups or its state"
        ) from error
    state = trial.state.get(parameter, {})
    held = sum(
        v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor) and v.dim()
    )
    return held / (parameter.numel() * parameter.element_size())


def _shardable(optimizer: Optimizer) -> bool:
    """Steps a parameter whole and in two parts, along either axis, with the options of every group.

    Adafactor, LAMB and Muon, for instance, look at a whole matrix to change any of its elements.
    """
    random = torch.Generator().manual_seed(0)
    rising = torch.linspace(0.1, 3.0, 8, dtype=torch.float64)  # no part is like the whole
    value, *gradients = (
        torch.randn(8, 8, generator=random, dtype=torch.float64) * rising * rising[:, None] for _ in range(4)
    )
    try:
        return all(
            _same_in_parts(optimizer, group, value, gradients, axis)
            for group in optimizer.param_groups
            for axis in (0, 1)
        )
    except Exception:  # noqa: BLE001 - what cannot step such parameters cannot step parts
        return False


def _same_in_parts(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    value: torch.Tensor,
    gradients: Sequence[torch.Tensor],
    axis: int,
) -> bool:
    whole = _stepped(optimizer, group, value, gradients)
    split = zip(*(tensor.split((5, 3), axis) for tensor in (value, *gradients)), strict=True)
    parts = torch.cat([_stepped(optimizer, group, part, own) for part, *own in split], axis)
    return bool((parts - whole).abs().max() <= 1e-9 * (whole - value).abs().max())


def _stepped(
    optimizer: Optimizer, group: Mapping[str, Any], value: torch.Tensor, gradients: Sequence[torch.Tensor]
) -> torch.Tensor:
    """What a copy of the optimizer makes of a parameter.

    Raises:
        ValueError: its state is neither of the parameter's shape nor a single number.
    """
    trial, parameter = _emptied(optimizer), nn.Parameter(value.clone())
    rate = {"lr": 0.01} if "lr" in group else {}  # a schedule may start at zero
    trial.param_groups = [{**group, **rate, "params": [parameter]}]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        trial.step()
    held = [v for v in trial.state.get(parameter, {}).values() if isinstance(v, torch.Tensor)]
    if any(v.numel() > 1 and v.shape != value.shape for v in held):
        raise ValueError("the state cannot be cut as the parameter is")
    return parameter.detach()


class WorkerOptimizer:
    """The part of the optimizer that belongs to one worker's parameters."""

    def __init__(self, template: OptimizerTemplate) -> None:
        self.optimizer = template.optimizer
        self._group_of = template.group_of

    def hold(self, name: str, parameter: nn.Parameter, state: dict[str, Any] | None = None) -> None:
        """Takes over a parameter, with its state if it has one."""
        if name not in self._group_of:
            return
        self.optimizer.param_groups[self._group_of[name]]["params"].append(parameter)
        if state:
            self.optimizer.state[parameter] = state

    def placed(self, state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Saved state on the device; scalars such as step counts only if the optimizer reads them there."""
        whole = self.optimizer.defaults.get("fused") or self.optimizer.defaults.get("capturable")
        return {
            key: value.to(device) if isinstance(value, torch.Tensor) and (whole or value.dim()) else value
            for key, value in state.items()
        }

    def state(self, parameter: nn.Parameter) -> dict[str, Any]:
        return self.optimizer.state.get(parameter, {})

    def release(self, parameters: Iterable[nn.Parameter]) -> None:
        """Lets go of parameters and drops their state."""
        gone = {id(p) for p in parameters}
        for group in self.optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for parameter in [p for p in self.optimizer.state if id(p) in gone]:
            del self.optimizer.state[parameter]
