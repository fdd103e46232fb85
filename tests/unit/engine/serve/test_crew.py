"""Who gets which process when, in virtual time and without processes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fake_processes import CPU, DIGITS, OTHER, Processes, at, greet
from forescale.core.cluster import Device
from forescale.engine.serve.crew import Crew
from forescale.engine.serve.messages import Beat, Failed, Left, Warm
from forescale.engine.serve.roster import CrewRules, Ended, Lost, Ready, State

RULES = CrewRules(spares=1, starts=1)


def crew_of(*devices: Device, rules: CrewRules = RULES) -> tuple[Crew, Processes]:
    processes = Processes()
    crew = Crew(processes, processes.send, devices or (CPU,), rules)
    crew.poll(0.0)
    return crew, processes


def serving(rules: CrewRules = RULES) -> tuple[Crew, Processes, str]:
    """A replica that serves in ``replica-1`` since second 1, and no spare that is warm."""
    crew, processes = crew_of(rules=rules)
    crew.heard("replica-1", Warm(), 1.0)
    name = crew.place(DIGITS, "cpu0", 1.0)
    greet(crew, at("replica-1"), 1.0)
    assert [type(event) for event in crew.poll(1.0)] == [Ready]
    return crew, processes, name


def test_a_warm_spare_becomes_a_replica_at_once_and_is_replaced_afterwards() -> None:
    crew, processes = crew_of()
    assert list(processes.living) == ["replica-1"]
    crew.heard("replica-1", Warm(), 1.0)
    assert crew.spares() == 1
    name = crew.place(DIGITS, "cpu0", 1.0)
    assert processes.sent == [(at("replica-1"), "load")]
    assert list(processes.living) == ["replica-1"], "a start would slow down what is being loaded"
    hello = greet(crew, at("replica-1"), 1.1)
    assert crew.poll(1.1) == (Ready(replica=name, address=at("replica-1"), hello=hello),)
    (replica,) = crew.replicas()
    assert (replica.state, replica.process) == (State.SERVING, "replica-1")
    assert list(processes.living) == ["replica-1", "replica-2"]


def test_starts_are_staggered_and_replicas_come_before_spares() -> None:
    crew, processes = crew_of(CPU, OTHER)
    for _ in range(2):
        crew.place(DIGITS, "cpu1", 0.0)
    crew.poll(0.0)
    assert [spec.device.name for spec in processes.started] == ["cpu0"]
    for number in range(1, 4):
        crew.heard(f"replica-{number}", Warm(), float(number))
    assert [spec.device.name for spec in processes.started] == ["cpu0", "cpu1", "cpu1"]
    for number in (2, 3):
        greet(crew, at(f"replica-{number}", f"digits.1.{number - 1}"), 4.0)
    crew.poll(4.0)
    crew.heard("replica-4", Warm(), 5.0)
    assert [spec.device.name for spec in processes.started] == ["cpu0", "cpu1", "cpu1", "cpu1"]
    assert crew.spares() == 2


def test_a_lost_replica_gets_a_process_at_once_and_then_after_pauses() -> None:
    crew, processes, name = serving()
    pauses_s = []
    now_s = 2.0
    for _ in range(5):
        (replica,) = crew.replicas()
        assert replica.process
        processes.end(replica.process)
        (lost,) = crew.poll(now_s)
        assert isinstance(lost, Lost)
        assert (lost.replica, lost.address, lost.failure) == (name, at(replica.process), "crash")
        (replica,) = crew.replicas()
        pauses_s.append(replica.retry_s - now_s)
        crew.heard(processes.started[-1].address, Warm(), now_s)  # the spare is ready, the replica not always
        crew.poll(replica.retry_s - 1e-3)
        assert (crew.replicas()[0].process is None) == (replica.retry_s > now_s)
        now_s = replica.retry_s
        crew.poll(now_s)
        assert crew.replicas()[0].state is State.LOADING
    assert pauses_s == [0.0, 0.5, 1.0, 2.0, 4.0]


def test_the_time_that_a_replica_served_counts_as_its_pause() -> None:
    crew, processes, _ = serving()
    for number, now_s in ((1, 2.0), (2, 4.0), (3, 6.0)):
        processes.end(f"replica-{number}")
        crew.poll(now_s)
        crew.heard(f"replica-{number + 1}", Warm(), now_s)
        assert crew.replicas()[0].state is State.LOADING, "it had served for longer than the pause"
        greet(crew, at(f"replica-{number + 1}"), now_s)
        crew.poll(now_s)
    assert crew.replicas()[0].attempts == 3


def test_steady_service_clears_the_record() -> None:
    crew, processes, _ = serving()
    processes.end("replica-1")
    crew.poll(2.0)
    crew.heard("replica-2", Warm(), 3.0)
    greet(crew, at("replica-2"), 3.0)
    crew.poll(3.0)
    assert crew.replicas()[0].attempts == 1
    processes.end("replica-2")
    crew.poll(5.9)
    assert crew.replicas()[0].attempts == 2
    crew.heard("replica-3", Warm(), 7.0)
    greet(crew, at("replica-3"), 7.0)
    processes.end("replica-3")
    crew.poll(10.0)
    assert crew.replicas()[0].attempts == 1


def test_a_model_that_cannot_be_loaded_says_why() -> None:
    crew, processes = crew_of()
    crew.heard("replica-1", Warm(), 1.0)
    name = crew.place(DIGITS, "cpu0", 1.0)
    crew.heard(at("replica-1"), Failed(error="no such file", failure="load"), 1.5)
    assert processes.sent[-1] == ("replica-1", "drain")
    lost = Lost(replica=name, address=at("replica-1"), cause="no such file", failure="load")
    assert crew.poll(1.5) == (lost,)
    assert crew.replicas()[0].cause == "no such file"


@pytest.mark.parametrize(
    ("last_words", "limit_s"), [(None, 120.0), (Warm(), 30.0)], ids=["starting", "spare"]
)
def test_a_process_without_a_model_that_hangs_is_replaced(last_words: Warm | None, limit_s: float) -> None:
    crew, processes = crew_of()
    if last_words:
        crew.heard("replica-1", last_words, 0.0)
    crew.poll(limit_s)
    assert processes.killed == []
    crew.poll(limit_s + 0.1)
    crew.poll(limit_s + 0.1)
    assert processes.killed == ["replica-1"]
    assert list(processes.living) == ["replica-2"]


def test_a_model_that_does_not_answer_is_lost_for_that_reason() -> None:
    crew, processes, name = serving()
    crew.heard("replica-1", Beat(), 10.0)
    assert crew.poll(40.0) == ()
    crew.poll(40.1)
    assert crew.poll(40.1) == (
        Lost(
            replica=name,
            address=at("replica-1"),
            cause="the model did not answer for 30 s",
            failure="timeout",
        ),
    )
    assert processes.killed == ["replica-1"]


def test_a_removed_replica_drains_and_is_not_replaced() -> None:
    crew, processes, name = serving()
    assert crew.remove(name, 5.0) == at("replica-1")
    assert crew.remove(name, 5.0) == at("replica-1")
    assert processes.sent[-1] == (at("replica-1"), "drain")
    assert processes.sent.count((at("replica-1"), "drain")) == 1
    crew.heard(at("replica-1"), Left(), 6.0)
    assert processes.sent[-1] == ("replica-1", "drain")
    assert crew.poll(6.0) == (Ended(replica=name, address=at("replica-1")),)
    assert crew.replicas() == ()


def test_a_replica_that_does_not_finish_is_killed() -> None:
    crew, processes, name = serving()
    crew.remove(name, 5.0)
    crew.heard("replica-1", Beat(), 34.0)
    crew.poll(35.1)
    assert processes.killed == ["replica-1"]
    assert crew.poll(35.1) == (Ended(replica=name, address=at("replica-1")),)


def test_a_replica_that_waits_for_a_process_is_simply_forgotten() -> None:
    crew, _ = crew_of()
    name = crew.place(DIGITS, "cpu0", 0.0)
    assert crew.remove(name, 0.0) is None
    assert crew.replicas() == ()


def test_a_loading_replica_that_is_removed_never_serves() -> None:
    crew, _processes = crew_of()
    crew.heard("replica-1", Warm(), 1.0)
    name = crew.place(DIGITS, "cpu0", 1.0)
    crew.remove(name, 1.0)
    greet(crew, at("replica-1"), 1.2)
    assert crew.poll(1.2) == ()


def test_processes_that_cannot_even_start_are_tried_after_pauses() -> None:
    crew, processes = crew_of()
    for number, (now_s, started) in enumerate([(0.0, 2), (1.0, 2), (1.6, 3), (1.7, 3), (2.8, 4)]):
        if len(processes.living) and number in (0, 1, 3):
            processes.end(next(iter(processes.living)))
        crew.poll(now_s)
        assert len(processes.started) == started, number


def test_a_process_whose_connection_broke_is_killed() -> None:
    crew, processes = crew_of()
    crew.heard("replica-1", Warm(), 1.0)
    processes.unreachable.add("replica-1")
    crew.place(DIGITS, "cpu0", 1.0)
    assert processes.killed == ["replica-1"]
    assert [type(event) for event in crew.poll(1.0)] == [Lost]


def test_strangers_are_ignored() -> None:
    crew, _ = crew_of()
    crew.heard("nobody", Warm(), 1.0)
    assert crew.spares() == 0


def test_a_process_that_has_held_a_replica_is_no_spare_and_has_its_time_to_end() -> None:
    crew, processes, name = serving()
    crew.heard("replica-2", Warm(), 2.0)
    crew.remove(name, 5.0)
    crew.heard(at("replica-1"), Left(), 6.0)
    assert crew.spares() == 1
    crew.poll(36.1)
    assert "replica-1" in processes.killed


def test_what_a_model_takes_is_the_most_that_any_of_its_replicas_has_said() -> None:
    crew, _, name = serving()
    crew.heard("replica-1", Beat(model_bytes={name: 70}), 2.0)
    crew.heard("replica-1", Beat(model_bytes={name: 50}), 3.0)
    assert crew.model_bytes == {("digits", "1"): 70}
    crew.heard("replica-1", Beat(model_bytes={"strange.1.7": 90}), 3.0)
    assert crew.model_bytes == {("digits", "1"): 70}


def test_spares_take_of_the_memory_for_replicas() -> None:
    device = replace(CPU, memory_bytes=1000)
    crew, _ = crew_of(device, OTHER, rules=replace(RULES, spares=2))
    crew.heard("replica-1", Warm(process_bytes=300), 1.0)
    assert (crew.process_bytes, crew.room_bytes()) == (300, {"cpu0": 400})
    crew.heard("replica-1", Warm(), 2.0)  # a process that cannot say it
    assert crew.process_bytes == 300
    crew.heard("replica-1", Warm(process_bytes=20, common_bytes=500), 3.0)
    assert crew.room_bytes() == {"cpu0": 1000 - 2 * 20 - 500 // 2}
