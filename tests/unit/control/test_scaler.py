"""From a gateway's counts to replicas wanted, without processes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fake_replicas import DOUBLING, FakeLink, SteadyClock, settle
from forescale.control.knowledge import Knowledge
from forescale.control.scale import ScalingRules
from forescale.control.scaler import Scaler
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.messages import Load
from forescale.engine.serve.orders import PlaneState, SetThreads
from forescale.engine.serve.plane import version_state
from forescale.engine.serve.requests import InferRequest, WantedOutput
from forescale.engine.serve.roster import Replica, State
from forescale.registry.records import DeploymentSpec, Happening

SPEC = DeploymentSpec(model="m", number=1, min_replicas=0, max_replicas=2)


class Seats:
    """A data plane of a real gateway, with the replicas that the test says."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self.names: Sequence[str] = ("r0",)
        self.warm = 1
        self.load_s: float | None = None
        self.cores: Mapping[str, int] = {}

    def seen(self) -> PlaneState:
        return PlaneState(
            plane="p",
            devices=("cpu0", "cpu1"),
            warm_up_s=4.0,
            cores=self.cores,
            spares=self.warm,
            versions=tuple(version_state(served, self.load_s) for served in self._gateway.all()),
            replicas=tuple(
                Replica(
                    name=name,
                    model="m",
                    version="1",
                    device="cpu0",
                    house=name,
                    state=State.SERVING,
                    process=name,
                    threads=1,
                    cause=None,
                    attempts=0,
                    retry_s=0.0,
                )
                for name in self.names
            ),
        )


def request(rows: int) -> InferRequest:
    inputs = np.ones((rows, 2), np.float32)
    return InferRequest(
        id=None,
        inputs=(inputs,),
        rows=rows,
        size_bytes=inputs.nbytes,
        free_lengths=(),
        outputs=(WantedOutput(name="y", binary=False),),
    )


def test_a_model_sleeps_and_its_first_request_wakes_it() -> None:
    async def test() -> None:
        link, woken = FakeLink(prompt=True), asyncio.Event()
        gateway = Gateway(link, clock=SteadyClock())
        plane = Seats(gateway)
        gateway.on_starving = woken.set
        scaler = Scaler(ScalingRules(level=None, idle_s=5.0))
        gateway.serve("m", "1", DOUBLING)
        link.join("r0")
        assert scaler.status(SPEC)["wanted"] == 1
        await scaler.decide([SPEC], plane.seen(), 0.0)
        await gateway.infer("m", None, request(8))
        await scaler.decide([SPEC], plane.seen(), 1.0)
        shown = scaler.status(SPEC)
        assert (shown["rows_per_s"], shown["capacity_per_s"], shown["lead_s"]) == (8.0, 32 / 0.001, 2.0)
        (slept,) = await scaler.decide([SPEC], plane.seen(), 6.0)
        assert slept == Happening(
            kind="scaled",
            subject="m",
            by="forescale",
            detail={"from": 1, "threads_from": None, **scaler.status(SPEC)},
        )
        assert scaler.counts() == {"m": 0}
        gateway.lose("r0")
        plane.names = ()
        assert not woken.is_set()
        asked = asyncio.ensure_future(gateway.infer("m", None, request(1)))
        await settle()
        assert woken.is_set()
        await scaler.decide([SPEC], plane.seen(), 6.1)
        assert scaler.counts() == {"m": 1}
        link.join("r1")
        assert len((await asked)["y"]) == 1
        gateway.close()

    asyncio.run(test())


def test_models_that_are_passed_over_stay_as_they_are_and_others_are_forgotten() -> None:
    async def test() -> None:
        gateway = Gateway(FakeLink(), clock=SteadyClock())
        plane, scaler = Seats(gateway), Scaler(ScalingRules(level=None))
        gateway.serve("m", "1", DOUBLING)
        await scaler.decide([SPEC], plane.seen(), 0.0)
        before = scaler.status(SPEC)
        await scaler.decide([], plane.seen(), 0.25, asleep={"m"})
        assert (scaler.status(SPEC), scaler.counts()) == (before, {"m": 1})
        await scaler.decide([], plane.seen(), 0.5)
        assert scaler.counts() == {}
        gateway.close()

    asyncio.run(test())


def slept(asked_s: float | None, rules: ScalingRules, *times_s: float) -> list[bool | None]:
    """Whether a model rests after decisions at these times, that nobody asks; once it was asked for."""

    async def found() -> list[bool | None]:
        gateway, knowledge = Gateway(FakeLink(), clock=SteadyClock()), Knowledge()
        gateway.serve("m", "1", DOUBLING)
        plane = Seats(gateway)
        plane.names, plane.load_s = (), 0.5
        if asked_s is not None:
            knowledge.forecast = knowledge.forecast.taken_in({"m": 3.0}, asked_s)
        scaler, rests = Scaler(rules, knowledge), list[bool | None]()
        assert scaler.is_renewed
        for now_s in times_s:
            await scaler.decide([SPEC], plane.seen(), now_s)
            assert not scaler.is_renewed
            rests.append(scaler.resting.get("m"))
        knowledge.forecast = knowledge.forecast.taken_in({}, times_s[-1])
        assert scaler.is_renewed
        gateway.close()
        return rests

    return asyncio.run(found())


def test_a_model_rests_for_good_when_counting_changes_nothing_and_it_is_not_forecast() -> None:
    times_s = 20_000.0, 20_000.25, 20_001.0, 20_001.25, 20_002.0
    # It is new; how much is asked is not known before the second time that it is counted.
    assert slept(None, ScalingRules(), *times_s) == [None, False, False, False, True]
    # Asked three hours ago, it is forecast by the minute, as soon as that has been learned for a day.
    assert slept(10_000.0, ScalingRules(), *times_s) == [None, False, False, False, False]


def test_a_model_that_is_to_have_no_replicas_from_now_on_does_not_rest_yet() -> None:
    async def test() -> None:
        link = FakeLink(prompt=True)
        gateway = Gateway(link, clock=SteadyClock())
        plane, scaler = Seats(gateway), Scaler(ScalingRules(level=None, idle_s=0.0))
        gateway.serve("m", "1", DOUBLING)
        link.join("r0")
        await gateway.infer("m", None, request(8))
        (slept,) = await scaler.decide([SPEC], plane.seen(), 0.0)
        assert (slept.detail["wanted"], scaler.resting) == (0, {})
        await gateway.infer("m", None, request(8))
        (woken,) = await scaler.decide([SPEC], plane.seen(), 1.0)
        assert (woken.detail["wanted"], scaler.resting) == (1, {})
        await scaler.decide([SPEC], plane.seen(), 1.25)
        assert scaler.counts() == {"m": 0}
        assert scaler.resting == {}, "as something was asked in the last second, it is woken again"
        await scaler.decide([SPEC], plane.seen(), 1.5)
        assert scaler.counts() == {"m": 1}
        gateway.close()

    asyncio.run(test())


def test_after_a_restart_models_that_slept_sleep_on() -> None:
    async def wanted(load_s: float | None) -> int:
        gateway, before = Gateway(FakeLink(), clock=SteadyClock()), Knowledge()
        gateway.serve("m", "1", DOUBLING)
        plane = Seats(gateway)
        plane.names, plane.load_s = (), load_s
        before.look(plane.seen().versions)
        knowledge = Knowledge()
        knowledge.restore(before.versions())
        plane.load_s = None
        scaler = Scaler(ScalingRules(level=None), knowledge)
        await scaler.decide([SPEC], plane.seen(), 0.0)
        gateway.close()
        return scaler.counts()["m"]

    assert asyncio.run(wanted(0.5)) == 0
    assert asyncio.run(wanted(None)) == 1, "it has never been served"


def test_the_latency_bounds_the_rows_of_a_batch_as_soon_as_they_are_measured() -> None:
    async def test() -> None:
        gateway = Gateway(FakeLink(), clock=SteadyClock())
        plane = Seats(gateway)
        scaler = Scaler(ScalingRules(level=None))
        spec = DeploymentSpec(model="m", number=1, latency_s=0.1, timeout_s=3.0)
        served = gateway.serve("m", "1", DOUBLING)
        await scaler.decide([spec], plane.seen(), 0.0)
        assert (scaler.policy(spec).timeout_s, scaler.policy(spec).batch_rows) == (3.0, None)
        served.metrics.note_batch(1, 0.01)
        served.metrics.note_batch(4, 0.04)
        await scaler.decide([spec], plane.seen(), 1.0)
        assert scaler.policy(spec).batch_rows == 4
        spec = DeploymentSpec(model="m", number=1)
        await scaler.decide([spec], plane.seen(), 2.0)
        assert (scaler.policy(spec).timeout_s, scaler.policy(spec).batch_rows) == (30.0, None)

    asyncio.run(test())


def test_without_a_spare_the_forecast_looks_further_ahead() -> None:
    async def test() -> None:
        gateway = Gateway(FakeLink(), clock=SteadyClock())
        gateway.serve("m", "1", DOUBLING)
        plane, scaler = Seats(gateway), Scaler()
        plane.load_s = 0.25
        await scaler.decide([SPEC], plane.seen(), 0.0)
        assert scaler.status(SPEC)["lead_s"] == 1.25
        plane.warm = 0
        await scaler.decide([SPEC], plane.seen(), 1.0)
        assert scaler.status(SPEC)["lead_s"] == 5.25

    asyncio.run(test())


def test_a_pool_that_is_taken_over_keeps_the_replicas_it_has() -> None:
    async def test() -> None:
        gateway = Gateway(FakeLink(), clock=SteadyClock())
        gateway.serve("m", "1", DOUBLING)
        plane, scaler = Seats(gateway), Scaler()
        plane.names = ("r0", "r1")
        assert await scaler.decide([SPEC], plane.seen(), 0.0) == ()
        assert scaler.counts() == {"m": 2}

    asyncio.run(test())


def test_threads_are_set_where_cores_are_known_and_formats_can_change_them() -> None:
    async def test() -> None:
        link = FakeLink(prompt=True)
        gateway = Gateway(link, clock=SteadyClock())
        plane, scaler = Seats(gateway), Scaler()
        spec = DeploymentSpec(model="m", number=1, max_threads=3)

        async def steered(**changed: Any) -> list[SetThreads]:
            seen = plane.seen()
            seen = replace(seen, versions=tuple(replace(each, **changed) for each in seen.versions))
            await scaler.decide([spec], seen, 0.0)
            return [each for each in scaler.steer([spec], seen) if isinstance(each, SetThreads)]

        def told(form: str) -> int | None:
            return scaler.told(Load(model="m", version="1", format=form, path="m")).threads

        gateway.serve("m", "1", DOUBLING)
        assert await steered(threads=3) == []  # as many as allowed: cores are not known
        plane.cores = {"cpu0": 4, "cpu1": 4}
        scaler = Scaler()
        assert [each.threads for each in await steered()] == [1]
        assert (told("pt2"), told("onnx")) == (1, 3)
        assert await steered(threads=1) == []
        assert [each.threads for each in await steered(is_resizable=False)] == [3]

    asyncio.run(test())
