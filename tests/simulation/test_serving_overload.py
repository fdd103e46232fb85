"""The gateway under load, in virtual time: replicas of known speed, an event loop that never waits."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fake_replicas import DOUBLING, FakeLink, request
from forescale.core.errors import TooBusy
from forescale.engine.serve.gateway import Gateway
from forescale.engine.serve.messages import Header
from forescale.engine.wire import Frame

BATCH_S, ROW_S = 0.001, 0.0005
CAPACITY_PER_S = 32 / (BATCH_S + 32 * ROW_S)
TARGET_S = 0.1


class LeapingSelector(selectors.SelectSelector):
    """Instead of waiting it moves the time."""

    now_s = 0.0

    def select(self, timeout: float | None = None):
        self.now_s += timeout or 0.0
        return super().select(0)


class LeapingLoop(asyncio.SelectorEventLoop):
    """Also the clock of whatever runs in it."""

    def __init__(self) -> None:
        self._leaping = LeapingSelector()
        super().__init__(self._leaping)

    def time(self) -> float:
        return self._leaping.now_s

    def monotonic_s(self) -> float:
        return self.time()

    wall_s = monotonic_s


class TimedLink(FakeLink):
    """Replicas that take ``BATCH_S`` and ``ROW_S``, times their slowness and chance."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, slowness: dict[str, float], noise: float = 0.0
    ) -> None:
        super().__init__()
        self._noise = noise
        self._rng = np.random.default_rng(7)
        self._loop = loop
        self._slowness = slowness
        self._free_s = dict.fromkeys(slowness, 0.0)
        self.rows = dict.fromkeys(slowness, 0)

    def send(self, replica: str, header: Header, frames: Sequence[Frame] = ()) -> None:
        super().send(replica, header, frames)
        rows = self.batch_rows[-1]
        self.rows[replica] += rows
        began_s = max(self._loop.time(), self._free_s[replica])
        chance = self._rng.lognormal(0.0, self._noise)
        self._free_s[replica] = began_s + (BATCH_S + ROW_S * rows) * self._slowness[replica] * chance
        self._loop.call_at(self._free_s[replica], self.answer, replica)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a request."""

    priority: int
    came_s: float
    took_s: float
    answered: bool

    @property
    def in_time(self) -> bool:
        return self.answered and self.took_s <= TARGET_S


def simulate(
    rate_per_s: float,
    *,
    seconds: float,
    slowness: Sequence[float] = (1.0,),
    shares: Sequence[float] = (0.2, 0.8),
    target_s: float = TARGET_S,
    noise: float = 0.0,
) -> tuple[list[Outcome], TimedLink]:
    """Poisson arrivals of single rows, in classes by their shares."""
    loop = LeapingLoop()
    link = TimedLink(loop, {f"r{number}": slow for number, slow in enumerate(slowness)}, noise)
    outcomes: list[Outcome] = []
    rng = np.random.default_rng(3)

    async def ask(gateway: Gateway, priority: int) -> None:
        came_s = loop.time()
        try:
            await gateway.infer("m", None, request(priority=priority, timeout_s=target_s))
            answered = True
        except TooBusy:
            answered = False
        took_s = loop.time() - came_s
        outcomes.append(Outcome(priority=priority, came_s=came_s, took_s=took_s, answered=answered))

    async def run() -> None:
        gateway = Gateway(link, clock=loop)
        gateway.serve("m", "1", DOUBLING)
        for name in link.rows:
            link.join(name)
        tasks: list[asyncio.Task[None]] = []
        while loop.time() < seconds:
            tasks.append(loop.create_task(ask(gateway, 1 + int(rng.choice(len(shares), p=shares)))))
            await asyncio.sleep(rng.exponential(1 / rate_per_s))
        await asyncio.gather(*tasks)

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(run())
    return outcomes, link


def test_below_capacity_everybody_is_in_time() -> None:
    outcomes, _ = simulate(0.8 * CAPACITY_PER_S, seconds=2)
    assert np.mean([outcome.in_time for outcome in outcomes]) > 0.995


def test_under_twice_the_load_the_first_class_is_in_time_and_nothing_is_wasted() -> None:
    outcomes, _ = simulate(2 * CAPACITY_PER_S, seconds=3)
    settled = [outcome for outcome in outcomes if outcome.came_s > 0.5]
    first = [outcome for outcome in settled if outcome.priority == 1]
    assert np.mean([outcome.in_time for outcome in first]) >= 0.99
    assert sum(outcome.in_time for outcome in settled) > 0.85 * CAPACITY_PER_S * 2.5
    refused = [outcome for outcome in settled if not outcome.answered]
    assert np.mean([outcome.took_s < 0.005 for outcome in refused]) > 0.995


def test_under_overload_hardly_anybody_waits_in_vain_though_batches_take_unlike_times() -> None:
    outcomes, _ = simulate(2 * CAPACITY_PER_S, seconds=4, noise=0.2)
    settled = [outcome for outcome in outcomes if outcome.came_s > 1]
    assert np.mean([outcome.in_time for outcome in settled if outcome.priority == 1]) >= 0.99
    assert sum(outcome.in_time for outcome in settled) > 0.85 * CAPACITY_PER_S * 3
    assert np.mean([outcome.took_s < 0.005 for outcome in settled if not outcome.answered]) > 0.985


def test_classes_ahead_that_take_all_there_is_do_not_make_others_wait_in_vain() -> None:
    outcomes, _ = simulate(2 * CAPACITY_PER_S, seconds=6, shares=(0.2, 0.3, 0.5), target_s=0.5, noise=0.05)
    answered = [outcome for outcome in outcomes if outcome.answered]
    assert len(answered) > 0.95 * CAPACITY_PER_S * 6
    assert np.mean([outcome.took_s < 0.005 for outcome in outcomes if not outcome.answered]) > 0.996


def test_replicas_of_unlike_speed_get_work_by_their_speed() -> None:
    outcomes, link = simulate(1.1 * CAPACITY_PER_S, seconds=2, slowness=(1.0, 4.0))
    assert np.mean([outcome.in_time for outcome in outcomes if outcome.came_s > 0.3]) > 0.97
    assert link.rows["r0"] > 2.5 * link.rows["r1"] > 0


def test_the_same_load_gives_the_same_answers() -> None:
    assert simulate(2 * CAPACITY_PER_S, seconds=0.3)[0] == simulate(2 * CAPACITY_PER_S, seconds=0.3)[0]
