from __future__ import annotations

import numpy as np
import pytest

from forescale.control.costs import ProfiledCosts
from forescale.core.cluster import Cluster, Device, DeviceKind, Link
from forescale.profile.measurement import OperatorMeasurement
from forescale.profile.model import KindProfile, ModelProfile
from unit.plan.perceptrons import perceptron

GRAPH = perceptron(8, 16, 8)
CPUS = tuple(Device(name=f"cpu{k}", kind=DeviceKind.CPU, memory_bytes=10**9, speed=0.5) for k in (0, 1))


def costs(unsplit_O: np.ndarray | None = None) -> ProfiledCosts:
    ones_O = np.ones(len(GRAPH.operators))
    measured = OperatorMeasurement(
        binding={"rows": 8},
        forward_s_O=ones_O,
        backward_s_O=ones_O,
        input_s_O=ones_O,
        weight_s_O=0 * ones_O,
        loss_forward_s=0.0,
        loss_backward_s=0.0,
        loss_saved_bytes=0.0,
    )
    kind = KindProfile(measurements=(measured,), optimizer_s_per_byte=0.0, unsplit_O=unsplit_O)
    return ProfiledCosts(
        profile=ModelProfile(graph=GRAPH, kinds={DeviceKind.CPU: kind}, optimizer_state_ratio=2.0),
        cluster=Cluster(devices=CPUS, default_link=Link(bandwidth_bytes_per_s=1e9, latency_s=1e-5)),
        rows_symbol="rows",
        rows=8,
        microbatches=(1,),
        clips_norm=False,
        shardable=True,
    )


def test_a_device_below_its_speed_is_shared_and_lets_messages_wait() -> None:
    problem = costs().problem({"rows": 8}, {"cpu1": 0.2})
    as_profiled, slower = problem.cluster.devices
    assert as_profiled == CPUS[0]
    assert slower.speed == 0.2
    # Away for 60% of each slice of 10 ms; who comes then waits for 3 ms on average.
    assert slower.delay_s == pytest.approx(0.6 * 0.003)
    assert costs().problem({"rows": 8}, {"cpu1": 0.6}).cluster.devices[1].delay_s == 0.0


def test_what_shards_cannot_share_reaches_the_planner_and_the_record() -> None:
    unsplit_O = np.linspace(0.0, 1.0, len(GRAPH.operators))
    known = costs(unsplit_O)
    for each in (known, ProfiledCosts.from_json(known.to_json())):
        unsplit_DO = each.problem({"rows": 8}, {}).unsplit_DO
        assert unsplit_DO is not None
        assert unsplit_DO == pytest.approx(np.stack([unsplit_O, unsplit_O]))
    unknown = costs().problem({"rows": 8}, {})
    assert unknown.unsplit_DO == pytest.approx(np.zeros((2, len(GRAPH.operators))))
