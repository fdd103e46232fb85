"""How much memory a stage needs at its peak.

    parameters + buffers + gradients + optimiser state + its part of the whole batch
    + in-flight microbatches * (received + saved for the backward + sent and not saved) + workspace
    + waiting microbatches * (read again and gradients received, for gradients of parameters computed later)

With recomputation, what autograd saves exists for one microbatch at a time:

    … + in-flight microbatches * (received + sent) + saved + workspace
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forescale.plan.line import Spans
from forescale.plan.problem import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of intervals K of a line.

    Attributes:
        fixed_bytes_K: independent of the batch's size; the rest grows with it.
        peak_bytes_K: with everything that autograd saves kept; ``recomputed_bytes_K``: with recomputation.
    """

    fixed_bytes_K: Array
    peak_bytes_K: Array
    recomputed_bytes_K: Array


def footprint(
    spans: Spans,
    choice: int,
    *,
    microbatches: int,
    in_flight_K: Array | int,
    waiting_K: Array | int,
    optimizer_state_ratio: float,
) -> Footprint:
    """Peak memory of intervals. ``choice``: position of ``microbatches`` on axis C."""
    fixed_K = spans.state_bytes_K + (1 + optimizer_state_ratio) * spans.trainable_bytes_K
    always_K = fixed_K + microbatches * spans.input_bytes_CK[choice] + spans.workspace_bytes_CK[choice]
    received_K, kept_K = spans.received_bytes_CK[choice], spans.kept_bytes_CK[choice]
    deferred_K = spans.deferred_bytes_CK[choice]

    def most(microbatch_K: Array) -> Array:
        # A backward ends one microbatch's flight and lets one more wait.
        before_K = in_flight_K * microbatch_K + np.maximum(waiting_K - 1, 0) * deferred_K
        return np.maximum(before_K, (in_flight_K - 1) * microbatch_K + waiting_K * deferred_K)

    return Footprint(
        fixed_bytes_K=fixed_K,
        peak_bytes_K=always_K + most(received_K + kept_K + spans.sent_only_bytes_CK[choice]),
        recomputed_bytes_K=always_K + most(received_K + spans.sent_bytes_CK[choice]) + kept_K,
    )
