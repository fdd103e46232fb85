"""Hardware one could run on, with public figures, and which of it suits a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forescale.graph.cost import CostArrays

COMPUTE_EFFICIENCY = 0.4
"""Share of the peak rate that well-made training reaches: 0.21 to 0.46 for the large models in
Chowdhery et al., *PaLM*, 2022, table 3."""
BANDWIDTH_EFFICIENCY = 0.75
DISPATCH_S = 5e-6
"""Starting one operator on an accelerator."""
USABLE_MEMORY = 0.9
"""The rest is taken by the runtime and by gaps between allocations."""
SPEEDUP = 10.0
"""How much faster than here a step shall be when nobody says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device as its vendor describes it.

    Attributes:
        kind: ``CPU``, ``GPU``, ``TPU`` or ``ASIC``.
        float32_flops_per_s, half_flops_per_s: dense peak rates; half is bfloat16, else float16.
    """

    name: str
    kind: str
    float32_flops_per_s: float
    half_flops_per_s: float
    memory_bandwidth_bytes_per_s: float
    memory_bytes: float


HARDWARE: Sequence[Hardware] = (
    # amd.com, EPYC 9654: 96 cores at 2.4 GHz, 32 float32 FLOP per core and cycle; 460.8 GB/s, up to 6 TB.
    Hardware(
        name="AMD EPYC 9654",
        kind="CPU",
        float32_flops_per_s=96 * 2.4e9 * 32,
        half_flops_per_s=96 * 2.4e9 * 64,
        memory_bandwidth_bytes_per_s=460.8e9,
        memory_bytes=6e12,
    ),
    # NVIDIA T4 datasheet: 8.1 TFLOPS, 65 TFLOPS float16, 16 GB, 320 GB/s.
    Hardware(
        name="NVIDIA T4",
        kind="GPU",
        float32_flops_per_s=8.1e12,
        half_flops_per_s=65e12,
        memory_bandwidth_bytes_per_s=320e9,
        memory_bytes=16e9,
    ),
    # NVIDIA L4 datasheet: 30.3 TFLOPS, 242 TFLOPS bfloat16 with sparsity (half of it dense), 24 GB, 300 GB/s.
    Hardware(
        name="NVIDIA L4",
        kind="GPU",
        float32_flops_per_s=30.3e12,
        half_flops_per_s=121e12,
        memory_bandwidth_bytes_per_s=300e9,
        memory_bytes=24e9,
    ),
    # NVIDIA A10 datasheet: 31.2 TFLOPS, 125 TFLOPS bfloat16, 24 GB, 600 GB/s.
    Hardware(
        name="NVIDIA A10",
        kind="GPU",
        float32_flops_per_s=31.2e12,
        half_flops_per_s=125e12,
        memory_bandwidth_bytes_per_s=600e9,
        memory_bytes=24e9,
    ),
    # cloud.google.com/tpu/docs/v5e: 197 TFLOPS bfloat16 per chip, 16 GB, 819 GB/s.
    # A TPU runs float32 matmuls as bfloat16 unless told otherwise.
    Hardware(
        name="Google TPU v5e",
        kind="TPU",
        float32_flops_per_s=197e12,
        half_flops_per_s=197e12,
        memory_bandwidth_bytes_per_s=819e9,
        memory_bytes=16e9,
    ),
    # AWS Neuron documentation, Trainium architecture: 47.5 TFLOPS float32, 190 bfloat16, 32 GiB, 820 GiB/s.
    Hardware(
        name="AWS Trainium",
        kind="ASIC",
        float32_flops_per_s=47.5e12,
        half_flops_per_s=190e12,
        memory_bandwidth_bytes_per_s=820 * 2**30,
        memory_bytes=32 * 2**30,
    ),
    # NVIDIA A100 80GB SXM datasheet: 19.5 TFLOPS, 312 TFLOPS bfloat16, 80 GB, 2,039 GB/s.
    Hardware(
        name="NVIDIA A100",
        kind="GPU",
        float32_flops_per_s=19.5e12,
        half_flops_per_s=312e12,
        memory_bandwidth_bytes_per_s=2039e9,
        memory_bytes=80e9,
    ),
    # cloud.google.com/tpu/docs/v5p: 459 TFLOPS bfloat16 per chip, 95 GB, 2,765 GB/s.
    Hardware(
        name="Google TPU v5p",
        kind="TPU",
        float32_flops_per_s=459e12,
        half_flops_per_s=459e12,
        memory_bandwidth_bytes_per_s=2765e9,
        memory_bytes=95e9,
    ),
    # NVIDIA H100 SXM datasheet: 67 TFLOPS, 1,979 TFLOPS bfloat16 with sparsity (half of it dense),
    # 80 GB, 3.35 TB/s.
    Hardware(
        name="NVIDIA H100",
        kind="GPU",
        float32_flops_per_s=67e12,
        half_flops_per_s=989.5e12,
        memory_bandwidth_bytes_per_s=3.35e12,
        memory_bytes=80e9,
    ),
    # NVIDIA H200 SXM datasheet: rates of the H100, 141 GB, 4.8 TB/s.
    Hardware(
        name="NVIDIA H200",
        kind="GPU",
        float32_flops_per_s=67e12,
        half_flops_per_s=989.5e12,
        memory_bandwidth_bytes_per_s=4.8e12,
        memory_bytes=141e9,
    ),
)
"""From the smallest to the largest, as they are rented."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model on one piece of hardware; ``step_s`` is a rough estimate from peak rates."""

    hardware: Hardware
    step_s: float
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """All candidates, smallest first, and the chosen one (None: nothing holds the model)."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    reason: str


def suggest_hardware(
    work: CostArrays, *, needed_bytes: float, step_s: float, target_s: float | None = None, half: bool = False
) -> Suggestion:
    """The smallest hardware that holds the model and trains it fast enough; else the fastest that holds it.

    Args:
        work: FLOPs and bytes of one whole step, by operator.
        needed_bytes: peak memory on one device.
        step_s: what a step takes now.
        target_s: what it shall take (default: a tenth of now).
        half: bfloat16 autocast is on.
    """
    target_s = step_s / SPEEDUP if target_s is None else target_s
    candidates = tuple(
        Candidate(
            hardware=hardware,
            step_s=estimate_step_s(work, hardware, half=half),
            fits=needed_bytes <= USABLE_MEMORY * hardware.memory_bytes,
        )
        for hardware in HARDWARE
    )
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        largest = max(candidate.hardware.memory_bytes for candidate in candidates)
        count = int(np.ceil(needed_bytes / (USABLE_MEMORY * largest)))
        return Suggestion(
            candidates=candidates,
            chosen=None,
            reason=f"nothing holds it alone; split it over {count} or more devices",
        )
    enough = next((candidate for candidate in fitting if candidate.step_s <= target_s), None)
    chosen = enough or min(fitting, key=lambda candidate: candidate.step_s)
    size = f"holds the {needed_bytes / 1e9:.2g} GB and takes about {chosen.step_s:.2g} s a step"
    reason = (
        f"the smallest that {size}"
        if enough
        else f"{size}, the least there is; {target_s:.2g} s needs several"
    )
    return Suggestion(candidates=candidates, chosen=chosen, reason=f"{chosen.hardware.name}: {reason}")


def estimate_step_s(work: CostArrays, hardware: Hardware, *, half: bool = False) -> float:
    """Roofline time of a step: every operator takes its arithmetic or its traffic, whichever is longer."""
    peak = hardware.half_flops_per_s if half else hardware.float32_flops_per_s
    total_s = 0.0
    for flops_O, bytes_O in (
        (work.forward_flops_O, work.forward_bytes_O),
        (work.backward_flops_O, work.backward_bytes_O),
    ):
        compute_s_O = flops_O / (COMPUTE_EFFICIENCY * peak)
        traffic_s_O = bytes_O / (BANDWIDTH_EFFICIENCY * hardware.memory_bandwidth_bytes_per_s)
        total_s += float(np.maximum(compute_s_O, traffic_s_O).sum() + DISPATCH_S * np.count_nonzero(bytes_O))
    return total_s
