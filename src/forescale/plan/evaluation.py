"""What candidate splits are predicted to take: seconds of a step, bytes on each device.

Axes as in :mod:`forescale.plan.line`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forescale.plan.line import Mask, Splits
from forescale.plan.memory import Footprint, footprint
from forescale.plan.partition_plan import Schedule
from forescale.plan.problem import Array, PartitionProblem
from forescale.plan.schedule import Layout, PipelineTimes, simulate_step
from forescale.plan.workload import IntArray

INFEASIBLE = 1e9
"""Score of a split that does not fit, to which the missing bytes are added; no step takes as many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pricing:
    """The cluster as arrays; axis D follows ``cluster.devices``.

    Attributes:
        latency_s_DD, unit_s_DD: seconds of a message between two devices, and per byte of it. Where it
            occupies both, that is what the first one spends on it: the slower, the longer.
        occupies_DD: whether a message takes compute time from both.
        delay_s_DD: how long a message from the first to the second then waits for that.
    """

    problem: PartitionProblem
    latency_s_DD: Array
    unit_s_DD: Array
    occupies_DD: Mask
    delay_s_DD: Array
    capacity_bytes_D: Array

    @classmethod
    def of(cls, problem: PartitionProblem) -> Pricing:
        devices = problem.cluster.devices
        links = [[problem.cluster.link(a.name, b.name) for b in devices] for a in devices]
        occupies_DD = np.array([[link.occupies_device for link in row] for row in links])
        slowness_DD = np.where(occupies_DD, 1 / np.array([[device.speed] for device in devices]), 1.0)
        return cls(
            problem=problem,
            latency_s_DD=slowness_DD * np.array([[link.latency_s for link in row] for row in links]),
            unit_s_DD=slowness_DD / np.array([[link.bandwidth_bytes_per_s for link in row] for row in links]),
            occupies_DD=occupies_DD,
            delay_s_DD=np.array([[device.delay_s for device in devices] for _ in devices]),
            capacity_bytes_D=np.array([float(device.memory_bytes) for device in devices]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Candidates with their costs.

    ``score_N``: the step's seconds; INFEASIBLE plus the missing bytes; infinite where it cannot be run.
    """

    times: PipelineTimes
    footprint: Footprint
    recompute_SN: Mask
    memory_bytes_SN: Array
    excess_bytes_SN: Array
    transfer_s_SN: Array
    busy_s_SN: Array
    step_s_N: Array
    score_N: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How a step is run: who runs which microbatches, and in which order.

    Attributes:
        choice: position of the microbatch count on axis C.
    """

    choice: int
    layout: Layout
    schedule: Schedule

    @property
    def microbatches(self) -> int:
        return self.layout.microbatches


def evaluate(
    pricing: Pricing,
    splits: Splits,
    devices_SN: IntArray,
    mode: Mode,
    recompute_SN: Mask | None = None,
) -> Evaluation:
    """Predict one step of every candidate.

    Args:
        splits: with the replicas that the mode says.
        devices_SN: positions of the stages' devices on axis D.
        recompute_SN: stages that recompute; None: those that do not fit otherwise.
    """
    shape, problem, layout = devices_SN.shape, pricing.problem, mode.layout
    device_K, every_K = devices_SN.ravel(), np.arange(devices_SN.size)
    runs_S = [set(runs) for runs in layout.runs_S]
    together_SS1 = np.array([[len(a & b) for b in runs_S] for a in runs_S])[..., None]
    ahead_S = [layout.in_flight(mode.schedule, stage) for stage in range(shape[0])]
    waiting_S = [layout.waiting(mode.schedule, stage) for stage in range(shape[0])]
    bytes_K = footprint(
        splits.spans,
        mode.choice,
        microbatches=mode.microbatches,
        in_flight_K=np.repeat(np.array(ahead_S, dtype=float), shape[1]),
        waiting_K=np.repeat(np.array(waiting_S, dtype=float), shape[1]),
        optimizer_state_ratio=problem.optimizer_state_ratio,
    )
    capacity_K = pricing.capacity_bytes_D[device_K]
    recompute_K = (
        recompute_where_needed(bytes_K, capacity_K, layout.chunks)
        if recompute_SN is None
        else recompute_SN.ravel()
    )
    memory_K = np.where(recompute_K, bytes_K.recomputed_bytes_K, bytes_K.peak_bytes_K)
    excess_SN = (by_device(memory_K, layout.chunks) - capacity_K).reshape(shape)

    forward_K = splits.spans.forward_s_CDK[mode.choice, device_K, every_K]
    split = mode.schedule is Schedule.ZERO_BUBBLE
    backward_s_CDK = splits.spans.input_s_CDK if split else splits.spans.backward_s_CDK
    backward_K = backward_s_CDK[mode.choice, device_K, every_K] + forward_K * recompute_K
    weight_K = splits.spans.weight_s_CDK[mode.choice, device_K, every_K] * split
    optimizer_K = splits.spans.trainable_bytes_K * problem.optimizer_s_per_byte_D[device_K]
    traffic = _price(pricing, splits, devices_SN, mode.choice)
    times = PipelineTimes(
        forward_s_SN=forward_K.reshape(shape),
        backward_s_SN=backward_K.reshape(shape),
        weight_s_SN=weight_K.reshape(shape),
        wire_s_SSN=traffic.wire_s_SSN,
        sending_s_SSN=traffic.sent_s_SSN * traffic.occupies_SSN,
        receiving_s_SSN=traffic.received_s_SSN * traffic.occupies_SSN,
        shares_SSN=traffic.shares_SSN,
        exchange_s_SN=traffic.exchange_s_SN,
        reduction_s_N=_reduction_s_N(pricing, devices_SN[: layout.devices]),
        optimizer_s_SN=optimizer_K.reshape(shape),
    )
    worst_N = excess_SN.max(axis=0)
    step_s_N = simulate_step(mode.schedule, layout, times)
    runs_S1 = np.array([len(runs) for runs in runs_S])[:, None]
    compute_s_SN = times.forward_s_SN + times.backward_s_SN + times.weight_s_SN
    busy_s_SN = runs_S1 * compute_s_SN + times.optimizer_s_SN
    return Evaluation(
        footprint=bytes_K,
        times=times,
        recompute_SN=recompute_K.reshape(shape),
        memory_bytes_SN=memory_K.reshape(shape),
        excess_bytes_SN=excess_SN,
        transfer_s_SN=traffic.message_s_SN(together_SS1) + traffic.exchange_s_SN,
        busy_s_SN=busy_s_SN + traffic.message_s_SN(together_SS1 * traffic.occupies_SSN) + traffic.taken_s_SN,
        step_s_N=step_s_N,
        score_N=np.where(
            _barred_N(splits, layout), np.inf, np.where(worst_N > 0, INFEASIBLE + worst_N, step_s_N)
        ),
    )


def recompute_where_needed(bytes_K: Footprint, capacity_K: Array | float, chunks: int = 1) -> Mask:
    """Recomputation costs a forward, so a device does it only if it does not fit otherwise (and it helps)."""
    peak_K = by_device(bytes_K.peak_bytes_K, chunks)
    return (peak_K > capacity_K) & (bytes_K.recomputed_bytes_K < bytes_K.peak_bytes_K)


def by_device(value_K: Array, chunks: int) -> Array:
    """For every stage, the sum over all stages of its device, of which each has so many."""
    return np.tile(value_K.reshape(chunks, -1).sum(axis=0), chunks)


def _barred_N(splits: Splits, layout: Layout) -> Mask:
    """Where a stage with replicas changes a buffer: each replica would see its own microbatches only."""
    replicated_S = np.bincount(layout.positions_S)[list(layout.positions_S)] > 1
    changing_SN = splits.spans.changing_K.reshape(len(replicated_S), -1) > 0
    barred_N: Mask = (changing_SN & replicated_S[:, None]).max(axis=0)
    return barred_N


@dataclass(frozen=True, slots=True, kw_only=True)
class _Traffic:
    """Seconds of messages from stage to stage, for who sends and for who receives them."""

    shares_SSN: Mask
    occupies_SSN: Mask
    wire_s_SSN: Array
    sent_s_SSN: Array
    received_s_SSN: Array
    exchange_s_SN: Array
    taken_s_SN: Array

    def message_s_SN(self, times_SSN: Array) -> Array:
        """Of all that a stage sends and receives, so many times."""
        sent_s_SN = (self.sent_s_SSN * times_SSN).sum(axis=1)
        received_s_SN: Array = sent_s_SN + (self.received_s_SSN * times_SSN).sum(axis=0)
        return received_s_SN


def _price(pricing: Pricing, splits: Splits, devices_SN: IntArray, choice: int) -> _Traffic:
    ends = (devices_SN[:, None], devices_SN[None, :])
    apart_SSN = ends[0] != ends[1]  # stages of one device hand tensors over where they are
    occupies_SSN, unit_s_SSN = pricing.occupies_DD[ends], pricing.unit_s_DD[ends]

    def message_s_SSN(ends: tuple[IntArray, IntArray]) -> Array:
        """What each end spends on messages from the first S to the second."""
        latency_s_SSN = splits.messages_SSN * pricing.latency_s_DD[ends]
        return (latency_s_SSN + splits.bytes_CSSN[choice] * pricing.unit_s_DD[ends]) * apart_SSN

    summed_SSN = splits.summed_bytes_SSN * apart_SSN
    # Each holder sends each other one twice; only a link beside the devices does both ways at once.
    latency_s_SSN = 2 * (summed_SSN > 0) * pricing.latency_s_DD[ends]
    sum_s_SSN = (latency_s_SSN + summed_SSN * unit_s_SSN) * (1 + occupies_SSN)
    exchange_s_SN = sum_s_SSN.sum(axis=1)
    sent_s_SSN, delay_s_SSN = message_s_SSN(ends), pricing.delay_s_DD[ends] * apart_SSN
    wire_s_SSN = np.where(occupies_SSN, 0.0, sent_s_SSN) + delay_s_SSN
    return _Traffic(
        shares_SSN=summed_SSN > 0,
        occupies_SSN=occupies_SSN,
        wire_s_SSN=np.where(splits.messages_SSN > 0, wire_s_SSN, -np.inf),
        sent_s_SSN=sent_s_SSN,
        received_s_SSN=message_s_SSN((ends[1], ends[0])),
        exchange_s_SN=exchange_s_SN,
        taken_s_SN=(sum_s_SSN * occupies_SSN).sum(axis=1),
    )


def _reduction_s_N(pricing: Pricing, devices_DN: IntArray) -> Array:
    """A ring of one number per device, there and back (Patarasuk and Yuan, 2009); -inf without clipping."""
    devices, candidates = devices_DN.shape
    if not pricing.problem.clips_norm:
        return np.full(candidates, -np.inf)
    slowest_s_N = pricing.latency_s_DD[devices_DN[:, None], devices_DN[None, :]].max(axis=(0, 1))
    return 2 * (devices - 1) * slowest_s_N
