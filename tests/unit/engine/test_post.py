from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from forescale.engine.train.post import Letter, Post
from forescale.engine.train.turns import incoming, sent
from forescale.engine.train.wiring import wire
from forescale.graph.model import ModelGraph
from forescale.plan.partition_plan import PartitionPlan, Prediction, Schedule, Stage
from forescale.plan.schedule import Layout, Phase
from unit.plan.graphs import GraphBuilder, chain


class Done:
    def wait(self) -> None:
        pass


@dataclass
class Recorder:
    """A worker's connections: notes what it is asked to send and to receive, by peer and direction."""

    rank: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sends: dict[tuple[int, object], list[int]] = field(default_factory=dict)
    receives: dict[tuple[int, object], list[int]] = field(default_factory=dict)

    def send(self, tensor, to: int, *, back: bool | None = None, tag: int = 0) -> Any:
        self.sends.setdefault((to, back), []).append(tag)
        return Done()

    def receive(self, tensor, source: int, *, back: bool | None = None, tag: int = 0) -> Any:
        self.receives.setdefault((source, back), []).append(tag)
        return Done()


def post(rank: int, graph: ModelGraph, *, take_turns: bool) -> tuple[Post, Recorder]:
    recorder = Recorder(rank)
    return (
        Post(
            recorder,
            names=graph.tensors,
            shapes={name: lambda _: [1] for name in graph.tensors},
            dtypes=dict.fromkeys(graph.tensors, torch.float32),
            stages=6,
            take_turns=take_turns,
        ),
        recorder,
    )


def skipping() -> ModelGraph:
    """Six operators, each of which reads all before it."""
    builder = GraphBuilder()
    names = ["x"]
    for index in range(6):
        names.append(builder.add(f"op{index}", *names))
    return builder.build([names[-1]], {"x": 8})


@pytest.mark.parametrize("microbatches", [1, 2, 5, 8])
@pytest.mark.parametrize("devices", [2, 3])
def test_what_devices_that_take_turns_send_is_received_in_that_order(devices: int, microbatches: int) -> None:
    """NCCL needs it: it tells messages between two workers apart by their order alone."""
    graph = skipping()
    stages = tuple(Stage(device=f"cpu{i % devices}", operators=(i,)) for i in range(6))
    plan = PartitionPlan(
        stages=stages,
        microbatches=microbatches,
        schedule=Schedule.INTERLEAVED,
        prediction=Prediction(step_s=0.0, stages=()),
    )
    ranks = [i % devices for i in range(6)]
    layout = Layout.of(stages, microbatches)
    recorders = []
    for rank in range(devices):
        own, recorder = post(rank, graph, take_turns=True)
        recorders.append(recorder)
        own.begin([{}] * microbatches, incoming(graph, plan, ranks, rank, microbatches))
        for task in layout.agenda(plan.schedule, rank):
            stage, phase, microbatch = task
            wiring = wire(graph, plan, stage)
            back = phase is Phase.BACKWARD
            expected = (
                [(name, reader, reader) for name, readers in wiring.sent.items() for reader in readers]
                if back
                else [(name, stage, maker) for name, maker in wiring.received.items()]
            )
            letters = [
                (Letter(name=name, reader=reader, microbatch=microbatch, back=back), ranks[source])
                for name, reader, source in expected
            ]
            for letter, source in letters:
                own.expect(letter, source)
            for letter, _ in letters:
                own.take(letter)
            for letter, target in sent(graph, wiring, task):
                own.send(letter, torch.zeros(1), ranks[target])
    for one in range(devices):
        for other in range(devices):
            if one != other:
                sends = recorders[one].sends[other, None]
                assert recorders[other].receives[one, None] == sends
                assert len(set(sends)) == len(sends)


def test_stages_of_one_device_hand_tensors_over() -> None:
    own, recorder = post(0, chain(2), take_turns=True)
    letter, tensor = Letter(name="op0", reader=1, microbatch=0, back=False), torch.ones(1)
    own.expect(letter, 0)
    assert own.send(letter, tensor, 0) == []
    assert own.take(letter) is tensor
    assert not recorder.sends
    assert not recorder.receives


def test_tensors_go_ahead_and_gradients_back() -> None:
    own, recorder = post(0, chain(2), take_turns=False)
    for back in (False, True):
        own.send(Letter(name="op0", reader=1, microbatch=0, back=back), torch.ones(1), 1)
    assert [direction for _, direction in recorder.sends] == [False, True]
