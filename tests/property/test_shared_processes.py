"""Who shares a process: for any load, everybody is in one place, within the limits, and stays if it can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.control.houses import HouseRules, Housing, Resident, Tenant, step
from forescale.control.memory import Memory, Room, Version
from forescale.control.serving import Observation, Phase, Replica, StartReplica, StopReplica
from forescale.control.serving import step as serving_step
from forescale.registry.records import DeploymentSpec

RULES = HouseRules()
PROCESS, ROOM = 250, 4000  # "bytes"
DEVICES = ("cpu0", "cpu1")

TENANTS = st.builds(
    Tenant,
    is_awake=st.booleans(),
    may_move=st.booleans(),
    latency_s=st.sampled_from([0.02, 0.1, 0.5]),
    load_s=st.sampled_from([0.05, 0.2, 2.0]),
    batch_s=st.sampled_from([0.0005, 0.004, 0.02]),
    row_s=st.sampled_from([0.0002, 0.002]),
    arrived_rows=st.just(0),
)
SIZES = st.integers(1, 300) | st.integers(500, 2500)


@dataclass
class World:
    """A data plane that does at once, or after a step, what ``serving.step`` says."""

    tenants: dict[Version, Tenant]
    memory: Memory
    replicas: list[Replica]
    housing: Housing
    now_s: float = 0.0
    started: int = 0

    def look(self) -> None:
        room = Room(DEVICES, self.memory)
        for there in self.replicas:
            room.put(there.version, there.device, there.house)
        residents = [
            Resident(
                version=there.version,
                device=there.device,
                house=str(there.house),
                is_ready=there.phase is Phase.READY,
            )
            for there in self.replicas
        ]
        self.housing = step(self.housing, self.tenants, residents, room, now_s=self.now_s, rules=RULES)
        self.now_s += 0.25

    def act(self) -> list[StartReplica | StopReplica]:
        wanted = [
            DeploymentSpec(model=model, number=1, min_replicas=0, max_replicas=1) for model, _ in self.tenants
        ]
        seen = Observation(
            devices=DEVICES,
            replicas=tuple(self.replicas),
            served=frozenset(self.tenants),
            memory=self.memory,
        )
        counts = {model: int(tenant.is_awake) for (model, _), tenant in self.tenants.items()}
        done = [
            command
            for command in serving_step(wanted, seen, counts, homes=self.housing.homes)
            if isinstance(command, StartReplica | StopReplica)
        ]
        self.replicas = [replace(there, phase=Phase.READY) for there in self.replicas]
        for command in done:
            if isinstance(command, StopReplica):
                self.replicas = [there for there in self.replicas if there.name != command.name]
            else:
                self.started += 1
                house = command.house or f"house-{self.started}"
                self.replicas.append(
                    Replica(
                        name=f"{command.version[0]}.{self.started}",
                        version=command.version,
                        device=command.device,
                        phase=Phase.STARTING,
                        house=house,
                    )
                )
        return done

    def run(self, seconds: float) -> list[StartReplica | StopReplica]:
        return [command for _ in range(round(seconds * 4)) for command in (self.look(), self.act())[1]]

    def houses(self) -> dict[str | None, list[Version]]:
        found: dict[str | None, list[Version]] = {}
        for there in self.replicas:
            found.setdefault(there.house, []).append(there.version)
        return found


def world(tenants: Iterable[Tenant], sizes: Iterable[int]) -> World:
    named = {(f"m{number}", 1): tenant for number, tenant in enumerate(tenants)}
    taken = dict(zip(named, sizes, strict=False))
    memory = Memory(room_bytes=dict.fromkeys(DEVICES, ROOM), process_bytes=PROCESS, model_bytes=taken)
    return World(named, memory, [], Housing())


def asked(there: World, rates_per_s: Mapping[Version, float], seconds: float) -> None:
    """The versions are asked for so much, for so long."""
    for _ in range(round(seconds)):
        for version, tenant in there.tenants.items():
            rows = tenant.arrived_rows + round(rates_per_s.get(version, 0.0))
            there.tenants[version] = replace(tenant, arrived_rows=rows)
        there.run(1.0)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_version_is_in_one_place_within_the_limits_and_nobody_moves_without_need(
    data: st.DataObject,
) -> None:
    tenants = data.draw(st.lists(TENANTS, min_size=1, max_size=12))
    there = world(tenants, data.draw(st.lists(SIZES, min_size=12, max_size=12)))
    rates = {version: data.draw(st.sampled_from([0.0, 5.0, 40.0, 300.0])) for version in there.tenants}
    asked(there, rates, 20)
    asked(there, rates, 8)
    awake = {version for version, tenant in there.tenants.items() if tenant.is_awake}
    counts = Counter(replica.version for replica in there.replicas)
    assert counts.keys() <= awake
    assert set(counts.values()) <= {1}
    is_roomy = sum(PROCESS + there.memory.model_bytes[version] for version in awake) < ROOM
    assert counts.keys() == awake or not is_roomy
    used = Counter[str]()
    for house, versions in there.houses().items():
        (device,) = {replica.device for replica in there.replicas if replica.house == house}
        used[device] += PROCESS + sum(there.memory.model_bytes[version] for version in versions)
        if len(versions) > 1:
            mates = [there.tenants[version] for version in versions]
            latency_s = min(mate.latency_s for mate in mates)
            assert max(mate.batch_s for mate in mates) <= RULES.slack * RULES.wait_share * latency_s
            busy = sum(rates[version] * there.tenants[version].row_s for version in versions)
            assert busy <= RULES.slack * RULES.busy_share or not is_roomy, "nobody can leave"
            assert sum(mate.load_s for mate in mates) <= RULES.slack * RULES.reload_s
    assert all(taken <= ROOM for taken in used.values())


@settings(max_examples=40, deadline=None)
@given(tenants=st.lists(TENANTS, min_size=1, max_size=12), sizes=st.lists(SIZES, min_size=12, max_size=12))
def test_what_is_settled_stays_as_it_is(tenants: list[Tenant], sizes: list[int]) -> None:
    there = world(tenants, sizes)
    there.run(40.0)
    houses = there.houses()
    assert there.run(40.0) == []
    assert there.houses() == houses


SMALL = Tenant(
    is_awake=True, may_move=True, latency_s=0.5, load_s=0.05, batch_s=0.0005, row_s=0.0005, arrived_rows=0
)


def test_a_hundred_small_models_that_are_asked_for_share_from_the_beginning() -> None:
    there = world([SMALL] * 100, [5] * 100)
    there.run(1.0)
    assert [len(versions) for versions in there.houses().values()] == [100]
    there.tenants[("m3", 1)] = replace(SMALL, load_s=0.4)
    assert there.run(1.0) == []


def test_those_that_started_alone_move_together_one_after_the_other() -> None:
    there = world([replace(SMALL, may_move=number != 2) for number in range(4)], [5] * 4)
    there.tenants, tenants = {}, there.tenants
    there.replicas = [
        Replica(name=f"m{n}", version=(f"m{n}", 1), device="cpu0", phase=Phase.READY, house=f"house-{n}")
        for n in range(4)
    ]
    there.tenants = tenants
    assert there.run(RULES.settle_s - 1.0) == []
    for _ in range(10):
        there.look()
        assert sum(isinstance(command, StartReplica) for command in there.act()) <= 1
    assert sorted(map(len, there.houses().values())) == [1, 3] or sorted(
        map(len, there.houses().values())
    ) == [4]


def test_the_busiest_leaves_when_it_is_too_much_and_not_before() -> None:
    there = world([SMALL] * 3, [5] * 3)
    asked(there, {("m0", 1): 100.0, ("m1", 1): 100.0, ("m2", 1): 300.0}, 3)
    assert [len(versions) for versions in there.houses().values()] == [3], "a quarter busy: slack"
    asked(there, {("m0", 1): 100.0, ("m1", 1): 100.0, ("m2", 1): 900.0}, 3)
    assert sorted(map(sorted, there.houses().values())) == [[("m0", 1), ("m1", 1)], [("m2", 1)]]


def test_one_that_needs_more_than_one_replica_or_is_not_trusted_leaves() -> None:
    there = world([SMALL] * 3, [5] * 3)
    there.run(2.0)
    there.look()
    seen = Observation(
        devices=DEVICES,
        replicas=tuple(there.replicas),
        served=frozenset(there.tenants),
        memory=there.memory,
    )
    homes = {version: home for version, home in there.housing.homes.items() if version != ("m1", 1)}
    wanted = [DeploymentSpec(model=model, number=1) for model, _ in there.tenants]
    commands = serving_step(wanted, seen, homes=homes)
    assert commands == (StartReplica(version=("m1", 1), device="cpu1"),)


def test_memory_bounds_a_house() -> None:
    there = world([SMALL] * 10, [1500] * 10)
    there.run(5.0)
    assert sorted(len(versions) for versions in there.houses().values()) == [2, 2]


def test_a_version_that_was_about_to_move_may_be_wanted_no_more() -> None:
    version: Version = ("m", 1)
    tenant = Tenant(
        is_awake=True, may_move=True, latency_s=0.5, load_s=0.1, batch_s=0.001, row_s=0.001, arrived_rows=0
    )
    there = [Resident(version=version, device="cpu0", house="h", is_ready=True)]
    housing = Housing()
    for quarter in range(20):
        housing = step(housing, {version: tenant}, there, Room(DEVICES, Memory()), now_s=quarter / 4)
    assert housing.ripe_s == {version: 0.0}
    assert step(housing, {}, there, Room(DEVICES, Memory()), now_s=5.0 - 0.25).ripe_s == {}
