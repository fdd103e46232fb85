"""What is asked of a deployment, over HTTP and in pool files."""

from __future__ import annotations

from pydantic import Field

from forescale.api.http import Strict
from forescale.registry.records import LAST_PRIORITY, MOST_THREADS, DeploymentSpec

_MOST_REPLICAS = 10_000


class NewDeployment(Strict):
    """What is to be served, as it is asked for."""

    version: int | str
    min_replicas: int = Field(default=1, ge=0, le=_MOST_REPLICAS)
    max_replicas: int | None = Field(default=None, ge=1, le=_MOST_REPLICAS)
    latency_ms: float | None = Field(default=None, gt=0.0)
    priority: int = Field(default=10, ge=1, le=LAST_PRIORITY)
    max_batch: int | None = Field(default=None, ge=1)
    max_wait_ms: float | None = Field(default=None, ge=0.0)
    timeout_s: float | None = Field(default=None, gt=0.0)
    queue: int | None = Field(default=None, ge=1)
    max_threads: int | None = Field(default=None, ge=1, le=MOST_THREADS)

    def spec(self, model: str, number: int) -> DeploymentSpec:
        """The deployment of that version.

        Raises:
            InvalidInput: figures contradict each other.
        """
        return DeploymentSpec(
            model=model,
            number=number,
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas or max(self.min_replicas, 1),
            latency_s=None if self.latency_ms is None else self.latency_ms / 1e3,
            priority=self.priority,
            max_batch=self.max_batch,
            max_wait_s=None if self.max_wait_ms is None else self.max_wait_ms / 1e3,
            timeout_s=self.timeout_s,
            queue=self.queue,
            max_threads=self.max_threads,
        )
