"""The planner's question for a batch, from a measured profile."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from forescale.core.cluster import Cluster, Device, DeviceKind, Link
from forescale.graph.json_format import from_json, to_json
from forescale.graph.peak import peak_bytes
from forescale.graph.size import violated
from forescale.plan.partition_plan import PartitionPlan, Stage
from forescale.plan.problem import MicrobatchCosts, PartitionProblem
from forescale.plan.schedule import Layout
from forescale.profile.model import ModelProfile

_SLICE_S = 0.01
"""In which a device's users take turns: between Linux's 3 ms for a process among many and the 100 ms after
which a container's quota is renewed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledCosts:
    """Costs of one model on one cluster.

    Attributes:
        rows_symbol: the graph's symbol for the rows of a batch; None if the model fixes their number.
        rows: rows where the model fixes them.
        microbatches: numbers of microbatches to choose from.
        shardable: whether the optimizer can step parts of parameters.
    """

    profile: ModelProfile
    cluster: Cluster
    rows_symbol: str | None
    rows: int
    microbatches: tuple[int, ...]
    clips_norm: bool
    shardable: bool

    def problem(self, binding: Mapping[str, int], speeds: Mapping[str, float]) -> PartitionProblem:
        """The question for batches with these symbols, with devices at these speeds."""
        devices = tuple(_shared(d, speeds.get(d.name, d.speed)) for d in self.cluster.devices)
        rows = binding[self.rows_symbol] if self.rows_symbol else self.rows
        counts = tuple(count for count in self.microbatches if self._allows(binding, rows, count)) or (1,)
        return PartitionProblem(
            graph=self.profile.graph,
            cluster=replace(self.cluster, devices=devices),
            costs={count: self._costs(binding, rows, count, devices) for count in counts},
            optimizer_s_per_byte_D=self.profile.optimizer_s_per_byte(devices),
            optimizer_state_ratio=self.profile.optimizer_state_ratio,
            clips_norm=self.clips_norm,
            shardable=self.shardable,
            unsplit_DO=self.profile.unsplit(devices),
        )

    def peak_bytes(self, plan: PartitionPlan, binding: Mapping[str, int]) -> tuple[int, ...]:
        """Peak memory of each stage in a step with a batch of this shape; of shards, what their plan says."""
        rows = binding[self.rows_symbol] if self.rows_symbol else self.rows
        count = min(plan.microbatches, rows)
        part = self.profile.graph.part(binding, rows, -(-rows // count))
        layout = Layout.of(plan.stages, count)

        def exact(index: int, stage: Stage) -> int:
            kind, with_loss = self.cluster.device(stage.device).kind, layout.is_last(index)
            return peak_bytes(
                self.profile.stage_bytes(stage.operators, part, kind, with_loss=with_loss),
                microbatches=count,
                in_flight=layout.in_flight(plan.schedule, index),
                waiting=layout.waiting(plan.schedule, index),
                recompute=stage.recompute,
                optimizer_state_ratio=self.profile.optimizer_state_ratio,
            )

        return tuple(
            predicted.memory_bytes if stage.shard else exact(index, stage)
            for index, (stage, predicted) in enumerate(zip(plan.stages, plan.prediction.stages, strict=True))
        )

    def _allows(self, binding: Mapping[str, int], rows: int, count: int) -> bool:
        """Whether the model can run that number of microbatches."""
        if count > rows or (count > 1 and self.rows_symbol is None):
            return False
        graph = self.profile.graph
        sizes = {rows // count, -(-rows // count)}
        return all(violated(graph.conditions, graph.part(binding, rows, size)) is None for size in sizes)

    def _costs(
        self, binding: Mapping[str, int], rows: int, count: int, devices: tuple[Device, ...]
    ) -> MicrobatchCosts:
        """Bytes of the largest microbatch, mean seconds of all: sizes differ by one row at most."""
        small, larger = divmod(rows, count)
        part = self.profile.graph.part
        costs = self.profile.microbatch_costs(part(binding, rows, small + bool(larger)), devices)
        if larger:
            smaller = self.profile.microbatch_costs(part(binding, rows, small), devices)
            share = larger / count
            for key in (
                "forward_s_DO",
                "backward_s_DO",
                "input_s_DO",
                "weight_s_DO",
                "loss_forward_s_D",
                "loss_backward_s_D",
            ):
                costs[key] = share * costs[key] + (1 - share) * smaller[key]
        return MicrobatchCosts(**costs)

    def to_json(self) -> dict[str, Any]:
        """Everything needed to plan again elsewhere, without the model."""
        return {
            "graph": json.loads(to_json(self.profile.graph)),
            "profile": self.profile.to_json(),
            "devices": [asdict(device) for device in self.cluster.devices],
            "default_link": asdict(self.cluster.default_link),
            "links": [[*pair, asdict(link)] for pair, link in self.cluster.links.items()],
            "rows_symbol": self.rows_symbol,
            "rows": self.rows,
            "microbatches": list(self.microbatches),
            "clips_norm": self.clips_norm,
            "shardable": self.shardable,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ProfiledCosts:
        graph = from_json(json.dumps(value["graph"]))
        described: list[dict[str, Any]] = value["devices"]
        devices = tuple(
            replace(Device(**d), kind=DeviceKind(d["kind"]), cores=tuple(d["cores"])) for d in described
        )
        cluster = Cluster(
            devices=devices,
            default_link=Link(**value["default_link"]),
            links={(source, target): Link(**link) for source, target, link in value["links"]},
        )
        return cls(
            profile=ModelProfile.from_json(value["profile"], graph),
            cluster=cluster,
            rows_symbol=value["rows_symbol"],
            rows=value["rows"],
            microbatches=tuple(value["microbatches"]),
            clips_norm=value["clips_norm"],
            shardable=value["shardable"],
        )


def _shared(device: Device, speed: float) -> Device:
    """A device at another speed; slower than it was profiled, it runs for so much of each slice of time.

    What comes meanwhile waits for half of the rest.
    """
    away = max(0.0, 1 - speed / device.speed)
    return replace(device, speed=speed, delay_s=away * away * _SLICE_S / 2)
