from __future__ import annotations

from collections import Counter

import pytest

from forescale.engine.serve.routing import ROUTE_HEADER, SESSION_HEADER, Route

CHANCES = [(place + 0.5) / 1000 for place in range(1000)]


def test_versions_get_their_shares_and_the_default_one_the_rest() -> None:
    route = Route(version="1", shares={"2": 0.1, "3": 0.25})

    chosen = Counter(route.choose(None, chance) for chance in CHANCES)

    assert chosen == {"1": 650, "2": 100, "3": 250}


def test_a_whole_share_leaves_nothing_and_none_gets_nothing() -> None:
    assert {Route(version="1", shares={"2": 1.0}).choose(None, chance) for chance in CHANCES} == {"2"}
    assert {Route(version="1", shares={"2": 0.0}).choose(None, chance) for chance in CHANCES} == {"1"}


def test_a_header_that_is_known_chooses_before_chance_does() -> None:
    route = Route(version="1", shares={"2": 0.5}, header={"canary": "2", "stable": "1"})

    assert {route.choose("canary", chance) for chance in CHANCES} == {"2"}
    assert {route.choose("stable", chance) for chance in CHANCES} == {"1"}
    assert {route.choose("nonsense", chance) for chance in CHANCES} == {"1", "2"}


def test_a_session_keeps_its_version_while_shares_grow() -> None:
    sessions = [{SESSION_HEADER: f"user-{number}".encode()} for number in range(4000)]

    def chosen(share: float, version: str = "2") -> list[str]:
        route = Route(version="1", shares={version: share}, header={"stable": "1"})
        assert [route.choose_by(headers, no_chance) for headers in sessions[:9]] == [
            route.choose_by(headers, no_chance) for headers in sessions[:9]
        ]
        return [route.choose_by(headers, no_chance) for headers in sessions]

    few, many = chosen(0.1), chosen(0.5)
    assert abs(few.count("2") - 400) < 80
    assert abs(many.count("2") - 2000) < 150
    assert all(later == "2" for before, later in zip(few, many, strict=True) if before == "2")
    others = chosen(0.1, "3")
    assert sum(a == "2" and b == "3" for a, b in zip(few, others, strict=True)) < 80, "others than before"


def test_headers_decide_before_chance() -> None:
    route = Route(version="1", shares={"2": 0.5}, header={"stable": "1"})
    assert route.choose_by({SESSION_HEADER: b"x", ROUTE_HEADER: b"stable"}, no_chance) == "1"
    assert (route.choose_by({}, lambda: 0.1), route.choose_by({}, lambda: 0.9)) == ("2", "1")
    assert Route(version="1").choose_by({ROUTE_HEADER: b"stable"}, no_chance) == "1"


def no_chance() -> float:
    raise AssertionError("it was not to be left to chance")


def test_shadows_get_copies_of_their_share_but_never_of_what_they_answer() -> None:
    route = Route(version="1", shadows={"2": 0.2})

    assert sum(route.copies("1", chance) == ("2",) for chance in CHANCES) == 200
    assert not any(route.copies("2", chance) for chance in CHANCES)


def test_a_version_that_leaves_is_nowhere_in_the_route() -> None:
    route = Route(version="2", shares={"1": 0.5}, header={"canary": "1", "stable": "2"}, shadows={"2": 1.0})

    assert route.versions() == {"1", "2"}
    assert route.without("2", heir="1").versions() == {"1"}
    assert route.without("1", heir="2").versions() == {"2"}


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_that_make_no_sense_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        Route(version="1", shares={"2": share})
    with pytest.raises(ValueError, match="share"):
        Route(version="1", shadows={"2": share})
    with pytest.raises(ValueError, match="together"):
        Route(version="1", shares={"2": 0.6, "3": 0.6})
