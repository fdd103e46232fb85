"""From a gateway's counts to replicas wanted, without processes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from fake_replicas import DOUBLING, FakeLink, SteadyClock, settle
from forescale.control.scaler import Scaler
from forescale.control.scaling import ScalingRules
from forescale.engine.serve.crew import Replica, State
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.requests import InferRequest, WantedOutput
from forescale.registry.records import DeploymentSpec, Happening

SPEC = DeploymentSpec(model="m", number=1, min_replicas=0, max_replicas=2)


class Seats:
    """A crew that has what the test says."""

    devices = ("cpu0", "cpu1")
    warm_up_s = 4.0

    def __init__(self) -> None:
        self.names: Sequence[str] = ("r0",)
        self.warm = 1

    def replicas(self) -> tuple[Replica, ...]:
        return tuple(
            Replica(
                name=name,
                model="m",
                version="1",
                device="cpu0",
                state=State.SERVING,
                process=name,
                cause=None,
                attempts=0,
                retry_s=0.0,
            )
            for name in self.names
        )

    def spares(self) -> int:
        return self.warm


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
        link, crew, woken = FakeLink(prompt=True), Seats(), asyncio.Event()
        gateway = Gateway(link, clock=SteadyClock())
        gateway.on_starving = woken.set
        scaler = Scaler(gateway, crew, ScalingRules(level=None, idle_s=5.0))
        gateway.serve("m", "1", DOUBLING)
        link.join("r0")
        assert scaler.status(SPEC)["wanted"] == 1
        await scaler.decide([SPEC], 0.0)
        await gateway.infer("m", None, request(8))
        await scaler.decide([SPEC], 1.0)
        shown = scaler.status(SPEC)
        assert (shown["rows_per_s"], shown["capacity_per_s"], shown["lead_s"]) == (8.0, 32 / 0.001, 2.0)
        (slept,) = await scaler.decide([SPEC], 6.0)
        assert slept == Happening(
            kind="scaled", subject="m", by="forescale", detail={"from": 1, **scaler.status(SPEC)}
        )
        assert scaler.counts() == {"m": 0}
        gateway.lose("r0")
        crew.names = ()
        assert not woken.is_set()
        asked = asyncio.ensure_future(gateway.infer("m", None, request(1)))
        await settle()
        assert woken.is_set()
        await scaler.decide([SPEC], 6.1)
        assert scaler.counts() == {"m": 1}
        link.join("r1")
        assert len((await asked)["y"]) == 1
        gateway.close()

    asyncio.run(test())


def test_without_a_spare_the_forecast_looks_further_ahead() -> None:
    async def test() -> None:
        crew, gateway = Seats(), Gateway(FakeLink(), clock=SteadyClock())
        scaler = Scaler(gateway, crew)
        scaler.loaded("m", 0.25)
        await scaler.decide([SPEC], 0.0)
        assert scaler.status(SPEC)["lead_s"] == 1.25
        crew.warm = 0
        await scaler.decide([SPEC], 1.0)
        assert scaler.status(SPEC)["lead_s"] == 5.25

    asyncio.run(test())
