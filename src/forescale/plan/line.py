"""Operators laid out on a line, and what the stages cost that a set of cuts makes of it.

A line gives every operator a position 0 … P-1 such that tensors only travel to the right; the loss
stands at position P. A stage is an interval ``[start, end)`` of positions; the last one ends at P+1.
Sums over an interval that count an item once, however many of its operators read it, use the reader
before: of all readers of one item in ``[start, end)``, only the first has its predecessor left of ``start``.

Axes: C = choice of microbatch count, D = device, P = position, E = item and reader, K = interval,
S = stage, N = candidate split, B = boundary of stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from forescale.plan.placement.problem import sums
from forescale.plan.problem import Array
from forescale.plan.workload import Incidence, IntArray, Workload

Mask = npt.NDArray[np.bool_]

_MANY_INTERVALS = 64
"""Intervals beyond which it pays to look for equal ones, and to put items together first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Touches:
    """Readers of items along a line; ``previous_E`` is the reader before (or the maker), -1 if none."""

    item_E: IntArray
    position_E: IntArray
    previous_E: IntArray
    source_E: IntArray

    @classmethod
    def along(cls, incidence: Incidence, position_O: IntArray) -> Touches:
        position_E = position_O[incidence.operator_E]
        order_E = np.lexsort((position_E, incidence.item_E))
        item_E, position_E = incidence.item_E[order_E], position_E[order_E]
        source_E = incidence.source_E[order_E]
        source_E = np.where(source_E < 0, -1, position_O[source_E])
        follows_E = np.append(False, item_E[1:] == item_E[:-1])[: len(item_E)]
        previous_E = np.where(follows_E, np.roll(position_E, 1), source_E)
        new_E = previous_E < position_E
        return cls(
            item_E=item_E[new_E],
            position_E=position_E[new_E],
            previous_E=previous_E[new_E],
            source_E=source_E[new_E],
        )

    def within(self, start_K: IntArray, end_K: IntArray) -> Mask:
        """Which pairs count for an interval, shape (E, K): one per item that it reads but does not make."""
        position_E1, previous_E1 = self.position_E[:, None], self.previous_E[:, None]
        return (previous_E1 < start_K) & (position_E1 >= start_K) & (position_E1 < end_K)


@dataclass(frozen=True, kw_only=True)
class Reaches:
    """Bytes of items I by where they begin and where they are needed last."""

    begin_I: IntArray
    end_I: IntArray
    bytes_CI: Array

    def inside(self, start_K: IntArray, end_K: IntArray) -> Array:
        """Of what begins and is needed last in an interval."""
        its = self._for(start_K)
        inside_IK = (its.begin_I[:, None] >= start_K) & (its.end_I[:, None] < end_K)
        return its.bytes_CI @ inside_IK.astype(float)

    def leaving(self, start_K: IntArray, end_K: IntArray) -> Array:
        """Of what begins in an interval and is needed behind it."""
        its = self._for(start_K)
        begins_IK = (its.begin_I[:, None] >= start_K) & (its.begin_I[:, None] < end_K)
        return its.bytes_CI @ (begins_IK & (its.end_I[:, None] >= end_K)).astype(float)

    def _for(self, start_K: IntArray) -> Reaches:
        return self._merged if len(start_K) > _MANY_INTERVALS else self

    @cached_property
    def _merged(self) -> Reaches:
        """With one item for all that reach from one position to the same other: on a coarse line, many do."""
        size = int(self.end_I.max(initial=0)) + 1
        keys, index_I = np.unique(self.begin_I * size + self.end_I, return_inverse=True)
        begin_I, end_I = np.divmod(keys, size)
        bytes_CI = np.stack([sums(index_I, bytes_I, len(keys)) for bytes_I in self.bytes_CI])
        return Reaches(begin_I=begin_I, end_I=end_I, bytes_CI=bytes_CI)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """What intervals of a line cost, whatever runs in the others.

    Attributes:
        input_s_CDK, weight_s_CDK: the backward in two parts; ``deferred_bytes_CK`` stays of one microbatch
            from the first to the second.
        kept_bytes_CK: storages that autograd keeps for one microbatch, those received not counted.
        sent_bytes_CK: results for later stages.
        sent_only_bytes_CK: those of them that autograd would not keep, but the stage does until
            their gradients have come.
        received_bytes_CK: tensors from earlier stages, each once.
        input_bytes_CK: parts of one microbatch of the batch.
        state_bytes_K: parameters and buffers; ``trainable_bytes_K`` the parameters that are trained.
        changing_K: operators whose forward changes a buffer, or reads one that changes.
    """

    forward_s_CDK: Array
    backward_s_CDK: Array
    input_s_CDK: Array
    weight_s_CDK: Array
    deferred_bytes_CK: Array
    workspace_bytes_CK: Array
    kept_bytes_CK: Array
    sent_bytes_CK: Array
    sent_only_bytes_CK: Array
    received_bytes_CK: Array
    input_bytes_CK: Array
    state_bytes_K: Array
    trainable_bytes_K: Array
    changing_K: IntArray

    def take(self, index_K: IntArray) -> Spans:
        return Spans(**{f.name: getattr(self, f.name)[..., index_K] for f in fields(Spans)})


class Line:
    """Operators at positions, with what sums over intervals need."""

    def __init__(self, workload: Workload, position_O: Sequence[int], length: int) -> None:
        self.workload = workload
        self.length = length
        self.position_O = np.array([*position_O, length], dtype=np.int64)
        order_O = np.argsort(self.position_O, kind="stable")
        self._first_P = np.searchsorted(self.position_O[order_O], np.arange(length + 2))

        def along(value_CDO: Array) -> Array:
            return _prefix(value_CDO[..., order_O])[..., self._first_P]

        self._forward_s_CDP = along(workload.forward_s_CDO)
        self._backward_s_CDP = along(workload.backward_s_CDO)
        self._input_s_CDP = along(workload.input_s_CDO)
        self._weight_s_CDP = along(workload.weight_s_CDO)
        self._deferred_bytes_CP = along(workload.deferred_bytes_CO)
        self._workspace_bytes_LCO = _maxima(workload.workspace_bytes_CO[..., order_O])
        changing_P = np.bincount(self.position_O[workload.changing], minlength=length + 1)
        self._changing_P = np.append(0, np.cumsum(changing_P))
        self.tensors = Touches.along(workload.tensors, self.position_O)
        self._inputs = Touches.along(workload.inputs, self.position_O)
        self._parameters = Touches.along(workload.parameters, self.position_O)
        self._buffers = Touches.along(workload.buffers, self.position_O)
        storages, tensors = workload.storages, workload.tensors
        maker_R = self.position_O[_per_item(np.maximum, storages.item_E, storages.source_E)]
        need_R = _per_item(np.minimum, storages.item_E, self.position_O[storages.operator_E])
        self._source_I = self.position_O[_per_item(np.maximum, tensors.item_E, tensors.source_E)]
        self._last_I = _per_item(np.maximum, tensors.item_E, self.position_O[tensors.operator_E])
        need_I = np.append(need_R, length + 1)[workload.storage_of_I]
        need_I[workload.storage_of_I < 0] = length + 1
        self._kept = Reaches(begin_I=maker_R, end_I=need_R, bytes_CI=workload.saved_bytes_CI)
        message_bytes_CI = workload.message_bytes_CI
        self._sent = Reaches(begin_I=self._source_I, end_I=self._last_I, bytes_CI=message_bytes_CI)
        last_unkept_I = np.minimum(self._last_I, need_I)
        self._sent_only = Reaches(begin_I=self._source_I, end_I=last_unkept_I, bytes_CI=message_bytes_CI)

    def crossing_bytes_P(self) -> Array:
        """Bytes that a cut before each position 0 … P would send of the largest microbatch."""
        bytes_I, size = self.workload.message_bytes_CI[0], self.length + 3
        begun_P = np.bincount(self._source_I + 1, bytes_I, size)
        ended_P = np.bincount(self._last_I + 1, bytes_I, size)
        return np.cumsum(begun_P - ended_P, dtype=float)[: self.length + 1]

    def spans(self, start_K: IntArray, end_K: IntArray) -> Spans:
        work = self.workload

        def between(prefix_CDP: Array) -> Array:
            return prefix_CDP[..., end_K] - prefix_CDP[..., start_K]

        def read(touches: Touches, *weights_I: Array) -> list[Array]:
            mask_EK = touches.within(start_K, end_K).astype(float)
            return [weight_I[..., touches.item_E] @ mask_EK for weight_I in weights_I]

        parameter_bytes_K, trainable_bytes_K = read(
            self._parameters, work.parameter_bytes_I, work.trainable_bytes_I
        )
        return Spans(
            forward_s_CDK=between(self._forward_s_CDP),
            backward_s_CDK=between(self._backward_s_CDP),
            input_s_CDK=between(self._input_s_CDP),
            weight_s_CDK=between(self._weight_s_CDP),
            deferred_bytes_CK=between(self._deferred_bytes_CP),
            workspace_bytes_CK=self._largest_workspace(start_K, end_K),
            kept_bytes_CK=self._kept.inside(start_K, end_K),
            sent_bytes_CK=self._sent.leaving(start_K, end_K),
            sent_only_bytes_CK=self._sent_only.leaving(start_K, end_K),
            received_bytes_CK=read(self.tensors, work.message_bytes_CI)[0],
            input_bytes_CK=read(self._inputs, work.input_bytes_CI)[0],
            state_bytes_K=parameter_bytes_K + read(self._buffers, work.buffer_bytes_I)[0],
            trainable_bytes_K=trainable_bytes_K,
            changing_K=self._changing_P[end_K] - self._changing_P[start_K],
        )

    def summed_bytes(self, bounds_BN: IntArray, positions_S: IntArray, trainable_bytes_SN: Array) -> Array:
        """Bytes that stages send each other to sum gradients, shape (S, S, N), 0 on the diagonal.

        Each of h holders of a parameter adds up one part of its gradient and sends it to the others, so that
        two of them exchange 2/h of it.

        Args:
            bounds_BN: boundaries of the positions; ``positions_S`` the stages' positions, replicas' equal.
            trainable_bytes_SN: of the parameters that each stage holds.
        """
        touches, tied_bytes_SN = self._parameters, np.zeros_like(trainable_bytes_SN)
        summed_bytes_SSN = np.zeros((len(positions_S), *trainable_bytes_SN.shape))
        tied_I = np.flatnonzero(np.bincount(touches.item_E) > 1)
        for item in tied_I[self.workload.trainable_bytes_I[tied_I] > 0]:
            position_E = touches.position_E[touches.item_E == item, None, None]
            reads_ESN = (position_E >= bounds_BN[:-1]) & (position_E < bounds_BN[1:])
            held_SN = reads_ESN.max(axis=0).astype(float)[positions_S]
            size_bytes = self.workload.trainable_bytes_I[item]
            tied_bytes_SN = tied_bytes_SN + size_bytes * held_SN
            summed_bytes_SSN += 2 * size_bytes / held_SN.sum(axis=0) * held_SN[:, None] * held_SN
        replicas_SS = np.equal.outer(positions_S, positions_S)
        number_S1 = replicas_SS.sum(axis=1)[:, None]
        summed_bytes_SSN += replicas_SS[..., None] * (2 * (trainable_bytes_SN - tied_bytes_SN) / number_S1)
        summed_bytes_SSN[np.arange(len(positions_S)), np.arange(len(positions_S))] = 0
        return summed_bytes_SSN

    def _largest_workspace(self, start_K: IntArray, end_K: IntArray) -> Array:
        first_K, stop_K = self._first_P[start_K], self._first_P[end_K]
        level_K = np.log2(stop_K - first_K).astype(np.int64)
        return np.maximum(
            self._workspace_bytes_LCO[level_K, :, first_K],
            self._workspace_bytes_LCO[level_K, :, stop_K - (1 << level_K)],
        ).T


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Candidate splits into S stages, of one line or of several.

    Attributes:
        line_N: index of the candidate's line; ``bounds_BN`` its stages' boundaries, 0 … P+1.
        spans: costs of its stages, axis K being stage-major: ``k = s * N + n``.
        bytes_CSSN: sent per microbatch from a stage to another: tensors to later ones, their
            gradients to earlier ones; ``messages_SSN`` their number.
        summed_bytes_SSN: gradients that both send each other once per step, see :meth:`Line.summed_bytes`.

    Axis S has all replicas; ``bounds_BN`` only the positions they share.
    """

    line_N: IntArray
    bounds_BN: IntArray
    spans: Spans
    bytes_CSSN: Array
    messages_SSN: Array
    summed_bytes_SSN: Array

    def take(self, index_N: IntArray) -> Splits:
        stages, candidates = len(self.summed_bytes_SSN), len(self.line_N)
        index_K = (np.arange(stages)[:, None] * candidates + index_N).ravel()
        rest = {f.name: getattr(self, f.name)[..., index_N] for f in fields(Splits) if f.name != "spans"}
        return Splits(spans=self.spans.take(index_K), **rest)


def cut(lines: Sequence[Line], bounds: Sequence[IntArray], positions: Sequence[int] | None = None) -> Splits:
    """All candidates together that ``bounds[l]``, shape (B, N_l), makes of ``lines[l]``.

    Args:
        positions: of the stages on axis S, where some have replicas.
    """
    positions_S = np.arange(len(bounds[0]) - 1) if positions is None else np.array(positions)
    parts = [
        _cut(index, line, bounds_BN, positions_S)
        for index, (line, bounds_BN) in enumerate(zip(lines, bounds, strict=True))
    ]
    if len(parts) == 1:
        return parts[0]
    stages = len(positions_S)

    def joined(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        return np.concatenate(arrays, axis=-1)

    def joined_by_stage(arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        whole = joined([array.reshape(*array.shape[:-1], stages, -1) for array in arrays])
        return whole.reshape(*whole.shape[:-2], -1)

    spans = {f.name: joined_by_stage([getattr(p.spans, f.name) for p in parts]) for f in fields(Spans)}
    rest = {f.name: joined([getattr(p, f.name) for p in parts]) for f in fields(Splits) if f.name != "spans"}
    return Splits(spans=Spans(**spans), **rest)


def _cut(index: int, line: Line, bounds_BN: IntArray, positions_S: IntArray) -> Splits:
    bytes_CSSN, messages_SSN = _exchanged(line, bounds_BN)
    start_K, end_K = bounds_BN[:-1][positions_S].ravel(), bounds_BN[1:][positions_S].ravel()
    # Replicas, and candidates that differ in one boundary, have most intervals in common.
    if len(start_K) > _MANY_INTERVALS:
        key_K, index_K = np.unique(start_K * (line.length + 2) + end_K, return_inverse=True)
        spans = line.spans(*np.divmod(key_K, line.length + 2)).take(index_K)
    else:
        spans = line.spans(start_K, end_K)
    trainable_bytes_SN = spans.trainable_bytes_K.reshape(len(positions_S), -1)
    pairs = np.ix_(positions_S, positions_S)
    return Splits(
        line_N=np.full(bounds_BN.shape[1], index),
        bounds_BN=bounds_BN,
        spans=spans,
        bytes_CSSN=bytes_CSSN[:, *pairs],
        messages_SSN=messages_SSN[pairs],
        summed_bytes_SSN=line.summed_bytes(bounds_BN, positions_S, trainable_bytes_SN),
    )


def _exchanged(line: Line, bounds_BN: IntArray) -> tuple[Array, Array]:
    """Bytes and number of messages between places of the pipeline, as in :class:`Splits`."""
    work, tensors = line.workload, line.tensors
    places, candidates = len(bounds_BN) - 1, bounds_BN.shape[1]
    begins_PN = np.zeros((line.length + 2, candidates), dtype=np.int64)
    begins_PN[bounds_BN[1:-1], np.arange(candidates)] = 1
    place_PN = np.cumsum(begins_PN, axis=0)
    target_EN, source_EN = place_PN[tensors.position_E], place_PN[tensors.source_E]
    sent_E, sent_N = np.nonzero((source_EN < target_EN) & (place_PN[tensors.previous_E] < target_EN))
    pair = source_EN[sent_E, sent_N] * places + target_EN[sent_E, sent_N]
    item = tensors.item_E[sent_E]

    def between(weight_I: Array) -> Array:
        cells = sums(pair * candidates + sent_N, weight_I[item], places * places * candidates)
        return cells.reshape(places, places, candidates)

    carries_I = work.gradient_bytes_CI.max(axis=0, initial=0.0) > 0
    bytes_CSSN = np.stack(
        [
            between(sent_I) + between(back_I).swapaxes(0, 1)
            for sent_I, back_I in zip(work.message_bytes_CI, work.gradient_bytes_CI, strict=True)
        ]
    )
    messages_SSN = between(np.ones(carries_I.shape)) + between(carries_I.astype(float)).swapaxes(0, 1)
    return bytes_CSSN, messages_SSN


def _per_item(combine: np.ufunc, item_E: IntArray, value_E: IntArray) -> IntArray:
    """Reduce the values of every item's pairs (every item has one)."""
    first_I = np.flatnonzero(np.append(True, item_E[1:] != item_E[:-1])[: len(item_E)])
    return combine.reduceat(value_E, first_I) if len(item_E) else value_E


def _prefix(value_CDO: Array) -> Array:
    padding = [(0, 0)] * (value_CDO.ndim - 1) + [(1, 0)]
    return np.pad(np.cumsum(value_CDO, axis=-1), padding)


def _maxima(value_CO: Array) -> Array:
    """Largest of the 2^l values from each operator on, shape (L, C, O): a sparse table."""
    levels = [value_CO]
    while (1 << len(levels)) <= value_CO.shape[-1]:
        half = 1 << (len(levels) - 1)
        moved = np.concatenate([levels[-1][:, half:], levels[-1][:, -half:]], axis=1)
        levels.append(np.maximum(levels[-1], moved))
    return np.stack(levels)
