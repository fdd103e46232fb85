"""One served version of a model: its queue, its replicas, and the batches between them."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import structlog

from forescale.core.clock import Clock
from forescale.core.errors import (
    BadRequest,
    ForescaleError,
    ModelFailed,
    NotServed,
    PeerGone,
    TooBusy,
)
from forescale.core.signature import Signature
from forescale.engine.serve.admission import Admission
from forescale.engine.serve.arrays import Array, pack, unpack
from forescale.engine.serve.balancing import Balancing, ReplicaLoad
from forescale.engine.serve.conformity import check_outputs
from forescale.engine.serve.jobs import Job, Outputs, refuse
from forescale.engine.serve.messages import Failed, Header, Hello, Result, Run
from forescale.engine.serve.metrics import Gauges, ModelMetrics
from forescale.engine.serve.policy import QueuePolicy
from forescale.engine.serve.queues import Entry, ModelQueue
from forescale.engine.serve.requests import InferRequest
from forescale.engine.wire import Frame

Send = Callable[[str, Header, Sequence[Frame]], None]

LEAD_S = 0.002
"""How long before a replica is done it is given its next batch: more than the way there takes."""

_LOSSES = 3  # replicas that may die with a request before it is taken to be the cause
_PROBE_S = 1.0  # a prediction is tried again when it is that old
_PATROL_S = 0.25  # how often requests that replicas have are looked at for being late


_Entry = Entry[Job]


class ServedModel:
    """Answers requests to one version of a model, in the event loop it was made in.

    Args:
        on_starving: called when a request waits and there is no replica at all.

    Attributes:
        is_closed: it takes no more requests.
        max_rows: most rows of a batch; a model whose number of rows is fixed takes one request at a time.
        on_change: called when a request comes or ends, and when policy or replicas are others than before.
    """

    def __init__(
        self,
        model: str,
        version: str,
        signature: Signature,
        policy: QueuePolicy,
        *,
        send: Send,
        balancing: Balancing,
        clock: Clock,
        on_starving: Callable[[], object] = lambda: None,
    ) -> None:
        self.model = model
        self.version = version
        self.signature = signature
        self.policy = policy
        self.metrics = ModelMetrics()
        self.replicas: dict[str, ReplicaLoad] = {}
        self._queue: ModelQueue[Job] = ModelQueue(policy)
        self._admission = Admission()
        self._send = send
        self._balancing = balancing
        self._clock = clock
        self._on_starving = on_starving
        self.on_change: Callable[[], object] = lambda: None
        self._loop = asyncio.get_running_loop()
        self._batches: dict[int, list[_Entry]] = {}
        self._numbers = itertools.count(1)
        self._names = tuple(spec.name for spec in signature.inputs)
        self._agree_on_rows()
        self._dispatching = False
        self._wake: asyncio.TimerHandle | None = None
        self._wake_s = math.inf
        self.is_closed = False
        self._idle = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        return any(not replica.draining for replica in self.replicas.values())

    def gauges(self) -> Gauges:
        return Gauges(
            waiting=self._queue.requests,
            waiting_rows=self._queue.rows,
            in_flight=sum(map(len, self._batches.values())),
            replicas=sum(not replica.draining for replica in self.replicas.values()),
        )

    async def infer(self, request: InferRequest, flow: str = "") -> Outputs:
        """The model's outputs for a request of a client (flow).

        Raises:
            BadRequest: it has more rows than a batch.
            TooBusy: it cannot be answered in time, or was not.
            NotServed: the model is served no more.
            ModelFailed: the model raised, or its replicas died.
        """
        arrived_s = self._clock.monotonic_s()
        self.on_change()
        outcomes = self.metrics.outcomes
        self.metrics.arrived_rows += 0 if request.is_copy else request.rows
        timeout_s = self.policy.timeout_s if request.timeout_s is None else request.timeout_s
        answer: asyncio.Future[Outputs] = self._loop.create_future()
        entry = Entry(
            Job(request, answer),
            rows=request.rows,
            arrived_s=arrived_s,
            deadline_s=arrived_s + timeout_s,
            priority=request.priority or self.policy.priority,
            size_bytes=request.size_bytes,
            alike=request.free_lengths,
        )
        try:
            self._admit(entry)
            self._queue.put(entry, flow)
            if not self.replicas:
                self._on_starving()
            self._dispatch_soon()
            outputs = await answer
        except asyncio.CancelledError:
            self._queue.remove(entry)
            self._dispatch_soon()
            outcomes["cancelled"] += 1
            raise
        except (TooBusy, NotServed):
            outcomes["refused"] += 1
            raise
        except BadRequest:
            outcomes["invalid"] += 1
            raise
        except ForescaleError:
            outcomes["failed"] += 1
            raise
        finally:
            self.on_change()
        outcomes["ok"] += 1
        took_s = self._clock.monotonic_s() - arrived_s
        self.metrics.latency_s.observe(took_s)
        self._admission.learn(entry, took_s)
        return outputs

    def steer(self, policy: QueuePolicy) -> None:
        """From now on, requests are queued in this way; those that wait keep their time and place."""
        self.policy = self._queue.policy = policy
        self._agree_on_rows()
        self._dispatch_soon()

    def join(self, hello: Hello) -> None:
        """A replica is ready; it takes batches when it has said for how many it has room."""
        self.lose(hello.replica)
        self.replicas[hello.replica] = ReplicaLoad(hello.replica, max_rows=hello.max_rows)
        self._agree_on_rows()

    def credit(self, replica: str, batches: int) -> None:
        self.replicas[replica].credits += batches
        self._dispatch()

    def drain(self, replica: str) -> None:
        """Give a replica no more batches; harmless for one that is gone."""
        if replica in self.replicas:
            self.replicas[replica].draining = True
            self._dispatch_soon()

    def lose(self, replica: str) -> None:
        """A replica is gone: what it had is sent to another one. Harmless for one that is unknown."""
        gone = self.replicas.pop(replica, None)
        if gone is None:
            return
        self._agree_on_rows()
        for place, number in enumerate(gone.in_flight):
            for entry in self._batches.pop(number):
                entry.item.losses += place == 0  # batches behind it had not begun
                self._retry(entry, alone=place == 0, cause="the replicas that ran it died")
        self._dispatch_soon()

    def result(self, replica: str, result: Result, frames: Sequence[memoryview]) -> None:
        """A replica answered a batch."""
        batch = self._finish(replica, result.batch, threads=result.threads)
        self._dispatch()  # first: so that the replica waits for nobody
        if batch is None:
            return
        self.metrics.note_batch(sum(entry.rows for entry in batch), result.seconds, result.threads)
        try:
            outputs = unpack(result.outputs, frames)
            check_outputs(outputs, self.signature, sum(entry.rows for entry in batch))
        except ValueError as error:
            for entry in batch:
                refuse(entry, ModelFailed(f"{self.model} returned what it should not: {error}"))
            return
        start = 0
        for entry in batch:
            end = start + entry.rows
            if not entry.item.answer.done():
                entry.item.answer.set_result({name: rows[start:end] for name, rows in outputs.items()})
            start = end

    def fail(self, replica: str, failed: Failed) -> None:
        """A replica could not run a batch. Its requests are tried alone, so that one cannot fail others."""
        assert failed.batch is not None
        batch = self._finish(replica, failed.batch, failed=True)
        for entry in batch or ():
            if len(batch or ()) > 1:
                self._retry(entry, alone=True, cause=failed.error)
            elif failed.failure == "input":
                refuse(entry, BadRequest(f"{self.model}: {failed.error}"))
            else:
                refuse(entry, ModelFailed(f"{self.model}: {failed.error}"))
        self._dispatch()

    async def close(self) -> None:
        """Refuse new requests and wait for the old ones' answers, which may need a replica that comes yet."""
        self.is_closed = True
        self._dispatch()
        while self._queue.requests or self._batches:
            self._idle.clear()
            await self._idle.wait()

    def abandon(self) -> None:
        """Refuse everything that waits or is under way."""
        self.is_closed = True
        self._refuse_waiting()
        for number in tuple(self._batches):
            for entry in self._batches.pop(number):
                refuse(entry, NotServed(f"{self.model} version {self.version} is served no more"))
        self._idle.set()

    def _agree_on_rows(self) -> None:
        self.on_change()
        fixed = (spec.shape[0] for spec in self.signature.inputs)
        taken = (replica.max_rows for replica in self.replicas.values())
        self.max_rows = min((self.policy.max_rows, *(rows for rows in fixed if rows is not None), *taken))
        self._full_rows = min(self.max_rows, self.policy.full_rows)
        for replica in self.replicas.values():
            replica.batch_rows = self._full_rows

    # ---- admission ------------------------------------------------------------------------------------

    def _admit(self, entry: _Entry) -> None:
        if self.is_closed:
            raise NotServed(f"{self.model} version {self.version} is served no more")
        if entry.rows > (most := self.max_rows):
            raise BadRequest(f"{self.model} takes at most {most} rows at a time, not {entry.rows}")
        queue = self._queue
        if not queue.has_room(entry.size_bytes):
            raise TooBusy(f"the queue of {self.model} is full", retry_after_s=self._backlog_s(entry))
        if queue.requests:
            late_s = entry.arrived_s + self._backlog_s(entry) - entry.deadline_s
            if late_s > 0:
                raise TooBusy(f"{self.model} has too much to do to answer in time", retry_after_s=late_s)

    def _backlog_s(self, entry: _Entry) -> float:
        return self._admission.predict_s(entry, self._queue, self.replicas.values(), self._full_rows)

    # ---- batches --------------------------------------------------------------------------------------

    def _dispatch_soon(self) -> None:
        # In the next turn of the loop: requests that came in the same one share a batch.
        if not self._dispatching:
            self._dispatching = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        now_s = self._clock.monotonic_s()
        queue = self._queue
        wake_s = math.inf
        usable = list(self.replicas.values())
        while queue.requests:
            if (due_s := queue.due_s()) > now_s:
                wake_s = due_s
                break
            replica = self._balancing.choose(usable, queue.rows, now_s, LEAD_S)
            if replica is None:
                wake_s = self._next_open_s(now_s)
                break
            if not self._run_next(replica, now_s):
                usable.remove(replica)  # nobody who waits would be in time there
        self._wake_at(min(wake_s, queue.next_deadline_s(), now_s + _PATROL_S if self._batches else math.inf))
        self._idle.set()

    def _run_next(self, replica: ReplicaLoad, now_s: float) -> bool:
        """Send a replica its next batch; whether there was one."""
        start_s = replica.free_s(now_s) - now_s
        others = [(other.free_s(now_s) - now_s, other.service) for other in self.replicas.values()]
        batch, late = self._queue.take(
            now_s,
            max_rows=self._full_rows,
            service_s=lambda rows: start_s + replica.service.predict_s(rows),
            soonest_s=lambda rows: min(free_s + service.predict_s(rows) for free_s, service in others),
            probe=not replica.in_flight and now_s - replica.observed_s > _PROBE_S,
        )
        for entry in late:
            self._give_up(entry, retry_after_s=start_s)
        if not batch:
            return False
        number = next(self._numbers)
        tensors, frames = pack(self._joined(batch))
        try:
            self._send(replica.name, Run(batch=number, inputs=tensors).to_header(), frames)
        except PeerGone:
            replica.draining = True  # whoever watches the process will tell that it is gone
            for entry in batch:
                self._queue.put_back(entry, alone=entry.item.alone)
            return False
        rows = sum(entry.rows for entry in batch)
        replica.send(number, rows, now_s)
        self._batches[number] = batch
        self.metrics.batch_rows.observe(rows)
        for entry in batch:
            self.metrics.waiting_s.observe(now_s - entry.arrived_s)
            if (journey := entry.item.request.journey) is not None:
                journey.go_on(entry.arrived_s, now_s, replica.name, rows)
        return True

    def _joined(self, batch: list[_Entry]) -> dict[str, Array]:
        if len(batch) == 1:
            return dict(zip(self._names, batch[0].item.request.inputs, strict=True))
        columns = zip(*(entry.item.request.inputs for entry in batch), strict=True)
        return {name: np.concatenate(column) for name, column in zip(self._names, columns, strict=True)}

    def _finish(
        self, replica: str, number: int, *, failed: bool = False, threads: int | None = None
    ) -> list[_Entry] | None:
        load = self.replicas.get(replica)
        if load is None or number not in load.in_flight:
            structlog.get_logger().error("unknown_batch", replica=replica, batch=number)
            return None
        load.finish(number, self._clock.monotonic_s(), failed=failed, threads=threads)
        return self._batches.pop(number, None)

    def _retry(self, entry: _Entry, *, alone: bool, cause: str) -> None:
        job = entry.item
        if job.answer.done():
            return
        if job.losses >= _LOSSES:
            refuse(entry, ModelFailed(f"{self.model}: {cause}, {job.losses} times"))
            return
        job.alone |= alone
        self.metrics.retries += 1
        self._queue.put_back(entry, alone=job.alone)

    def _refuse_waiting(self) -> None:
        for entry in self._queue.expire(math.inf):
            refuse(entry, NotServed(f"{self.model} version {self.version} is served no more"))

    # ---- time -----------------------------------------------------------------------------------------

    def _next_open_s(self, now_s: float) -> float:
        """When a busy replica may take a batch; answers wake the queue earlier."""
        ends_s = (replica.free_s(now_s) - LEAD_S for replica in self.replicas.values() if replica.credits)
        return max(min(ends_s, default=math.inf), now_s + LEAD_S / 2)

    def _wake_at(self, time_s: float) -> None:
        if time_s >= self._wake_s:
            return
        if self._wake is not None:
            self._wake.cancel()
        self._wake_s = time_s
        self._wake = self._loop.call_later(max(time_s - self._clock.monotonic_s(), 0.0), self._patrol)

    def _patrol(self) -> None:
        self._wake, self._wake_s = None, math.inf
        now_s = self._clock.monotonic_s()
        running = itertools.chain.from_iterable(self._batches.values())
        for entry in (*self._queue.expire(now_s), *(each for each in running if each.deadline_s <= now_s)):
            self._give_up(entry, retry_after_s=0.0)
        self._dispatch()

    def _give_up(self, entry: _Entry, *, retry_after_s: float) -> None:
        """A request was let in, and is too late nevertheless."""
        if not entry.item.answer.done():
            self._admission.learn(entry, math.inf)
            refuse(entry, TooBusy(f"{self.model} did not answer in time", retry_after_s=retry_after_s))
