"""Batches on a GPU: the next one's inputs come, and the former's outputs leave, while the model runs.

Copies have streams of their own, the same for all models of the process, and nothing is waited for until a
batch's outputs are asked for. Models keep to the current stream, where their weights were made; it and the
others wait for each other only where they are told to.

Arrays go through pinned memory, which the GPU reads and writes itself. References go when all is queued:
torch gives no memory to others before the streams that it was copied or recorded on (``record_stream``) have
done what was queued by then.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.cuda import Event, Stream

from forescale.engine.serve.arrays import Array
from forescale.engine.serve.formats import Done

Compute = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Stage:
    """What was queued on a stream, from ``first`` to ``last``, in the time of the stream."""

    def __init__(self) -> None:
        self.first = Event(enable_timing=True)
        self.last = Event(enable_timing=True, blocking=True)  # who waits leaves its core to others

    @property
    def seconds(self) -> float:
        """When it is over."""
        return self.first.elapsed_time(self.last) / 1e3


class Pipeline:
    """Starts a model's batches.

    Args:
        inputs, outputs: names, in the order in which ``compute`` takes and gives tensors on the GPU.
    """

    def __init__(
        self,
        place: torch.device,
        inputs: Sequence[str],
        outputs: Sequence[str],
        compute: Compute,
    ) -> None:
        self._place = place
        self._inputs = inputs
        self._outputs = outputs
        self._compute = compute

    def start(self, arrays: Mapping[str, Array]) -> BatchOnGpu:
        """Queue a batch; the arrays are copied when this returns.

        A model that itself asks for a value on the GPU waits here for all that was queued before it.
        """
        incoming, outgoing = _copy_streams()
        computing = torch.cuda.current_stream()
        with torch.inference_mode():
            with _queued(incoming) as copied_in:
                tensors = [self._on_gpu(arrays[name]) for name in self._inputs]
            for tensor in tensors:
                tensor.record_stream(computing)
            with _queued(computing, after=copied_in) as computed:
                results = self._compute(tensors)
            with _queued(outgoing, after=computed) as copied_out:
                hosts = [_on_host(result, outgoing) for result in results]
        named = dict(zip(self._outputs, hosts, strict=True))
        return BatchOnGpu((copied_in, computed, copied_out), named)

    def _on_gpu(self, array: Array) -> Tensor:
        return torch.from_numpy(array).pin_memory().to(self._place, non_blocking=True)


class BatchOnGpu:
    """A batch that was queued.

    Attributes:
        stages: copies to the GPU, the model, and copies from it.
    """

    def __init__(self, stages: tuple[Stage, Stage, Stage], outputs: Mapping[str, Tensor]) -> None:
        self.stages = stages
        self._outputs = outputs

    def is_over(self) -> bool:
        try:
            return self.stages[-1].last.query()
        except RuntimeError:  # what the GPU could not do, which wait() raises once more
            return True

    def wait(self) -> Done:
        self.stages[-1].last.synchronize()
        # The stages of batches that follow each other overlap: they come as fast as the longest stage.
        return Done(
            outputs={name: host.numpy() for name, host in self._outputs.items()},
            seconds=max(stage.seconds for stage in self.stages),
        )


@contextmanager
def _queued(stream: Stream, after: Stage | None = None) -> Generator[Stage]:
    """What is done within is queued on a stream, behind another stage."""
    stage = Stage()
    if after is not None:
        stream.wait_event(after.last)
    with torch.cuda.stream(stream):
        stage.first.record(stream)
        yield stage
        stage.last.record(stream)


@cache
def _copy_streams() -> tuple[Stream, Stream]:
    """To the GPU and from it."""
    return Stream(), Stream()


def _on_host(tensor: Tensor, outgoing: Stream) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    if tensor.is_cuda:  # a constant may be elsewhere
        tensor.record_stream(outgoing)
    return host
