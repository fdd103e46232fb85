from __future__ import annotations

from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest

from forescale.core.cluster import DeviceKind
from forescale.core.errors import InvalidInput
from forescale.plan.cluster_devices import devices_of, rates_of
from forescale.plan.cluster_file import ClusterFile, read_cluster
from forescale.profile.hardware import DISPATCH_S
from forescale.profile.rated import RatedProfile
from unit.plan.graphs import GraphBuilder

CLUSTER = """
[devices.gpu]
count = 4
flops_per_s = 1e6
memory_bytes = 1e9
memory_bandwidth_bytes_per_s = 1e5
[devices.host]
count = 1
kind = "cpu"
flops_per_s = 1e5
memory_bytes = 2e9
memory_bandwidth_bytes_per_s = 1e4
[links.near]
bandwidth_bytes_per_s = 1e8
latency_s = 1e-6
[links.far]
bandwidth_bytes_per_s = 1e7
latency_s = 1e-5
[[topology]]
name = "node"
size = 2
link = "near"
[[topology]]
name = "site"
link = "far"
"""


def read(text: str = CLUSTER) -> ClusterFile:
    profiles = files("forescale.plan").joinpath("profiles.toml").read_text(encoding="utf-8")
    return read_cluster(text, profiles=profiles)


def test_devices_are_joined_as_the_topology_says() -> None:
    cluster = devices_of(read())
    assert [device.name for device in cluster.devices] == ["gpu0", "gpu1", "gpu2", "gpu3", "host0"]
    assert [device.kind for device in cluster.devices] == [DeviceKind.CUDA] * 4 + [DeviceKind.CPU]
    assert cluster.devices[4].memory_bytes == 2e9
    for pair, bandwidth in {("gpu0", "gpu1"): 1e8, ("gpu1", "gpu2"): 1e7, ("gpu3", "host0"): 1e7}.items():
        assert cluster.link(*pair).bandwidth_bytes_per_s == bandwidth
        assert cluster.link(*reversed(pair)).bandwidth_bytes_per_s == bandwidth


def test_costs_follow_from_rates() -> None:
    """Each operator of this graph moves 1 MB and computes little; the host is ten times slower."""
    builder = GraphBuilder()
    last = "x"
    for index in range(3):
        last = builder.add(f"op{index}", last, elements=125_000)
    graph = builder.build([last], {"x": 125_000})
    cluster = devices_of(read())
    profile = RatedProfile.of(graph, rates_of(read()), 2.0)
    costs = profile.microbatch_costs({}, cluster.devices)
    work = profile.work({})
    expected_s_O = work.forward_bytes_O / 1e5 + DISPATCH_S
    np.testing.assert_allclose(costs["forward_s_DO"][0], expected_s_O)
    np.testing.assert_allclose(costs["forward_s_DO"][4], work.forward_bytes_O / 1e4 + DISPATCH_S)
    assert costs["tensor_bytes"]["op0"] == 500_000
    np.testing.assert_allclose(profile.optimizer_s_per_byte(cluster.devices), [7e-5] * 4 + [7e-4])
    twice = replace(cluster.devices[0], speed=2.0)
    np.testing.assert_allclose(profile.microbatch_costs({}, [twice])["forward_s_DO"][0], expected_s_O / 2)


def test_rates_must_be_known() -> None:
    bare = "[devices.gpu]\ncount = 1\nmemory_bytes = 1e9\n"
    with pytest.raises(InvalidInput, match=r"devices\.gpu needs a profile"):
        rates_of(read(bare))
