from __future__ import annotations

from collections import Counter

import pytest

from forescale.engine.serve.routing import Route

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
