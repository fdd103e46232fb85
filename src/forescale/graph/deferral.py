"""Backwards in two parts: gradients of what flows at once, gradients of parameters when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from forescale.graph.model import ModelGraph
from forescale.graph.separable import separable_operators

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What makes another function of an operator's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGradient:
    """The rest of one operator's backward: adds the gradients of its parameters to what they have.

    Attributes:
        operator: its index.
        end: of the operator's own piece of the autograd graph, which starts at ``starts``.
        gradient: of its result.
        weights: its parameters, or casts of them.
    """

    operator: int
    end: GradientEdge
    gradient: torch.Tensor
    starts: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]

    def accumulate(self) -> None:
        found = torch.autograd.grad([self.end], self.starts, [self.gradient])
        torch.autograd.backward(self.weights, found)


class Deferral:
    """Collects the parts of backwards that can wait."""

    def __init__(self) -> None:
        self._collected: list[WeightGradient] = []

    def wraps(self, graph: ModelGraph, operators: Iterable[int]) -> Mapping[int, Wrap]:
        """For :func:`forescale.graph.program.compile_program`: functions whose backward leaves parameters."""
        return {
            operator: partial(self._wrapped, operator, positions)
            for operator, positions in separable_operators(graph, operators).items()
        }

    def take(self) -> list[WeightGradient]:
        """What the backwards since the last call left to do."""
        collected, self._collected = self._collected, []
        return collected

    def _wrapped(
        self, operator: int, positions: tuple[int, ...], function: Callable[..., torch.Tensor]
    ) -> Callable[..., torch.Tensor]:
        def deferring(*args: Any, **kwargs: Any) -> torch.Tensor:
            if not torch.is_grad_enabled():  # a forward that will be run again
                return function(*args, **kwargs)
            return _Apart.apply(self._collect, operator, partial(function, **kwargs), positions, *args)

        return deferring

    def _collect(self, rest: WeightGradient) -> None:
        self._collected.append(rest)


_FIRST = 4  # place of the operator's own arguments among those of ``_Apart``


class _Apart(torch.autograd.Function):
    """An operator that autograd differentiates in two runs over a small graph of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        collect: Callable[[WeightGradient], None],
        operator: int,
        function: Callable[..., torch.Tensor],
        positions: tuple[int, ...],
        *args: Any,
    ) -> torch.Tensor:
        own = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
        with torch.enable_grad():
            result = function(*own)
        ctx.set_materialize_grads(False)
        ctx.collect = collect
        ctx.inputs = {
            place: value
            for place, value in enumerate(own)
            if place not in positions and isinstance(value, torch.Tensor) and value.requires_grad
        }
        ctx.end = get_gradient_edge(result)
        ctx.rest = partial(
            WeightGradient,
            operator=operator,
            end=ctx.end,
            starts=tuple(own[place] for place in positions),
            weights=tuple(args[place] for place in positions),
        )
        return result.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> Any:
        (gradient,) = grad_outputs
        answers: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad)
        if gradient is not None:
            if ctx.inputs:
                inputs = list(ctx.inputs.values())
                found = torch.autograd.grad([ctx.end], inputs, [gradient], retain_graph=True)
                for place, value in zip(ctx.inputs, found, strict=True):
                    answers[_FIRST + place] = value
            ctx.collect(ctx.rest(gradient=gradient))
        return tuple(answers)
