"""How the requests to a model are queued and put into batches, as its deployment asks. Pure."""

from __future__ import annotations

from dataclasses import replace

from forescale.engine.serve.policy import QueuePolicy
from forescale.registry.records import DeploymentSpec


def queue_policy(spec: DeploymentSpec, batch_rows: int | None = None) -> QueuePolicy:
    """What the deployment says, and where it says nothing, what holds for all.

    Args:
        batch_rows: rows of the largest batch that is answered in time, as measured.
    """
    said = {
        "max_rows": spec.max_batch,
        "max_wait_s": spec.max_wait_s,
        "timeout_s": spec.timeout_s,
        "max_requests": spec.queue,
    }
    given = {name: value for name, value in said.items() if value is not None}
    return replace(QueuePolicy(batch_rows=batch_rows), **given)
