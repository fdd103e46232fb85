"""Several replicas in a process, in virtual time and without processes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fake_processes import CPU, DIGITS, OTHER, Processes, at, greet
from forescale.engine.backend import ProcessExit
from forescale.engine.serve.crew import Crew
from forescale.engine.serve.messages import Beat, Failed, Left, Load, Warm
from forescale.engine.serve.roster import CrewRules, Ended, Lost, Ready, State

RULES = CrewRules(spares=1, starts=1)
A, B, C = "a.1.1", "b.1.2", "c.1.3"
SEGFAULT = "killed by SIGSEGV"


def load(model: str) -> Load:
    return replace(DIGITS, model=model)


class Crowd(Processes):
    """Processes that end at work for ``working``, by signal 11 unless somebody kills them."""

    def __init__(self) -> None:
        super().__init__()
        self.working: str | None = None

    def crash(self, name: str, working: str | None) -> None:
        self.working = working
        handle = self.living.pop(name)
        self._exits.append(ProcessExit(handle=handle, code=None, signal=11, cause=SEGFAULT, log_tail=()))


def shared(rules: CrewRules = RULES) -> tuple[Crew, Crowd]:
    """Three models that serve in ``replica-1`` since second 1, and a spare."""
    processes = Crowd()
    crew = Crew(processes, processes.send, (CPU, OTHER), rules, lambda _: processes.working)
    crew.poll(0.0)
    crew.heard("replica-1", Warm(), 1.0)
    crew.place(load("a"), "cpu0", 1.0)
    (first,) = crew.replicas()
    for model in "bc":
        crew.place(load(model), "cpu0", 1.0, first.house)
    for name in (A, B, C):
        greet(crew, at("replica-1", name), 1.0)
    crew.poll(1.0)
    for number in (2, 3):
        crew.heard(f"replica-{number}", Warm(), 2.0)
        crew.poll(2.0)
    return crew, processes


def where(crew: Crew) -> dict[str, str | None]:
    return {replica.name: replica.process for replica in crew.replicas()}


def test_those_of_a_house_are_in_its_process() -> None:
    crew, processes = shared()
    assert where(crew) == {A: "replica-1", B: "replica-1", C: "replica-1"}
    assert [to for to, kind in processes.sent if kind == "load"] == [
        at("replica-1", name) for name in (A, B, C)
    ]
    assert len({replica.house for replica in crew.replicas()}) == 1


def test_who_comes_to_a_house_that_is_not_there_or_elsewhere_gets_another_process() -> None:
    crew, _ = shared()
    there = crew.replicas()[0].house
    for device, house in (("cpu0", "house-99"), ("cpu1", there), ("cpu0", None)):
        name = crew.place(load("d"), device, 3.0, house)
        assert where(crew)[name] != "replica-1"
        assert next(each.house for each in crew.replicas() if each.name == name) == house or house is None


def test_one_that_leaves_leaves_the_others_alone() -> None:
    crew, processes = shared()
    assert crew.remove(B, 5.0) == at("replica-1", B)
    assert processes.sent[-1] == (at("replica-1", B), "drain")
    crew.heard(at("replica-1", B), Left(), 5.1)
    assert crew.poll(5.1) == (Ended(replica=B, address=at("replica-1", B)),)
    assert where(crew) == {A: "replica-1", C: "replica-1"}
    for name in (A, C):
        assert ("replica-1", "drain") not in processes.sent
        crew.remove(name, 6.0)
        crew.heard(at("replica-1", name), Left(), 6.1)
    assert processes.sent[-1] == ("replica-1", "drain"), "nobody is left"


def test_a_slow_one_that_leaves_does_not_end_the_process() -> None:
    crew, processes = shared()
    crew.remove(B, 5.0)
    for now_s in (20.0, 40.0, 60.0):
        crew.heard("replica-1", Beat(), now_s)
        crew.poll(now_s)
    assert "replica-1" not in processes.killed


def test_a_house_that_somebody_kills_is_together_again_in_one_process() -> None:
    crew, processes = shared()
    processes.working = B
    processes.end("replica-1")
    lost = crew.poll(5.0)
    assert [(type(event), event.address) for event in lost] == [(Lost, at("replica-1", n)) for n in (A, B, C)]
    (spare,) = set(where(crew).values())
    assert {replica.state for replica in crew.replicas()} == {State.LOADING}
    for name in (A, B, C):
        greet(crew, at(str(spare), name), 5.1)
    assert [type(event) for event in crew.poll(5.1)] == [Ready] * 3
    assert crew.loners == set()


def test_who_ends_a_process_does_so_to_the_others_once() -> None:
    crew, processes = shared()
    processes.crash("replica-1", B)
    lost = crew.poll(5.0)
    assert {event.replica: event.cause for event in lost if isinstance(event, Lost)} == {
        A: f"lost ({SEGFAULT}) with {B}",
        B: f"lost ({SEGFAULT})",
        C: f"lost ({SEGFAULT}) with {B}",
    }
    houses = {replica.name: replica.house for replica in crew.replicas()}
    assert houses[A] == houses[C] != houses[B]
    assert crew.loners == {("b", "1")}
    later = crew.place(load("b"), "cpu0", 6.0, houses[A])
    assert next(r.house for r in crew.replicas() if r.name == later) != houses[A]
    crew.forget("b", "1")
    assert crew.loners == set()


def test_who_is_at_work_whenever_it_is_killed_is_not_innocent_for_ever() -> None:
    crew, processes = shared(replace(RULES, spares=3))
    for now_s in (2.0, 4.0):
        processes.working = B
        (process,) = {replica.process for replica in crew.replicas()}
        assert crew.loners == set()
        assert process
        for name in (A, B, C):
            greet(crew, at(process, name), now_s)
        processes.end(process)
        crew.poll(now_s)
        for spec in processes.started:
            crew.heard(spec.address, Warm(), now_s)
        crew.poll(now_s + 0.6)
    assert crew.loners == {("b", "1")}


def test_a_house_that_hangs_is_lost_to_the_one_that_was_at_work() -> None:
    crew, processes = shared()
    processes.working = C
    crew.poll(31.5)
    lost = crew.poll(31.5)
    assert processes.killed[0] == "replica-1"
    assert {event.replica: event.failure for event in lost if isinstance(event, Lost)} == dict.fromkeys(
        (A, B, C), "timeout"
    )
    assert crew.loners == {("c", "1")}


def test_who_cannot_be_loaded_where_others_are_is_the_only_one_lost() -> None:
    crew, _ = shared()
    house = crew.replicas()[0].house
    late = crew.place(load("d"), "cpu0", 3.0, house)
    assert where(crew)[late] == "replica-1"
    crew.heard(at("replica-1", late), Failed(error="no such file", failure="load"), 3.5)
    (lost,) = crew.poll(3.5)
    assert isinstance(lost, Lost)
    assert (lost.replica, lost.failure) == (late, "load")
    assert where(crew)[A] == "replica-1"
    assert crew.loners == {("d", "1")}


def test_who_takes_all_memory_is_the_cause_though_others_wait_behind_it() -> None:
    crew, processes = shared()
    crew.heard(at("replica-1", A), Failed(error="MemoryError: no more", failure="memory"), 5.0)
    processes.crash("replica-1", C)
    lost = {event.replica: event.cause for event in crew.poll(5.1) if isinstance(event, Lost)}
    assert lost == {A: "MemoryError: no more", **dict.fromkeys((B, C), f"lost ({SEGFAULT}) with {A}")}
    assert crew.loners == {("a", "1")}


@pytest.mark.parametrize("first", ["Hello", "Failed"])
def test_a_process_that_loads_has_its_time_until_somebody_serves(first: str) -> None:
    crew, processes = shared()
    processes.end("replica-1")
    crew.poll(5.0)
    (spare,) = set(where(crew).values())
    assert spare
    crew.poll(100.0)
    assert spare not in processes.killed, "all are being loaded"
    if first == "Hello":
        greet(crew, at(spare, A), 101.0)
        crew.poll(132.0)
        assert spare in processes.killed, "one that loads so long keeps another one from answering"
    else:
        crew.heard(at(spare, A), Failed(error="no such file", failure="load"), 101.0)
        crew.poll(132.0)
        assert spare not in processes.killed
