"""What is known of memory: measured where a version has had a replica, else guessed from its file's size."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from forescale.control.knowledge import Knowledge
from forescale.control.memory import Memory, Version, guessed_bytes, refusal
from forescale.core.errors import NoRoom
from forescale.engine.serve.orders import PlaneState
from forescale.registry.records import DeploymentSpec
from forescale.registry.registry import Registry


class Accounts:
    """Use it in the thread of its event loop."""

    def __init__(self, registry: Registry, knowledge: Knowledge) -> None:
        self._registry = registry
        self._knowledge = knowledge
        self._guessed_bytes: dict[Version, int] = {}

    async def learn(self, versions: Iterable[Version]) -> None:
        """Read how large the files of versions are, before anything is decided about these.

        Raises:
            RegistryFailed: that cannot be read.
        """
        unknown = set(versions) - self._guessed_bytes.keys()
        if unknown:
            files_bytes = await asyncio.to_thread(self._registry.file_bytes, unknown)
            self._guessed_bytes |= {version: guessed_bytes(size) for version, size in files_bytes.items()}

    def memory(self, seen: PlaneState, small: frozenset[Version]) -> Memory:
        """Of a data plane's devices, and what versions take of it, small ones in processes with others."""
        self._knowledge.look(seen.versions)
        measured = self._knowledge.model_bytes
        return Memory(
            room_bytes=seen.room_bytes,
            process_bytes=seen.process_bytes,
            model_bytes={**self._guessed_bytes, **measured},
            measured=frozenset(measured),
            small=small,
        )

    async def check(self, spec: DeploymentSpec, seen: PlaneState, small: frozenset[Version]) -> None:
        """Whether the pool can hold a deployment beside what the others have at least.

        Raises:
            NoRoom: it cannot; the message says what is missing.
            RegistryFailed: what is deployed cannot be read.
        """
        found = await asyncio.to_thread(self._registry.deployments)
        others = {each.spec.model: each.spec for each in found}
        before = others.pop(spec.model, None)
        if before and before.number == spec.number and before.min_replicas >= spec.min_replicas:
            return  # it asks for no more than it has
        version = spec.model, spec.number
        least = {(each.model, each.number): each.min_replicas for each in others.values()}
        await self.learn((version, *least))
        if not seen.devices:
            return  # they are not known yet
        reason = refusal(version, max(1, spec.min_replicas), least, seen.devices, self.memory(seen, small))
        if reason is not None:
            raise NoRoom(reason)
