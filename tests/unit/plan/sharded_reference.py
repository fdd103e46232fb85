"""The plainest computation of a plan in which some stages are shards, from the operators that they run."""

from __future__ import annotations

from math import prod

import numpy as np

from forescale.graph.sharding import Sharded, shard_operators
from forescale.graph.size import evaluate
from forescale.plan.partition_plan import Schedule
from forescale.plan.schedule import Phase
from forescale.plan.sharded import read_outside
from unit.plan.reference import Split


class ShardedSplit(Split):
    """As :class:`Split`; no parameter is tied."""

    def shard(self, stage: int) -> Sharded | None:
        planned = self.stages[stage]
        if planned.shard is None:
            return None
        outputs = read_outside(self.graph, planned.operators)
        return shard_operators(
            self.graph, planned.operators, planned.shard.index, planned.shard.weights, outputs
        )

    def team(self, stage: int) -> list[int]:
        shard = self.stages[stage].shard
        if shard is None:
            return [stage]
        return list(range(stage - shard.index, stage - shard.index + len(shard.weights)))

    def fraction(self, stage: int, operator: int) -> float:
        shard = self.shard(stage)
        return 1.0 if shard is None else shard.fraction_O[shard.origin_O.index(operator)]

    def taken(self, stage: int, operator: int) -> float:
        """Of the operator's seconds."""
        unsplit = 0.0
        if self.problem.unsplit_DO is not None and self.fraction(stage, operator) < 1:
            unsplit = float(self.problem.unsplit_DO[self.device(stage), operator])
        return unsplit + (1 - unsplit) * self.fraction(stage, operator)

    def own_s(self, stage: int, phase: Phase) -> float:
        device, costs = self.device(stage), self.costs
        backward_s_DO = costs.input_s_DO if self.schedule is Schedule.ZERO_BUBBLE else costs.backward_s_DO
        seconds_DO, loss_s_D = {
            Phase.FORWARD: (costs.forward_s_DO, costs.loss_forward_s_D),
            Phase.BACKWARD: (backward_s_DO, costs.loss_backward_s_D),
            Phase.WEIGHT: (costs.weight_s_DO, 0 * costs.loss_backward_s_D),
        }[phase]
        own_s = sum(float(seconds_DO[device, o]) * self.taken(stage, o) for o in self.stages[stage].operators)
        return own_s + self.is_last(stage) * float(loss_s_D[device])

    def exchange_s(self, stage: int, phase: Phase) -> float:
        """The longest that any of the team is busy with sending to and receiving from the others."""
        shard, team = self.shard(stage), self.team(stage)
        if shard is None:
            return 0.0
        binding = {"rows": self.costs.tensor_bytes["x"] // (4 * int(self.graph.tensors["x"].shape[1]))}
        longest_s = 0.0
        slowest_s = max(self.problem.cluster.devices[self.device(k)].delay_s for k in team)
        for member in team:
            spent_s = 0.0
            for operator in shard.graph.operators:
                kind = operator.target.removeprefix("collective:")
                if (kind == "spread") != (phase is Phase.BACKWARD) or kind == operator.target:
                    continue
                name = operator.name
                spent_s += slowest_s * (1 if kind == "gather" or len(team) == 2 else 2)
                elements = prod(evaluate(size, binding) for size in shard.graph.tensors[name].shape)
                for other in (k for k in team if k != member):
                    link = self.link(member, other)
                    times = 1 if kind == "gather" else 2
                    messages = times if len(team) > 2 else 1
                    sent_s = messages * link.latency_s
                    sent_s += times * 4 * elements / len(team) / link.bandwidth_bytes_per_s
                    spent_s += sent_s * self.slowness(member, other) * (2 if link.occupies_device else 1)
            longest_s = max(longest_s, spent_s)
        return longest_s

    def seconds(self, stage: int, phase: Phase) -> float:
        forward_s = max(self.own_s(member, Phase.FORWARD) for member in self.team(stage))
        forward_s += self.exchange_s(stage, Phase.FORWARD)
        if phase is Phase.FORWARD:
            return forward_s
        backward_s = max(self.own_s(member, phase) for member in self.team(stage))
        if phase is Phase.WEIGHT:
            return backward_s
        return backward_s + self.exchange_s(stage, phase) + self.stages[stage].recompute * forward_s

    def sent(self, source: int, target: int) -> list[str]:
        if self.stages[source].operators == self.stages[target].operators or self.team(source)[0] != source:
            return []  # the first shard sends to all
        first, second = sorted((source, target))
        names = super().sent(first, second)
        return [n for n in names if source < target or self.graph.tensors[n].requires_grad]

    def transfer_s(self, stage: int) -> float:
        """Per step: messages at both of their ends, and exchanges; sums of gradients are not counted."""
        runs = [set(own) for own in self.layout.runs_S]
        each_s = self.exchange_s(stage, Phase.FORWARD) + self.exchange_s(stage, Phase.BACKWARD)
        if self.stages[stage].recompute:
            each_s += self.exchange_s(stage, Phase.FORWARD)
        spent_s = len(runs[stage]) * each_s
        for other in range(len(self.stages)):
            both_s = self.message_s(stage, other, stage) + self.message_s(other, stage, stage)
            spent_s += len(runs[stage] & runs[other]) * both_s
        return spent_s

    def state_bytes(self, stage: int) -> float:
        shard = self.shard(stage)
        held = (
            shard.graph.parameters
            if shard
            else {n: self.graph.parameters[n] for n in self.held_parameters(stage)}
        )
        return sum(4 * prod(p.shape) for p in held.values())

    def end_s(self, free_s: list[float]) -> float:
        after_s: list[float] = []
        for stage, planned in enumerate(self.stages):
            alike = [
                k
                for k, other in enumerate(self.stages)
                if other.operators == planned.operators and other.shard == planned.shard
            ]
            end_s = max(free_s[k] for k in alike)
            for other in (k for k in alike if k != stage):
                link = self.link(stage, other)
                sum_s = 2 * link.latency_s
                sum_s += 2 * self.state_bytes(stage) / len(alike) / link.bandwidth_bytes_per_s
                end_s += sum_s * self.slowness(stage, other) * (2 if link.occupies_device else 1)
            update_s = self.state_bytes(stage) * float(
                self.problem.optimizer_s_per_byte_D[self.device(stage)]
            )
            after_s.append(end_s + update_s)
        return max(after_s)

    def memory_bytes(self, stage: int) -> float:
        graph, costs, own = self.graph, self.costs, set(self.stages[stage].operators)
        shard = self.shard(stage)
        fixed = (2 + self.problem.optimizer_state_ratio) * self.state_bytes(stage)
        fixed += max(float(costs.workspace_bytes_O[o]) * self.fraction(stage, o) for o in own)
        if 0 in own:
            fixed += self.count * costs.tensor_bytes["x"]
        kept: dict[str, float] = {}
        for saved, size_bytes in zip(graph.saved, costs.saved_bytes_R, strict=True):
            producer = graph.tensors[saved.name].producer
            if producer in own and own & set(saved.operators):
                parted = shard is not None and saved.name not in shard.graph.tensors
                kept[saved.name] = float(size_bytes) * (self.fraction(stage, producer) if parted else 1.0)
        others = range(len(self.stages))
        received = {n for s in others if s < stage for n in self.sent(s, stage)}
        sent = {n for t in others if t > stage for n in self.sent(self.team(stage)[0], t)}
        of, loss = costs.tensor_bytes, self.is_last(stage) * costs.loss_saved_bytes
        phases = [phase for phase, _ in self.layout.order(self.schedule, stage)]
        forwards, backwards, weights = (np.cumsum([p is phase for p in phases]) for phase in Phase)
        running, waiting = forwards - backwards, backwards - weights if weights.any() else 0 * weights
        deferred = sum(self.deferred_bytes(o) * self.fraction(stage, o) for o in own)
        inputs = sum(of[n] for n in received)
        if self.stages[stage].recompute:
            held = running * (inputs + sum(of[n] for n in sent)) + waiting * deferred
            return fixed + np.max(held, initial=0) + sum(kept.values()) + loss
        outputs = sum(of[n] for n in sent - kept.keys())
        held = running * (inputs + outputs + sum(kept.values()) + loss) + waiting * deferred
        return fixed + np.max(held, initial=0)
