"""Everything before the first step: capture the model, start it on the workers, measure it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from statistics import median

import numpy as np

from forescale.control.costs import ProfiledCosts
from forescale.core.cluster import Cluster, DeviceKind
from forescale.core.errors import InvalidInput, TaskFailed
from forescale.engine.train.engine import TrainingEngine
from forescale.engine.train.optimizer import optimizer_template
from forescale.engine.train.profiling import WorkerProfile
from forescale.engine.train.shards import Checkpoint
from forescale.engine.train.task import Batch, TrainingTask, batch_rows, microbatch_rows, split_rows
from forescale.graph.capture import CapturedModel, capture, flatten_inputs
from forescale.graph.model import ModelGraph
from forescale.graph.saved import measure_saved
from forescale.graph.size import violated
from forescale.profile.devices import measure_devices
from forescale.profile.measurement import Array, typical
from forescale.profile.model import KindProfile, ModelProfile
from forescale.profile.rated import RatedProfile, Rates

Progress = Callable[[str], None]

MICROBATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Numbers of microbatches a plan may use."""
_MORE_MICROBATCHES = (48, 64, 96, 128, 192, 256)  # of them, twice as many as there are devices

_LOOKED_AT = 8  # batches whose sizes decide at which sizes the model is measured
_MEASURED = (2, 4, 16)  # numbers of microbatches whose sizes are measured; costs between are interpolated
_BUDGET_S = 1.2  # per size
_DEVICES_BUDGET_S = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A task that is ready to be planned and run.

    Attributes:
        batches: all batches, those that were looked at included.
        describe: a batch's binding.
    """

    costs: ProfiledCosts
    batches: Iterator[Batch]
    describe: Callable[[Batch], Mapping[str, int]]


def batches_from(task: TrainingTask, first_step: int) -> Iterator[Batch]:
    """The batches that are left; those that were trained on before a resume are read and dropped.

    Nothing is read, and the user's code not called, before the first one is asked for.
    """
    yield from islice(task.batches, first_step, None)


def prepare(
    task: TrainingTask,
    batches: Iterator[Batch],
    cluster: Cluster,
    engine: TrainingEngine,
    checkpoint: Checkpoint | None,
    progress: Progress,
) -> Prepared:
    """Captures the task's model and measures it on the engine's workers, which are starting meanwhile."""
    looked_at = _first_batches(batches)
    progress("capturing the model")
    captured, describe = capture_task(task, looked_at[0])
    if checkpoint is not None:
        checkpoint.check(captured.graph)
    count, most = len(cluster.devices), len(captured.graph.operators)
    if count > most:
        raise InvalidInput(
            f"{count} devices are more than the model's {most} operators; ask for at most {most}"
        )
    if not any(parameter.trainable for parameter in captured.graph.parameters.values()):
        raise TaskFailed("the model has no parameter to train: none that its output depends on requires grad")
    template = optimizer_template(task, {name: captured.state[name] for name in captured.graph.parameters})
    progress("waiting for the workers")
    engine.set_up(task, captured, template)
    progress("measuring devices and links")
    measured = measure_devices(cluster, budget_s=_DEVICES_BUDGET_S)
    progress("timing operators on every device")
    pieces = _pieces_to_measure(task, looked_at, captured.graph, describe)
    answers = engine.profile(pieces, _BUDGET_S)
    args, kwargs = task.call(looked_at[0])
    costs = ProfiledCosts(
        profile=_profile(captured.graph, cluster, answers, template.state_ratio),
        cluster=measured,
        rows_symbol=_rows_symbol(captured.graph),
        rows=batch_rows(args, kwargs),
        microbatches=MICROBATCHES,
        clips_norm=task.clip_norm is not None,
        shardable=template.shardable,
    )
    return Prepared(costs=costs, batches=chain(looked_at, batches), describe=describe)


def profile_task(
    task: TrainingTask, cluster: Cluster, directory: Path, progress: Progress
) -> tuple[ProfiledCosts, tuple[Mapping[str, int], ...]]:
    """Measures a task on a cluster's devices without training.

    Args:
        directory: where the workers' output goes.

    Returns:
        The costs, and the bindings of the first batches.
    """
    with TrainingEngine(cluster, directory) as engine:
        prepared = prepare(task, batches_from(task, 0), cluster, engine, None, progress)
        bindings = tuple(prepared.describe(batch) for batch in islice(prepared.batches, _LOOKED_AT))
        engine.close()
    return prepared.costs, bindings


def rate_task(
    task: TrainingTask, cluster: Cluster, rates: Mapping[str, Rates], progress: Progress
) -> tuple[ProfiledCosts, tuple[Mapping[str, int], ...]]:
    """What a task costs on devices that are not here, from what they sustain.

    Args:
        rates: by the device's name.

    Returns:
        The costs, and the bindings of the first batches.
    """
    batches = _first_batches(batches_from(task, 0))
    progress("capturing the model")
    captured, describe = capture_task(task, batches[0])
    template = optimizer_template(task, {n: captured.state[n] for n in captured.graph.parameters})
    args, kwargs = task.call(batches[0])
    most = 2 * len(cluster.devices)
    costs = ProfiledCosts(
        profile=RatedProfile.of(captured.graph, rates, template.state_ratio),
        cluster=cluster,
        rows_symbol=_rows_symbol(captured.graph),
        rows=batch_rows(args, kwargs),
        microbatches=(*MICROBATCHES, *(count for count in _MORE_MICROBATCHES if count <= most)),
        clips_norm=task.clip_norm is not None,
        shardable=template.shardable,
    )
    return costs, tuple(map(describe, batches))


def capture_task(
    task: TrainingTask, batch: Batch
) -> tuple[CapturedModel, Callable[[Batch], Mapping[str, int]]]:
    """The captured model with its saved storages, and what gives a batch's binding."""
    args, kwargs = task.call(batch)
    batch_rows(args, kwargs)  # before the capture, whose complaint would be harder to understand
    captured = capture(task.model, args, kwargs, task.autocast)
    captured = replace(captured, graph=measure_saved(captured.graph, captured.modules))

    def describe(batch: Batch) -> Mapping[str, int]:
        args, kwargs = task.call(batch)
        batch_rows(args, kwargs)
        inputs = captured.inputs.feed(args, kwargs)
        for name, tensor in inputs.items():
            found, expected = str(tensor.dtype).removeprefix("torch."), captured.graph.tensors[name].dtype
            if found != expected:
                raise InvalidInput(
                    f"batch input {name} is {found}, but the model was captured with {expected}; "
                    "all batches must have the same dtypes"
                )
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        return captured.graph.bind(shapes)

    return captured, describe


def _first_batches(batches: Iterator[Batch]) -> list[Batch]:
    try:
        found = list(islice(batches, _LOOKED_AT))
    except Exception as error:
        raise TaskFailed(f"the batches could not be read: {type(error).__name__}: {error}") from error
    if not found:
        raise TaskFailed("there are no batches to train on")
    return found


def _pieces_to_measure(
    task: TrainingTask,
    batches: Sequence[Batch],
    graph: ModelGraph,
    describe: Callable[[Batch], Mapping[str, int]],
) -> list[Batch]:
    """Microbatches of a few sizes that the model allows, of the smallest and the largest batch in view."""
    microbatches = _MEASURED if _rows_symbol(graph) else (1,)
    by_size = sorted(batches, key=lambda batch: sum(t.numel() for t in flatten_inputs(*task.call(batch))))
    pieces: dict[tuple[tuple[int, ...], ...], Batch] = {}
    for batch in (by_size[0], by_size[-1]):
        rows = batch_rows(*task.call(batch))
        cut = [split_rows(batch, microbatch_rows(rows, count))[0] for count in microbatches]
        for piece in [p for p in cut if violated(graph.conditions, describe(p)) is None] or [batch]:
            pieces.setdefault(tuple(tuple(t.shape) for t in flatten_inputs(*task.call(piece))), piece)
    return list(pieces.values())


def _profile(
    graph: ModelGraph, cluster: Cluster, answers: Sequence[WorkerProfile], state_ratio: float
) -> ModelProfile:
    of_kind: dict[DeviceKind, list[WorkerProfile]] = {}
    for device, answer in zip(cluster.devices, answers, strict=True):
        of_kind.setdefault(device.kind, []).append(answer)
    return ModelProfile(
        graph=graph,
        kinds={
            kind: KindProfile(
                measurements=tuple(map(typical, zip(*(a.measurements for a in alike), strict=True))),
                optimizer_s_per_byte=median(a.optimizer_s_per_byte for a in alike),
                memory=alike[0].memory,
                unsplit_O=_middle([a.unsplit_O for a in alike if a.unsplit_O is not None]),
            )
            for kind, alike in of_kind.items()
        },
        optimizer_state_ratio=state_ratio,
    )


def _middle(values: Sequence[Array]) -> Array | None:
    return np.median(values, axis=0) if values else None


def _rows_symbol(graph: ModelGraph) -> str | None:
    first = graph.tensors[graph.inputs[0]].shape
    return first[0] if first and isinstance(first[0], str) else None
