"""Which parameters a step's loss depends on.

Between stages every tensor gets a gradient, of zeros where nothing depends on it, so zeros alone do not
tell a parameter that is not used from one whose gradient happens to vanish.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import torch

from forescale.engine.train.peers import Peers
from forescale.graph.model import ModelGraph


def reached_parameters(graph: ModelGraph, outputs: Iterable[str]) -> frozenset[str]:
    """Parameters that a gradient from any of ``outputs`` flows to."""
    live = set(outputs)
    reached: set[str] = set()
    for operator in reversed(graph.operators):
        if any(name in live and graph.tensors[name].requires_grad for name in operator.outputs if name):
            live.update(operator.inputs)
            reached.update(operator.parameters)
    return frozenset(reached)


class Reached:
    """Learns on the last stage which outputs the loss used, and tells the other stages.

    Args:
        ranks: the workers of all stages.
        ends: those of the last stage, which has several if it has replicas.
    """

    def __init__(self, graph: ModelGraph, ranks: Sequence[int], ends: Sequence[int], peers: Peers) -> None:
        self._outputs = [name for name in graph.outputs if graph.tensors[name].requires_grad]
        self._ranks = ranks
        self._ends = ends
        self._peers = peers
        self._used: set[str] = set()

        @lru_cache
        def untouched(used: frozenset[str]) -> frozenset[str]:
            return frozenset(graph.parameters) - reached_parameters(graph, used)

        self._untouched = untouched

    @property
    def _certain(self) -> bool:
        return len(self._outputs) == 1  # a loss that has a gradient uses it

    def start(self) -> None:
        """Begins a step."""
        self._used = set(self._outputs if self._certain else ())

    def watch(self, results: Mapping[str, torch.Tensor]) -> None:
        """Notes which of the model's outputs a gradient arrives at."""
        if self._certain:
            return
        for name in self._outputs:
            if results[name].requires_grad:  # not in a forward that will be recomputed
                results[name].register_hook(lambda _, name=name: self._used.add(name))

    def untouched(self) -> frozenset[str]:
        """Parameters the step's loss does not depend on; every stage calls it after its backwards."""
        if not self._certain:
            self._exchange()
        return self._untouched(frozenset(self._used))

    def _exchange(self) -> None:
        own = torch.tensor([name in self._used for name in self._outputs], device=self._peers.device)
        me = self._peers.rank
        masks = {rank: torch.empty_like(own) for rank in self._ends if rank != me}
        works = [self._peers.receive(mask, rank) for rank, mask in masks.items()]
        if me in self._ends:
            works += [self._peers.send(own, rank) for rank in self._ranks if rank != me]
        for work in works:
            work.wait()
        used = torch.stack([own, *masks.values()]).any(dim=0)
        self._used = {name for name, seen in zip(self._outputs, used.tolist(), strict=True) if seen}
