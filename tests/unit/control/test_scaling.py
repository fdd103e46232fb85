"""How many replicas models are to have, one look after the other."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from forescale.control.capacity import rows_per_s
from forescale.control.demand import DemandForecast
from forescale.control.scale import Decision, Load, ScalingRules, ScalingState
from forescale.control.scaling import step
from forescale.registry.records import DeploymentSpec

SEEN_ONLY = ScalingRules(level=None, busy_share=0.5, settle_s=10.0, idle_s=20.0, places_per_device=2)
TEN_PER_S = {1: ((1.0, 0.1),)}


def deployed(model: str = "m", least: int = 1, most: int = 8, priority: int = 10) -> DeploymentSpec:
    return DeploymentSpec(
        model=model, number=1, min_replicas=least, max_replicas=most, latency_s=0.5, priority=priority
    )


class Server:
    """Looks once a second; every model's replicas are there at once."""

    def __init__(self, *specs: DeploymentSpec, rules: ScalingRules = SEEN_ONLY, devices: int = 8) -> None:
        self.rules, self.devices = rules, devices
        self.state = ScalingState()
        self.now_s = 0.0
        self.loads = {
            spec.model: Load(
                spec=spec,
                arrived_rows=0,
                waiting_rows=0,
                batch_times=TEN_PER_S,
                max_rows=1,
                ready=1,
                start_s=2.0,
            )
            for spec in specs
        }
        self.look()

    def look(self, waiting: int = 0, **rates_per_s: int) -> tuple[Decision, ...]:
        """After a second with so many rows; the first model has ``waiting`` in its queue."""
        self.now_s += 1.0
        for place, (name, load) in enumerate(self.loads.items()):
            arrived = load.arrived_rows + rates_per_s.get(name, 0)
            self.loads[name] = replace(
                load, arrived_rows=arrived, waiting_rows=0 if place else waiting, ready=self.wanted(name)
            )
        self.state, decisions = step(
            self.state, tuple(self.loads.values()), self.now_s, self.devices, self.rules
        )
        return decisions

    def wanted(self, name: str = "m") -> int:
        return self.state.models[name].wanted if self.state.models else 1

    def reason(self, name: str = "m") -> str:
        return self.state.models[name].reason


def test_replicas_follow_demand_at_their_capacity() -> None:
    server = Server(deployed())
    (decision,) = server.look(m=20)
    assert (decision.before, decision.scale.wanted) == (1, 4)
    assert decision.scale.reason == "20 rows/s now; a replica does 10 rows/s within 500 ms"


def test_fewer_are_wanted_only_when_no_more_were_needed_for_a_while() -> None:
    server = Server(deployed())
    server.look(m=20)
    for _ in range(9):
        assert server.look(m=5) == ()
        assert "4 were needed" in server.reason()
    server.look(m=15)
    assert server.wanted() == 3
    for _ in range(9):
        server.look(m=5)
    assert server.wanted() == 3
    server.look(m=5)
    assert server.wanted() == 1


def test_a_queue_asks_for_replicas_before_the_second_is_over() -> None:
    server = Server(deployed())
    server.look(m=2)
    load = replace(server.loads["m"], waiting_rows=60, ready=1)
    state, (decision,) = step(server.state, [load], server.now_s + 0.25, 8, SEEN_ONLY)
    assert decision.scale.wanted == 5  # 2 rows/s and 60 rows in 3 s, at 10 rows/s, half of the time
    assert "60 rows wait, 6.0 s of work" in decision.scale.reason
    assert state.taken_s == server.now_s


def test_a_queue_that_is_answered_in_time_asks_for_nothing() -> None:
    server = Server(deployed())
    server.look(m=2)
    assert server.look(waiting=4, m=2) == ()


def test_limits_of_the_deployment_hold_and_are_said() -> None:
    server = Server(deployed(least=2, most=3))
    assert server.wanted() == 2
    assert "at least 2, as deployed" in server.reason()
    server.look(m=100)
    assert server.wanted() == 3
    assert "at most 3, as deployed" in server.reason()


def test_a_fixed_number_stays() -> None:
    server = Server(deployed(least=2, most=2))
    assert server.look(m=100) == ()
    assert server.wanted() == 2


def test_nothing_is_concluded_before_a_replica_has_answered() -> None:
    server = Server(deployed())
    server.loads["m"] = replace(server.loads["m"], batch_times={})
    server.state = ScalingState()
    server.look(waiting=50)
    server.look(waiting=50, m=100)
    assert server.wanted() == 1
    assert "not known yet" in server.reason()


def test_an_idle_model_loses_its_last_replica_and_the_first_request_brings_it_back() -> None:
    server = Server(deployed(least=0))
    assert server.wanted() == 1  # it is tried once
    server.look(m=1)
    for _ in range(19):
        server.look()
        assert server.wanted() == 1
    (decision,) = server.look()
    assert (decision.scale.wanted, decision.scale.reason) == (0, "nothing asked for 20 s")
    server.look()
    load = replace(server.loads["m"], waiting_rows=1)
    _, (decision,) = step(server.state, [load], server.now_s + 0.01, 8, SEEN_ONLY)
    assert decision.scale.wanted == 1
    assert decision.scale.reason.startswith("a request came; ")


@pytest.mark.parametrize(("level", "sleeps"), [(0.95, False), (None, True)])
def test_a_forecast_keeps_a_model_awake_that_is_likely_to_be_asked(level: float | None, sleeps: bool) -> None:
    server = Server(deployed(least=0), rules=replace(SEEN_ONLY, level=level, idle_s=3.0))
    wanted = list[int]()
    for _ in range(30):
        for rate in (0, 0, 0, 20):
            server.look(m=rate)
            wanted.append(server.wanted())
    assert (0 in wanted[60:]) is sleeps


def test_a_new_model_is_not_expected_to_be_asked_for_anything_whatever() -> None:
    server = Server(deployed(), rules=replace(SEEN_ONLY, level=0.95))
    server.loads["m"] = replace(server.loads["m"], start_s=12.0)
    for rate in (0, 0, 0, 0, 0, 0, 7772, 3466, 4000, 3900):
        server.look(m=rate)
        assert not server.state.models["m"].peak_per_s > 3 * 7772
    assert server.state.models["m"].peak_per_s > 0.0


def test_what_was_asked_once_is_forgotten() -> None:
    server = Server(deployed(least=0), rules=replace(SEEN_ONLY, level=0.95))
    for _ in range(8):
        server.look(m=4000)
    for _ in range(25):
        server.look()
    assert server.wanted() == 0


def test_a_full_pool_serves_the_first_class_first_and_says_so() -> None:
    server = Server(deployed("last", priority=20), deployed("first", priority=1), devices=3)
    server.look(last=30, first=20)
    assert (server.wanted("first"), server.wanted("last")) == (4, 2)
    assert server.state.models["last"].short == 4
    assert server.reason("last").endswith(
        "4 fewer than needed: the pool's 6 places are taken by models of its class or before"
    )


def test_models_of_a_class_share_a_full_pool() -> None:
    server = Server(deployed("a"), deployed("b"), devices=3)
    server.look(a=30, b=30)
    assert (server.wanted("a"), server.wanted("b")) == (3, 3)


def test_what_deployments_ask_for_at_least_is_given_though_the_pool_is_full() -> None:
    server = Server(deployed("a", least=2), deployed("b", least=2, most=4), devices=1)
    server.look(a=30)
    assert (server.wanted("a"), server.wanted("b")) == (2, 2)


def test_a_version_that_left_with_its_count_is_no_demand() -> None:
    server = Server(deployed())
    server.look(m=20)
    server.loads["m"] = replace(server.loads["m"], arrived_rows=3)
    server.look()
    assert server.look(m=5) == ()


@pytest.mark.parametrize(
    ("times", "latency_s", "expected_per_s"),
    [
        ((), 1.0, None),
        (((1.0, 0.1),), 1.0, 320.0),  # as if 32 rows took no longer than one
        (((1.0, 0.1),), 0.1, 10.0),  # in time is none: more replicas would not help
        (((1.0, 0.02), (32.0, 0.64)), 0.7, 50.0),  # in proportion to its rows
        (((1.0, 0.1), (16.0, 0.25)), 0.5, 64.0),  # 16 rows; 32 would take 0.41 s
        (((1.0, 0.1), (16.0, 0.25)), inf, 32 / 0.41),
        (((8.0, 0.2), (16.0, 0.1)), inf, 320.0),  # noise: larger ones take no less
    ],
)
def test_capacity_is_that_of_the_largest_batch_in_time(
    times: tuple[tuple[float, float], ...], latency_s: float, expected_per_s: float | None
) -> None:
    assert rows_per_s(times, 32, latency_s) == (expected_per_s and pytest.approx(expected_per_s))


def test_models_come_and_go_in_the_forecast() -> None:
    forecast = DemandForecast()
    for turn in range(3):
        for second in range(5):
            asked = {f"{turn}.{place}": 10.0 + place for place in range(7)}
            forecast = forecast.taken_in(asked, 5.0 * turn + second)
    many = forecast.taken_in({f"many.{place}": 5.0 for place in range(20)}, 15.0)
    leads_s = {f"many.{place}": 3.0 for place in range(20)}
    assert len(many.peaks_per_s(leads_s, (0.5, 0.95))) == 20
    middle, high = forecast.peaks_per_s({"2.3": 3.0}, (0.5, 0.95))["2.3"]
    assert 0.0 <= middle <= high
