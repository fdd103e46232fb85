"""What the planner computes for thousands of splits at once, for one split in the plainest way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forescale.graph.model import ModelGraph
from forescale.graph.separable import separable_operators
from forescale.plan.partition_plan import Schedule, Stage
from forescale.plan.problem import PartitionProblem
from forescale.plan.schedule import Layout, Phase


@dataclass(frozen=True, kw_only=True)
class Split:
    problem: PartitionProblem
    stages: Sequence[Stage]
    count: int
    schedule: Schedule

    @property
    def graph(self) -> ModelGraph:
        return self.problem.graph

    @property
    def costs(self):
        return self.problem.costs[self.count]

    def device(self, stage: int) -> int:
        return [d.name for d in self.problem.cluster.devices].index(self.stages[stage].device)

    @property
    def layout(self) -> Layout:
        return Layout.of(self.stages, self.count)

    def place(self, stage: int) -> int:
        """The first of a stage's replicas."""
        return next(i for i, s in enumerate(self.stages) if s.operators == self.stages[stage].operators)

    def place_of(self, operator: int) -> int:
        return next(i for i, s in enumerate(self.stages) if operator in s.operators)

    def is_last(self, stage: int) -> bool:
        return self.stages[stage].operators == self.stages[-1].operators

    def readers(self, name: str) -> set[int]:
        """First replicas of stages that read a tensor; the last one reads the outputs, for the loss."""
        places = {self.place_of(consumer) for consumer in self.graph.tensors[name].consumers}
        return places | {self.place(len(self.stages) - 1)} if name in self.graph.outputs else places

    def sent(self, source: int, target: int) -> list[str]:
        """Tensors one stage sends another one; gradients if ``source > target``."""
        if source > target:
            return [n for n in self.sent(target, source) if self.graph.tensors[n].requires_grad]
        return [
            name
            for name, tensor in self.graph.tensors.items()
            if tensor.producer is not None
            and self.place_of(tensor.producer) == self.place(source) != self.place(target)
            and self.place(target) in self.readers(name)
        ]

    def seconds(self, stage: int, phase: Phase) -> float:
        device, costs = self.device(stage), self.costs
        operators = list(self.stages[stage].operators)
        is_last = self.is_last(stage)
        forward_s = costs.forward_s_DO[device, operators].sum() + is_last * costs.loss_forward_s_D[device]
        if phase is Phase.FORWARD:
            return float(forward_s)
        if phase is Phase.WEIGHT:
            return float(costs.weight_s_DO[device, operators].sum())
        zero_bubble = self.schedule is Schedule.ZERO_BUBBLE
        backward_s_DO = costs.input_s_DO if zero_bubble else costs.backward_s_DO
        backward_s = backward_s_DO[device, operators].sum() + is_last * costs.loss_backward_s_D[device]
        return float(backward_s + self.stages[stage].recompute * forward_s)

    def held_parameters(self, stage: int) -> set[str]:
        return {p for o in self.stages[stage].operators for p in self.graph.operators[o].parameters}

    def bytes_of(self, parameters: set[str], *, trainable: bool = False) -> float:
        chosen = [self.graph.parameters[name] for name in parameters]
        return sum(4 * p.shape[0] for p in chosen if p.trainable or not trainable)

    def step_s(self) -> float:
        count = len(self.stages)
        names = list(dict.fromkeys(stage.device for stage in self.stages))
        agendas = [self.layout.agenda(self.schedule, place) for place in range(len(names))]
        home = [names.index(stage.device) for stage in self.stages]
        runs = self.layout.runs_S
        done = [0] * len(names)
        free_s = [0.0] * len(names)
        ready_s: dict[tuple[int, int, int], float] = {}
        link_free_s: dict[tuple[int, int], float] = {}
        while any(done[d] < len(agendas[d]) for d in range(len(names))):
            for device, agenda in enumerate(agendas):
                if done[device] == len(agenda):
                    continue
                stage, phase, microbatch = agenda[done[device]]
                assert home[stage] == device
                if phase is Phase.WEIGHT:
                    free_s[device] += self.seconds(stage, phase)
                    done[device] += 1
                    continue
                forward = phase is Phase.FORWARD
                sources = range(stage) if forward else range(count - 1, stage, -1)
                sources = [s for s in sources if microbatch in runs[s] and self.sent(s, stage)]
                if any((s, stage, microbatch) not in ready_s for s in sources):
                    continue
                time_s = free_s[device]
                for source in sources:
                    time_s = max(time_s, ready_s[source, stage, microbatch])
                    time_s += self.occupied_s(source, stage, stage)
                time_s += self.seconds(stage, phase)
                for target in range(stage + 1, count) if forward else range(stage - 1, -1, -1):
                    if microbatch not in runs[target] or not self.sent(stage, target):
                        continue
                    arrival_s = time_s
                    if home[target] != device:
                        link = (device, home[target])
                        arrival_s = max(time_s, link_free_s.get(link, 0)) + self.wire_s(stage, target)
                        link_free_s[link] = arrival_s
                    sending_s, receiving_s = (self.occupied_s(stage, target, by) for by in (stage, target))
                    ready_s[stage, target, microbatch] = arrival_s + max(0.0, sending_s - receiving_s)
                    time_s += sending_s
                free_s[device] = time_s
                done[device] += 1
        return self.end_s([free_s[device] for device in home])

    def occupied_s(self, source: int, target: int, by: int) -> float:
        """What a message takes from the device at one end."""
        apart = self.stages[source].device != self.stages[target].device
        return apart * self.link(source, target).occupies_device * self.message_s(source, target, by)

    def wire_s(self, source: int, target: int) -> float:
        """What a message takes beside the devices."""
        beside = not self.link(source, target).occupies_device
        delay_s = self.problem.cluster.devices[self.device(target)].delay_s
        return beside * self.message_s(source, target, source) + delay_s

    def slowness(self, stage: int, other: int) -> float:
        """How many times as long the first takes for its end of a message."""
        occupies = self.link(stage, other).occupies_device
        return 1 / self.problem.cluster.devices[self.device(stage)].speed if occupies else 1.0

    def link(self, source: int, target: int):
        return self.problem.cluster.link(self.stages[source].device, self.stages[target].device)

    def message_s(self, source: int, target: int, by: int) -> float:
        return self.slowness(by, target if by == source else source) * sum(
            self.link(source, target).transfer_s(self.costs.tensor_bytes[n])
            for n in self.sent(source, target)
        )

    def end_s(self, free_s: list[float]) -> float:
        stages = range(len(self.stages))
        devices = list(dict.fromkeys(stage.device for stage in self.stages))
        after_s = dict.fromkeys(devices, 0.0)
        exchange_s = dict.fromkeys(devices, 0.0)
        for stage in stages:
            device = self.stages[stage].device
            after_s[device] = max(after_s[device], free_s[stage])
            for other in stages:
                shared = self.held_parameters(stage) & self.held_parameters(other)
                size_bytes = sum(
                    2
                    * self.bytes_of({name}, trainable=True)
                    / sum(name in self.held_parameters(s) for s in stages)
                    for name in shared
                )
                if self.stages[other].device != device and size_bytes:
                    after_s[device] = max(after_s[device], free_s[other])
                    link = self.link(stage, other)
                    sum_s = link.latency_s + link.transfer_s(size_bytes)  # two messages
                    sum_s *= self.slowness(stage, other)
                    exchange_s[device] += sum_s * (2 if link.occupies_device else 1)
        after_s = {device: time_s + exchange_s[device] for device, time_s in after_s.items()}
        if self.problem.clips_norm:
            latency_s = max(self.link(a, b).latency_s * self.slowness(a, b) for a in stages for b in stages)
            agreed_s = max(after_s.values()) + 2 * (len(devices) - 1) * latency_s
            after_s = dict.fromkeys(devices, agreed_s)
        for stage in stages:
            updated_bytes = self.bytes_of(self.held_parameters(stage), trainable=True)
            rate = float(self.problem.optimizer_s_per_byte_D[self.device(stage)])
            after_s[self.stages[stage].device] += updated_bytes * rate
        return max(after_s.values())

    def deferred_bytes(self, operator: int) -> float:
        """What the gradients of an operator's parameters need, if they are computed apart."""
        separable = separable_operators(self.graph, range(len(self.graph.operators)))
        if operator not in separable:
            return 0.0
        size_bytes = float(self.costs.tensor_bytes[self.graph.operators[operator].name])  # the gradient
        for name in self.graph.operators[operator].inputs:
            readers = [o for o in separable if name in self.graph.operators[o].inputs]
            if self.graph.tensors[name].producer is not None:
                size_bytes += self.costs.tensor_bytes[name] / len(readers)
        return size_bytes

    def memory_bytes(self, stage: int) -> float:
        graph, costs = self.graph, self.costs
        own = set(self.stages[stage].operators)
        is_last = self.is_last(stage)
        parameters = self.held_parameters(stage)
        buffers = {b for o in own for b in graph.operators[o].buffers}
        fixed = self.bytes_of(parameters) + sum(4 * graph.buffers[b].shape[0] for b in buffers)
        fixed += (1 + self.problem.optimizer_state_ratio) * self.bytes_of(parameters, trainable=True)
        fixed += max(costs.workspace_bytes_O[list(own)])
        fixed += self.count * sum(
            costs.tensor_bytes[n]
            for n, t in graph.tensors.items()
            if t.producer is None and own & set(t.consumers)
        )
        received = {n for s in range(stage) for n in self.sent(s, stage)}
        sent = {n for t in range(stage + 1, len(self.stages)) for n in self.sent(stage, t)}
        kept: dict[str, float] = {}
        for saved, size_bytes in zip(graph.saved, costs.saved_bytes_R, strict=True):
            made_here = saved.name not in graph.tensors or graph.tensors[saved.name].producer in own
            if made_here and own & set(saved.operators):
                kept[saved.name] = float(size_bytes)
        loss = is_last * costs.loss_saved_bytes
        of = costs.tensor_bytes
        phases = [phase for phase, _ in self.layout.order(self.schedule, stage)]
        forwards, backwards, weights = (np.cumsum([p is phase for p in phases]) for phase in Phase)
        running, waiting = forwards - backwards, backwards - weights if weights.any() else 0 * weights
        deferred = sum(self.deferred_bytes(o) for o in own)
        inputs = sum(of[n] for n in received)
        if self.stages[stage].recompute:
            held = running * (inputs + sum(of[n] for n in sent)) + waiting * deferred
            return fixed + max(held) + sum(kept.values()) + loss
        outputs = sum(of[n] for n in sent - kept.keys())
        return fixed + max(running * (inputs + outputs + sum(kept.values()) + loss) + waiting * deferred)
