"""A training worker: holds part of the model on one device and does what the coordinator says.

Messages are handled strictly in order, so a plan switched to between two steps is in force for the
second one on every worker, without any other agreement.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from forescale.core.cluster import Device
from forescale.engine.channel import Channel
from forescale.engine.messages import StageReport
from forescale.engine.tensors import pack, unpack
from forescale.engine.train.assignment import Assignment
from forescale.engine.train.gradients import clip, shared_gradients, sum_shared
from forescale.engine.train.hand_over import decode_batch
from forescale.engine.train.holdings import Holdings
from forescale.engine.train.migration import Value, migrate, whole_values
from forescale.engine.train.optimizer import WorkerOptimizer
from forescale.engine.train.peers import Peers
from forescale.engine.train.preparation import Preparation, compile_for
from forescale.engine.train.profiling import profile_model
from forescale.engine.train.shards import Checkpoint, write_shard
from forescale.engine.train.stage import CompiledStage, Microbatch
from forescale.engine.train.stopwatch import Activity, Stopwatch
from forescale.engine.train.task import split_rows
from forescale.engine.train.turns import DeviceExecutor
from forescale.engine.wire import Message
from forescale.graph.kernels import measure_peak_bytes
from forescale.graph.model import ModelGraph
from forescale.graph.program import register_operators
from forescale.plan.moves import held_by, holdings, owners
from forescale.plan.partition_plan import PartitionPlan


def main(channel: Channel, device: Device, config: Mapping[str, Any]) -> None:
    """Entry of the worker process."""
    torch.set_num_threads(max(len(device.cores), 1))
    place = torch.device("cuda", 0) if device.kind == "cuda" else torch.device("cpu")
    peers = Peers.connect(
        host=config["host"],
        port=config["port"],
        rank=config["rank"],
        world_size=config["world_size"],
        device=place,
    )
    channel.send({"type": "ready"})
    try:
        _Worker(channel, device, peers).serve()
    finally:
        peers.close()


class _Worker:
    def __init__(self, channel: Channel, device: Device, peers: Peers) -> None:
        self._channel = channel
        self._device = device
        self._peers = peers
        self._stopwatch = Stopwatch(peers.device)
        self._prepared: dict[int, Preparation] = {}
        self._to_measure: list[tuple[dict[str, torch.Tensor], Any]] = []
        self._assignment: Assignment
        self._holdings: Holdings
        self._scheduler: LRScheduler | None = None
        self._plan: PartitionPlan
        self._executor: DeviceExecutor | None = None

    def serve(self) -> None:
        actions = {
            "setup": self._setup,
            "profile": self._profile,
            "start": self._start,
            "step": self._step,
            "prepare": self._prepare,
            "switch": self._switch,
            "checkpoint": self._checkpoint,
            "gather": self._gather,
        }
        while True:
            message = self._channel.receive()
            assert message is not None, "receive without a timeout returns a message"
            if message.header["type"] == "stop":
                return
            actions[message.header["type"]](message)

    @property
    def _graph(self) -> ModelGraph:
        return self._assignment.captured.graph

    def _setup(self, message: Message) -> None:
        self._assignment = pickle.loads(message.frames[0])  # noqa: S301 - only the coordinator can send
        register_operators(self._assignment.captured.libraries)
        self._holdings = Holdings(
            graph=self._graph,
            optimizer=WorkerOptimizer(self._assignment.optimizer),
            device=self._peers.device,
            tensors={},
        )

    def _profile(self, message: Message) -> None:
        """Collects microbatches; with the last, all workers measure at once, so that contention shows."""
        self._to_measure.append(decode_batch(message, self._peers.device))
        if message.header["more"]:
            return
        self._peers.barrier()
        budget_s = message.header["budget_s"]
        profile = profile_model(self._assignment, self._to_measure, self._peers.device, budget_s=budget_s)
        self._to_measure.clear()
        self._channel.send({"type": "profiled"}, [pickle.dumps(profile)])

    def _start(self, message: Message) -> None:
        """Takes the first plan and the tensors that belong to this worker under it."""
        plan: PartitionPlan = pickle.loads(message.frames[0])  # noqa: S301
        sent = unpack(message.header["tensors"], message.frames[1:])
        for name, value in sent.items():
            self._holdings.hold(name, value)
        if path := message.header["checkpoint"]:
            self._load(Checkpoint(Path(path)), plan)
        self._resume_schedule(message.header)
        self._take_over(plan, self._compile_for(plan))
        self._channel.send({"type": "started"})

    def _load(self, checkpoint: Checkpoint, plan: PartitionPlan) -> None:
        """Takes what belongs to this worker and is not here yet."""
        held = held_by(holdings(self._graph, plan), self._device.name)
        extents = {name: extent for name, extent in held.items() if name not in self._holdings.tensors}
        states = checkpoint.optimizer(extents)
        for name, value in checkpoint.model(extents).items():
            state = self._holdings.optimizer.placed(states.get(name, {}), self._peers.device)
            self._holdings.hold_part(name, value, state, extents[name])

    def _compile_for(self, plan: PartitionPlan) -> tuple[CompiledStage, ...]:
        return compile_for(self._assignment, plan, self._device.name, self._peers, self._stopwatch)

    def _resume_schedule(self, header: Mapping[str, Any]) -> None:
        optimizer = self._holdings.optimizer.optimizer
        make = self._assignment.scheduler
        self._scheduler = make(optimizer) if make is not None else None
        if header["groups"] is not None:
            for group, saved in zip(optimizer.param_groups, header["groups"], strict=True):
                group.update(saved)
        if header["schedule"] is not None and self._scheduler is not None:
            self._scheduler.load_state_dict(header["schedule"])

    def _take_over(self, plan: PartitionPlan, compiled: Sequence[CompiledStage]) -> None:
        self._plan = plan
        held, name = holdings(self._graph, plan), self._device.name
        self._shared = shared_gradients(self._graph, held, name, self._assignment.ranks)
        self._counted = {n for n, h in held.items() if any(owner.device == name for owner in owners(h))}
        self._executor = None
        if compiled:
            self._executor = DeviceExecutor(
                self._assignment,
                compiled,
                peers=self._peers,
                held=self._holdings.tensors,
                stopwatch=self._stopwatch,
            )

    def _step(self, message: Message) -> None:
        header, cpu_start_s = message.header, time.process_time()
        step, rows = header["step"], header["rows"]
        with self._stopwatch.time(Activity.TRANSFER):
            inputs, batch = decode_batch(message, self._peers.device)
            fed, batches = split_rows(inputs, rows), split_rows(batch, rows)
        microbatches = [
            Microbatch(binding=b, fed=f, batch=w, weight=share)
            for b, f, w, share in zip(header["bindings"], fed, batches, header["weights"], strict=True)
        ]
        loss, memory_bytes = self._run(step, microbatches, measure_memory=header["measure_memory"])
        with self._stopwatch.time(Activity.TRANSFER):
            self._complete_gradients()
        self._update()
        spent = self._stopwatch.reset()
        report = StageReport(
            device=self._device.name,
            forward_s=spent[Activity.FORWARD],
            backward_s=spent[Activity.BACKWARD],
            optimizer_s=spent[Activity.OPTIMIZER],
            transfer_s=spent[Activity.TRANSFER],
            wait_s=spent[Activity.WAIT],
            cpu_s=time.process_time() - cpu_start_s,
            memory_bytes=memory_bytes,
        )
        self._channel.send(
            {
                "type": "stepped",
                "step": step,
                "loss": float(loss),
                "end_s": time.monotonic(),
                "report": asdict(report),
            }
        )

    def _run(
        self, step: int, microbatches: Sequence[Microbatch], *, measure_memory: bool
    ) -> tuple[torch.Tensor, int]:
        """Forwards and backwards: the loss, and the peak of this worker's memory (0 when not measured)."""
        if self._executor is None:
            return torch.zeros(()), 0
        if self._peers.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            loss = self._executor.run(step, microbatches)
            return loss, torch.cuda.max_memory_allocated()
        if not measure_memory:
            return self._executor.run(step, microbatches), 0
        losses: list[torch.Tensor] = []
        executor = self._executor
        rise_bytes = measure_peak_bytes(lambda: losses.append(executor.run(step, microbatches)))
        fed_bytes = sum(t.numel() * t.element_size() for m in microbatches for t in m.fed.values())
        return losses[0], rise_bytes + self._holdings.size_bytes() + fed_bytes

    def _complete_gradients(self) -> None:
        untouched = self._executor.untouched if self._executor is not None else frozenset[str]()
        shared = [one for one in self._shared if one.name not in untouched]
        sum_shared(self._holdings.trainable(), shared, self._peers)
        for name, parameter in self._holdings.trainable().items():
            if name in untouched:
                parameter.grad = None

    def _update(self) -> None:
        trainable = self._holdings.trainable()
        if self._assignment.clip_norm is not None:
            with self._stopwatch.time(Activity.WAIT):
                counted = [p for name, p in trainable.items() if name in self._counted]
                clip(counted, list(trainable.values()), self._assignment.clip_norm, self._peers)
        with self._stopwatch.time(Activity.OPTIMIZER):
            optimizer = self._holdings.optimizer.optimizer
            optimizer.step()
            for parameter in trainable.values():
                parameter.grad = None
            if self._scheduler is not None:
                self._scheduler.step()

    def _prepare(self, message: Message) -> None:
        """Compiles the next plan's stage beside the steps that still run under this one."""
        plan: PartitionPlan = pickle.loads(message.frames[0])  # noqa: S301
        preparation = Preparation(plan)
        self._prepared[message.header["plan"]] = preparation
        preparation.begin(
            self._assignment, self._plan, self._device.name, self._compile_for, self._peers.device
        )

    def _switch(self, message: Message) -> None:
        preparation = self._prepared.pop(message.header["plan"])
        compiled = preparation.result()
        self._peers.barrier()  # the pause begins when the last worker has finished the step before
        start_s = time.monotonic()
        moved_bytes = migrate(
            self._holdings,
            self._peers,
            self._assignment.ranks,
            preparation.change,
            preparation.landing,
        )
        self._take_over(preparation.plan, compiled)
        self._peers.settle()
        pause_s = time.monotonic() - start_s
        self._channel.send(
            {
                "type": "switched",
                "plan": message.header["plan"],
                "pause_s": pause_s,
                "moved_bytes": moved_bytes,
            }
        )

    def _checkpoint(self, message: Message) -> None:
        header = message.header
        mine = self._whole_values()
        try:
            shard = write_shard(
                Path(header["directory"]),
                self._peers.rank,
                self._peers.world_size,
                {name: value for name, (value, _) in mine.items()},
                {name: state for name, (_, state) in mine.items()},
            )
        except OSError as error:
            self._channel.send({"type": "checkpointed", "step": header["step"], "error": str(error)})
            return
        groups = [
            {
                k: v
                for k, v in group.items()
                if k != "params" and isinstance(v, (int, float, bool, list, tuple))
            }
            for group in self._holdings.optimizer.optimizer.param_groups
        ]
        schedule = self._scheduler.state_dict() if self._scheduler is not None else None
        self._channel.send(
            {"type": "checkpointed", "step": header["step"], "error": None},
            [pickle.dumps((shard, groups, schedule))],
        )

    def _whole_values(self) -> Mapping[str, Value]:
        """What this worker writes of the model's state; all workers ask at the same time."""
        ranks = self._assignment.ranks
        return whole_values(self._holdings, self._peers, ranks, self._device.name, self._plan)

    def _gather(self, _: Message) -> None:
        meta, frames = pack({name: value for name, (value, _) in self._whole_values().items()})
        self._channel.send({"type": "gathered", "tensors": meta}, frames).wait()
