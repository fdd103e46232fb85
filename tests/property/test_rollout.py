"""Whatever happens, a rollout ends, harms no request, and goes on after any kill as if nothing had been."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

from hypothesis import event, given, settings
from hypothesis import strategies as st

from forescale.control.rollout import Check, Sight, is_to_be_checked, replicas, route, step, urged
from forescale.engine.serve.metrics import SECONDS
from forescale.registry.rollout import Counts, Progress, Rollout, RolloutSpec, State, Strategy
from forescale.registry.rollouts import progress_from_json

OLD, NEW = 1, 2
SPECS = st.builds(
    RolloutSpec,
    model=st.just("m"),
    number=st.just(NEW),
    stable=st.just(OLD),
    strategy=st.sampled_from([Strategy.CANARY, Strategy.SHADOW]),
    shares=st.lists(st.sampled_from([0.01, 0.1, 0.5, 0.9]), min_size=1, unique=True).map(
        lambda shares: tuple(sorted(shares))
    ),
    stage_s=st.sampled_from([0.0, 5.0]),
    proof_s=st.sampled_from([0.0, 10.0]),
    min_requests=st.sampled_from([0, 20]),
    patience_s=st.just(60.0),
    check=st.sampled_from([None, "quality"]),
) | st.builds(
    RolloutSpec,
    model=st.just("m"),
    number=st.just(NEW),
    stable=st.just(OLD),
    strategy=st.just(Strategy.BLUE_GREEN),
    shares=st.just((0.0,)),
    stage_s=st.sampled_from([0.0, 5.0]),
    proof_s=st.sampled_from([0.0, 10.0]),
    patience_s=st.just(60.0),
    check=st.sampled_from([None, "quality"]),
)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.floats(0.0, 8.0)),
        st.tuples(st.just("ask"), st.integers(1, 60), st.sampled_from([0.0, 0.0, 0.05, 0.9])),
        st.tuples(st.just("ready"), st.sampled_from([OLD, NEW, NEW]), st.integers(0, 3)),
        st.tuples(st.just("restart")),  # of the gateway
        st.tuples(st.just("wanted"), st.integers(1, 3)),
        st.tuples(st.just("check"), st.booleans()),
        st.tuples(st.just("promote"), st.booleans()),
    ),
    max_size=60,
)


@dataclass
class World:
    """A pool and a gateway, as far as a rollout sees them."""

    rollout: Rollout
    now_s: float = 1000.0
    ready: dict[int, int] = field(default_factory=lambda: {OLD: 1})
    wanted: int = 1
    asked: dict[int, int] = field(default_factory=lambda: {OLD: 0, NEW: 0})
    errors: dict[int, int] = field(default_factory=lambda: {OLD: 0, NEW: 0})
    check: Check | None = None

    def sight(self) -> Sight:
        return Sight(
            now_s=self.now_s,
            ready={number: count for number, count in self.ready.items() if count},
            wanted=self.wanted,
            counts={number: self._counts(number) for number in (OLD, NEW)},
            check=self.check,
        )

    def _counts(self, number: int) -> Counts:
        ok = self.asked[number] - self.errors[number]
        answers = (ok, *[0] * len(SECONDS))
        return Counts(requests=self.asked[number], errors=self.errors[number], answers=answers)

    def ask(self, requests: int, bad: float) -> None:
        there = route(self.rollout, self.sight().ready)
        for place in range(requests):
            chance = place / requests
            answered = int(there.choose(None, chance))
            for number in (answered, *map(int, there.copies(str(answered), chance))):
                self.asked[number] += 1
                self.errors[number] += number == NEW and chance < bad

    def do(self, what: tuple) -> None:
        match what:
            case "wait", seconds:
                self.now_s += seconds
            case "ask", requests, bad:
                self.ask(requests, bad)
            case "ready", number, count:
                self.ready[number] = count
            case ("restart",):
                self.asked, self.errors = {OLD: 0, NEW: 0}, {OLD: 0, NEW: 0}
                self.ready = {}
            case "wanted", count:
                self.wanted = count
            case "check", passed if is_to_be_checked(self.rollout, self.sight()):
                self.check = Check(stage=self.rollout.progress.stage, is_passed=passed, says="3 are wrong")
            case "promote", fully if self.rollout.state is State.RUNNING:
                self.rollout = urged(self.rollout, self.now_s, "ada", fully=fully)
            case _:
                pass


def begun(spec: RolloutSpec) -> Rollout:
    progress = Progress(entered_s=1000.0)
    return Rollout(
        id=1,
        revision=0,
        spec=spec,
        state=State.RUNNING,
        progress=progress,
        started_s=1000.0,
        started_by="ada",
    )


def killed(rollout: Rollout) -> Rollout:
    """As it is read again."""
    return replace(rollout, progress=progress_from_json(json.loads(json.dumps(asdict(rollout.progress)))))


def lives(spec: RolloutSpec, happenings: list[tuple]) -> Iterator[World]:
    """After everything that happens, with one step each; then time passes until the rollout ends."""
    world = World(begun(spec))
    for what in happenings:
        world.do(what)
        yield world
    for _ in range(20 * (len(spec.shares) + 1)):
        world.now_s += 5.0
        yield world


@given(SPECS, EVENTS)
def test_a_rollout_ends_and_may_be_killed_at_any_time(spec: RolloutSpec, happenings: list[tuple]) -> None:
    world = None
    for world in lives(spec, happenings):
        seen = world.sight()
        decided = step(world.rollout, seen)
        assert step(killed(world.rollout), seen) == decided
        assert route(killed(decided), seen.ready) == route(decided, seen.ready)
        assert replicas(killed(decided), seen.wanted) == replicas(decided, seen.wanted)
        world.rollout = decided
    assert world is not None
    assert world.rollout.state is not State.RUNNING
    assert world.rollout.ended_s is not None
    event(world.rollout.state)


@given(SPECS, EVENTS)
def test_no_request_goes_to_a_version_without_replicas_while_another_could_answer(
    spec: RolloutSpec, happenings: list[tuple]
) -> None:
    for world in lives(spec, happenings):
        world.rollout = step(world.rollout, world.sight())
        if world.rollout.state is not State.RUNNING:
            return
        for ready in (set[int](), {OLD}, {NEW}, {OLD, NEW}):
            there = route(world.rollout, ready)
            targets = {int(version) for version in there.versions()}
            assert targets <= {OLD, NEW}
            if ready == {OLD, NEW}:
                event(f"{there.shares or there.shadows or there.version}")
            elif ready == {NEW} and (there.shadows or not _is_exposed(world.rollout)):
                assert there.version == str(OLD)  # what is not to be seen yet answers nobody
                assert NEW not in {int(each) for each in there.shares}
            else:
                assert targets <= (ready or {OLD})


def _is_exposed(rollout: Rollout) -> bool:
    routed, spec = rollout.progress.routed, rollout.spec
    return routed == spec.last or (routed >= 0 and spec.strategy is Strategy.CANARY)


@given(SPECS, EVENTS)
def test_shares_only_grow_and_never_without_the_replicas_for_them(
    spec: RolloutSpec, happenings: list[tuple]
) -> None:
    routed = -1
    for world in lives(spec, happenings):
        seen = world.sight()
        world.rollout = step(world.rollout, seen)
        if world.rollout.progress.routed != routed:
            assert world.rollout.progress.routed > routed
            routed = world.rollout.progress.routed
            assert seen.ready[NEW] >= replicas(world.rollout, seen.wanted)


@settings(max_examples=50)
@given(SPECS.filter(lambda spec: spec.strategy is not Strategy.BLUE_GREEN))
def test_what_is_as_good_is_promoted_and_what_fails_is_taken_back(spec: RolloutSpec) -> None:
    ends = []
    for bad in (0.0, 0.9):
        world = World(begun(spec))
        world.ready = {OLD: 3, NEW: 3}
        while world.rollout.state is State.RUNNING:
            world.now_s += 1.0
            world.ask(500, bad)
            if is_to_be_checked(world.rollout, world.sight()):
                world.check = Check(stage=world.rollout.progress.stage, is_passed=True)
            world.rollout = step(world.rollout, world.sight())
        ends.append(world.rollout.state)
        assert ("got no answer" in world.rollout.progress.reason) == (bad > 0.0)
        assert (world.rollout.progress.routed == 0) == (bad > 0.0)
    assert ends == [State.PROMOTED, State.ROLLED_BACK]
