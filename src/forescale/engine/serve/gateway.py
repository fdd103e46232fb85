"""All served models by name, joined with the replicas that run them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Protocol

import structlog

from forescale.core.clock import Clock
from forescale.core.errors import NotServed, PeerGone, RequestFailed
from forescale.core.signature import Signature
from forescale.engine.serve.balancing import Balancing, PredictedCompletion
from forescale.engine.serve.link import Listener
from forescale.engine.serve.messages import Credit, Drain, Failed, FromReplica, Header, Hello, Result
from forescale.engine.serve.queues import QueuePolicy
from forescale.engine.serve.requests import InferRequest
from forescale.engine.serve.routing import Route
from forescale.engine.serve.served import Outputs, ServedModel
from forescale.engine.wire import Frame

_COPIES = 1000
"""Copies of requests that are under way at most; more are not made."""

_LAST_PRIORITY = 1000


class Link(Protocol):
    """Carries messages to and from replicas; ``ReplicaLink`` does."""

    def listen(self, listener: Listener) -> None: ...

    def send(self, to: str, header: Header, frames: Sequence[Frame] = (), /) -> None: ...


class Gateway:
    """Routes requests to models and replicas' messages to the models they serve.

    Replicas are not started here. One joins by saying hello over the link; whoever watches its process calls
    ``lose`` when that ended. Use it in the thread of the event loop that the link is opened in.

    Args:
        chance: uniform from 0 to 1; it decides where there are shares.

    Attributes:
        on_starving: called when a request comes to a model without replicas.
        on_change: called when versions or routes are others than before.
        changed: versions, as model and version, to which something has happened. Whoever has looked at them
            empties it.
    """

    def __init__(
        self,
        link: Link,
        *,
        clock: Clock,
        balancing: Callable[[], Balancing] = PredictedCompletion,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._link = link
        self._clock = clock
        self._balancing = balancing
        self._models: dict[str, dict[str, ServedModel]] = {}
        self._routes: dict[str, Route] = {}
        self._chance = chance
        self._copies = set[asyncio.Task[None]]()
        self._homes: dict[str, ServedModel] = {}
        self._drained = set[str]()
        self.on_starving: Callable[[], object] = lambda: None
        self.on_change: Callable[[], object] = lambda: None
        self.changed = set[tuple[str, str]]()
        link.listen(self._hear)

    def serve(
        self, model: str, version: str, signature: Signature, policy: QueuePolicy | None = None
    ) -> ServedModel:
        """Take requests to a version from now on; they wait while it has no replica.

        It answers requests that name no version, too, unless another one was served before.

        Raises:
            ValueError: it is served already.
        """
        versions = self._models.setdefault(model, {})
        if version in versions:
            raise ValueError(f"{model} version {version} is served already")
        versions[version] = served = ServedModel(
            model,
            version,
            signature,
            policy or QueuePolicy(),
            send=self._link.send,
            balancing=self._balancing(),
            clock=self._clock,
            on_starving=self._starve,
        )
        served.on_change = partial(self.changed.add, (model, version))
        served.on_change()
        self._routes.setdefault(model, Route(version=version))
        self.on_change()
        return served

    def set_route(self, model: str, route: Route) -> None:
        """Decide which versions answer requests that name none.

        Raises:
            NotServed: a version of the route is not served.
        """
        for version in route.versions():
            self.find(model, version)
        self._routes[model] = route
        self.on_change()

    def routes(self) -> Mapping[str, Route]:
        """Of each model that is served."""
        return self._routes

    async def retire(self, model: str, version: str) -> None:
        """Refuse new requests to a version, and return when it has answered the others; then it is unknown.

        Its replicas go on; ``drain`` them.

        Raises:
            NotServed: it is not served.
        """
        served = self.find(model, version)
        await served.close()
        self._forget(served)

    def find(self, model: str, version: str | None = None) -> ServedModel:
        """A version of a model; None: the default one.

        Raises:
            NotServed: there is none.
        """
        versions = self._models.get(model)
        if versions is None:
            raise NotServed(f"no model {model!r} is served here")
        served = versions.get(self._routes[model].version if version is None else version)
        if served is None:
            raise NotServed(f"{model} is served as version {', '.join(versions)}, not {version!r}")
        return served

    def versions(self, model: str) -> tuple[str, ...]:
        """The versions of a model that are served."""
        return tuple(self._models.get(model, ()))

    def all(self) -> Iterator[ServedModel]:
        for versions in self._models.values():
            yield from versions.values()

    def choose(self, model: str, headers: Mapping[bytes, bytes]) -> ServedModel:
        """The version for a request that names none; the model must be served."""
        return self._models[model][self._routes[model].choose_by(headers, self._chance)]

    def copy(self, request: InferRequest, answered_by: ServedModel) -> None:
        """Send a request that named no version to shadows, too, if there are any; nobody waits for them."""
        model = answered_by.model
        route = self._routes[model]
        if not route.shadows:
            return
        copy = replace(request, priority=_LAST_PRIORITY, is_copy=True, journey=None)
        for version in route.copies(answered_by.version, self._chance()):
            shadow = self._models[model][version]
            if len(self._copies) < _COPIES and shadow.signature == answered_by.signature:
                task = asyncio.create_task(_forget_answer(shadow, copy))
                self._copies.add(task)
                task.add_done_callback(self._copies.discard)

    async def infer(
        self,
        model: str,
        version: str | None,
        request: InferRequest,
        flow: str = "",
        *,
        headers: Mapping[bytes, bytes] = MappingProxyType({}),
    ) -> Outputs:
        """The outputs of a model. Raises as ``find`` and ``ServedModel.infer`` do."""
        served = self.find(model, version)
        if version is None:
            served = self.choose(model, headers)
            self.copy(request, served)
        return await served.infer(request, flow)

    def lose(self, replica: str) -> None:
        """A replica's process ended or is not to be trusted: its requests go to others. Harmless twice."""
        self._drained.discard(replica)
        home = self._homes.pop(replica, None)
        if home is not None:
            home.lose(replica)

    def drain(self, replica: str) -> None:
        """Ask a replica to finish what it has and end, though it be loading still; ``lose`` it then."""
        self._drained.add(replica)
        home = self._homes.get(replica)
        if home is not None:
            home.drain(replica)
        with suppress(PeerGone):
            self._link.send(replica, Drain().to_header())

    def close(self) -> None:
        """Refuse everything that waits or is under way."""
        for served in tuple(self.all()):
            served.abandon()
            self._forget(served)

    def _starve(self) -> None:
        self.on_starving()

    def _forget(self, served: ServedModel) -> None:
        versions = self._models[served.model]
        del versions[served.version]
        if versions:
            heir = next(reversed(versions))
            self._routes[served.model] = self._routes[served.model].without(served.version, heir)
        else:
            del self._models[served.model], self._routes[served.model]
        self.on_change()

    def _hear(self, replica: str, said: FromReplica, frames: Sequence[memoryview]) -> None:
        if isinstance(said, Hello):
            self._welcome(replica, said)
            return
        home = self._homes.get(replica)
        if home is None:
            return
        match said:
            case Result():
                home.result(replica, said, frames)
            case Credit():
                home.credit(replica, said.n)
            case Failed(batch=None):
                self.lose(replica)
            case Failed():
                home.fail(replica, said)
            case _:
                pass  # signs of life, for whoever watches the process

    def _welcome(self, replica: str, hello: Hello) -> None:
        if replica in self._drained:
            return
        self.lose(replica)
        try:
            served = self.find(hello.model, hello.version)
        except NotServed:
            structlog.get_logger().warning(
                "replica_not_needed", replica=replica, model=hello.model, version=hello.version
            )
            return
        if hello.replica != replica:
            structlog.get_logger().error("replica_misnamed", replica=replica, said=hello.replica)
            return
        self._homes[replica] = served
        served.join(hello)


async def _forget_answer(shadow: ServedModel, request: InferRequest) -> None:
    with suppress(RequestFailed):  # it is counted
        await shadow.infer(request)
