"""Threads and replicas, for any model: never more than there is, never a risk unasked, never dearer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf

from hypothesis import example, given
from hypothesis import strategies as st

from forescale.control.capacity import rows_in_time_per_s, seconds_of, times_with
from forescale.control.threads import Cores, Prices, Want, batch_rows, choose

ROWS = (1.0, 4.0, 16.0)


@st.composite
def measured(draw: st.DrawFn) -> dict[int, tuple[tuple[float, float], ...]]:
    """What batches take with one to four numbers of threads, whatever they are."""
    threads = draw(st.lists(st.sampled_from((1, 2, 3, 4, 8)), min_size=1, max_size=4, unique=True))
    seconds = st.floats(1e-4, 2.0)
    return {
        each: tuple(
            zip(ROWS[: draw(st.integers(1, 3))], sorted(draw(st.tuples(*[seconds] * 3))), strict=False)
        )
        for each in threads
    }


@st.composite
def wants(draw: st.DrawFn) -> Want:
    least = draw(st.integers(1, 3))
    most_threads = draw(st.integers(1, 16))
    return Want(
        times=draw(measured()),
        max_rows=32,
        latency_s=draw(st.floats(0.01, 2.0)),
        demand_per_s=draw(st.floats(0.0, 2000.0)),
        least=least,
        most=least + draw(st.integers(0, 5)),
        most_threads=most_threads,
        cores=most_threads + draw(st.integers(0, 16)),
        start_s=draw(st.floats(0.1, 60.0)),
        start_core_s=draw(st.floats(0.0, 10.0)),
        withheld_cores=draw(st.floats(0.0, 2.0)),
        late_worth=6.0,
        horizon_s=30.0,
    )


def does_per_s(threads: int, replicas: int, want: Want) -> float:
    return replicas * rows_in_time_per_s(times_with(want.times, threads), want.max_rows, want.latency_s)


@given(wants(), st.integers(1, 16), st.integers(1, 8))
def test_nobody_gets_threads_that_are_not_there_and_every_change_has_a_reason(
    want: Want, threads: int, replicas: int
) -> None:
    chosen, reason = choose(threads, replicas, want)
    assert 1 <= chosen <= want.most_threads
    assert (reason is None) == (chosen == threads)


@given(wants(), st.integers(1, 8), st.data())
def test_whoever_does_enough_tries_nothing_and_never_takes_more(
    want: Want, replicas: int, data: st.DataObject
) -> None:
    threads = data.draw(st.integers(1, want.most_threads))
    enough = replace(want, demand_per_s=does_per_s(threads, replicas, want) * data.draw(st.floats(0.0, 1.0)))
    chosen, _ = choose(threads, replicas, enough)
    assert chosen <= threads
    if chosen < threads:
        assert does_per_s(chosen, replicas, enough) >= enough.demand_per_s


@given(wants(), st.integers(1, 8))
def test_what_is_tried_cannot_make_late_what_was_in_time(want: Want, replicas: int) -> None:
    top = max(want.times)
    more = replace(want, demand_per_s=does_per_s(top, replicas, want) + 100.0, most_threads=16, cores=16 * 8)
    chosen, _ = choose(top, replicas, more)
    if chosen <= top or not does_per_s(top, 1, want):
        return
    rows = batch_rows(want.times, chosen, want.max_rows, want.latency_s)
    assert rows
    known = times_with(want.times, top)
    mended_s = min(seconds_of(known, rows), *(seconds for each, seconds in known if each >= rows), inf)
    assert 2.0 * (2.0 * mended_s) <= want.latency_s + 1e-9


@given(wants(), st.integers(1, 16), st.integers(1, 8), st.floats(1.01, 5.0))
def test_nothing_that_was_measured_is_cheaper_than_what_is_chosen_when_more_is_needed(
    want: Want, threads: int, replicas: int, times: float
) -> None:
    more = replace(want, demand_per_s=does_per_s(threads, replicas, want) * times + 1.0)
    chosen, _ = choose(threads, replicas, more)
    price = Prices(more).of(chosen, replicas).core_s
    for each in want.times:
        if each <= want.most_threads:
            assert Prices(more).of(each, replicas).core_s >= price - 1e-9


@given(wants(), st.integers(1, 16), st.integers(1, 8))
def test_who_has_what_was_chosen_and_does_enough_with_it_never_takes_more(
    want: Want, threads: int, replicas: int
) -> None:
    chosen, _ = choose(threads, replicas, want)
    there = max(replicas, Prices(want).of(chosen, replicas).replicas)
    if does_per_s(chosen, there, want) >= want.demand_per_s:
        fewer, _ = choose(chosen, there, want)
        assert fewer <= chosen
        assert choose(fewer, there, want)[0] <= fewer


loads = st.lists(
    st.tuples(st.floats(0.0, 4.0), st.dictionaries(st.sampled_from(("cpu0", "cpu1")), st.integers(1, 3))),
    max_size=4,
)


@given(st.fixed_dictionaries({"cpu0": st.integers(1, 8), "cpu1": st.integers(1, 8)}), loads)
@example({"cpu0": 4, "cpu1": 4}, [(4.0, {"cpu0": 1}), (1.0, {"cpu0": 1})])
def test_threads_beyond_one_are_on_cores_that_nobody_else_is_busy_on(
    cores: Mapping[str, int], models: list[tuple[float, dict[str, int]]]
) -> None:
    free = Cores(cores, [(str(place), *each) for place, each in enumerate(models)])
    for place, (_, replicas) in enumerate(models):
        room = free.room(str(place))
        assert room is not None
        most, together = room
        for device, count in replicas.items():
            others = sum(
                each * there.get(device, 0) for other, (each, there) in enumerate(models) if other != place
            )
            assert most == 1 or most * count + others <= cores[device] + 0.5 + 1e-6
        assert 0 <= together <= sum(cores.values())


def test_a_device_whose_cores_are_not_counted_gives_no_threads() -> None:
    assert Cores({}, []).room("m") is None
    assert Cores({"cpu0": 4}, [("m", 1.0, {"cuda0": 1})]).room("m") is None
    assert Cores({"cpu0": 4}, []).room("m") == (4, 4)
