"""Cluster files and the profiles that ship with the package."""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from forescale.core.cluster import Link
from forescale.core.errors import InvalidInput
from forescale.plan.cluster_file import ClusterFile, read_cluster
from forescale.profile.hardware import BANDWIDTH_EFFICIENCY, COMPUTE_EFFICIENCY, HARDWARE

PROFILES = files("forescale.plan").joinpath("profiles.toml").read_text(encoding="utf-8")

NODES = """
[devices.gpu]
count = 16
profile = "h100"

[devices.host]
count = 2
profile = "epyc-9654"

[links.slow]
bandwidth_bytes_per_s = 1e9
latency_s = 0.001

[[topology]]
name = "node"
size = 8
link = "nvlink-4"

[[topology]]
name = "rack"
size = 4
link = "infiniband-ndr"

[[topology]]
name = "site"
link = "slow"
"""


def read(text: str) -> ClusterFile:
    return read_cluster(text, profiles=PROFILES)


def test_a_profile_gives_what_a_device_sustains() -> None:
    gpu, host = read(NODES).groups
    assert (gpu.name, gpu.count, gpu.kind, gpu.pays_transfers) == ("gpu", 16, "gpu", True)
    assert gpu.flops_per_s == COMPUTE_EFFICIENCY * 67e12
    assert gpu.half_flops_per_s == COMPUTE_EFFICIENCY * 989.5e12
    assert gpu.memory_bandwidth_bytes_per_s == BANDWIDTH_EFFICIENCY * 3.35e12
    assert gpu.memory_bytes == 80e9
    assert (host.kind, host.pays_transfers) == ("cpu", False)


def test_what_the_file_says_itself_is_taken_as_it_stands() -> None:
    text = """
    [devices.gpu]
    count = 1
    profile = "h100"
    flops_per_s = 5
    memory_bytes = 1e9
    speed = 2
    pays_transfers = false
    """
    (group,) = read(text).groups
    assert (group.flops_per_s, group.memory_bytes, group.speed_ratio) == (5.0, 1e9, 2.0)
    assert not group.pays_transfers
    assert group.half_flops_per_s == COMPUTE_EFFICIENCY * 989.5e12


def test_half_precision_is_no_slower_than_float32_where_nothing_is_said_of_it() -> None:
    (group,) = read("[devices.a]\ncount = 1\nmemory_bytes = 1e9\nflops_per_s = 7e9\n").groups
    assert group.half_flops_per_s == 7e9
    assert group.memory_bandwidth_bytes_per_s is None


@pytest.mark.parametrize(("gpus", "link"), [(8, "nvlink-4"), (9, "infiniband-ndr"), (33, "slow")])
def test_only_the_levels_that_the_devices_need_slow_them_down(gpus: int, link: str) -> None:
    cluster = read(NODES.replace("count = 16", f"count = {gpus}"))
    rate = {"nvlink-4": 450e9, "infiniband-ndr": 50e9, "slow": 1e9}[link]
    assert cluster.distances[-1].transfer_s(1e12) == pytest.approx(1e12 / rate, rel=1e-2)
    assert [level.members for level in cluster.levels[:2]] == [8, 4]


def test_a_level_of_one_is_no_distance_but_slows_what_passes_it() -> None:
    cluster = read(NODES.replace("size = 8", "size = 1").replace("nvlink-4", "slow"))
    assert cluster.distances[0].devices == 4
    assert cluster.distances[0].transfer_s(1e9) == pytest.approx(1.001, rel=1e-6)


def test_the_files_own_link_comes_before_one_that_ships() -> None:
    cluster = read(
        NODES.replace("[links.slow]", "[links.nvlink-4]").replace('link = "slow"', 'link = "pcie-3"')
    )
    assert cluster.levels[0].link == Link(bandwidth_bytes_per_s=1e9, latency_s=0.001)


def test_one_device_needs_no_link() -> None:
    assert read("[devices.a]\ncount = 1\nprofile = 't4'").distances[0].transfer_s(1e9) == 0


def test_several_devices_need_one() -> None:
    cluster = read("[devices.a]\ncount = 2\nprofile = 't4'")
    with pytest.raises(InvalidInput, match=r"add \[\[topology\]\] with a link"):
        _ = cluster.distances


ONE = "[devices.gpu]\ncount = 2\nprofile = 'a10'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the key devices is missing"),
        ("devices = {}", "line 1: devices is {}"),
        ("[devices.gpu", "not TOML: .*end of document"),
        ("[devices.gpu]\ncount: 2", "not TOML: .*line 2"),
        ("\x00\x89PNG", "not TOML"),
        (ONE + "cuont = 3\n", r"line 4: the key devices.gpu.cuont is unknown; known there are count, flops"),
        ("color = 1\n" + ONE, "line 1: the key color is unknown; known there are devices, links, topology"),
        (
            ONE + "[[topology]]\nname = 'x'\nlink = 't4'\nsiez = 3\n",
            r"line 7: the key topology.0.siez is unk",
        ),
        ("\n[devices.gpu]\ncount = -2\nprofile = 'a10'", "line 3: devices.gpu.count is -2; .* greater than"),
        ("[devices.gpu]\ncount = 0\nprofile = 'a10'", "line 2: devices.gpu.count is 0"),
        ("[devices.gpu]\ncount = 1.5\nprofile = 'a10'", "line 2: devices.gpu.count is 1.5"),
        ("[devices.gpu]\nprofile = 'a10'", "line 1: the key devices.gpu.count is missing"),
        ("[devices.gpu]\ncount = 2", "line 1: devices.gpu needs a profile or memory_bytes"),
        ("[devices]\ngpu = {count = -1}", "line 2: devices.gpu.count is -1"),
        ("[devices.'0']\ncount = 1\nprofile = 't4'", "line 1: devices.0.* is 0; string should match"),
        (
            "[devices.gpu]\ncount = 2\nprofile = 'b1000'",
            "line 3: there is no profile 'b1000'; known are a10, ",
        ),
        (ONE + "memory_bytes = nan\n", "line 4: devices.gpu.memory_bytes is nan; .* finite"),
        (ONE + "flops_per_s = inf\n", "line 4: devices.gpu.flops_per_s is inf; .* finite"),
        (ONE + "kind = 'abacus'\n", "line 4: devices.gpu.kind is abacus; .* 'gpu'"),
        (
            ONE + "[links.x]\nbandwidth_bytes_per_s = 0\nlatency_s = 0\n",
            "line 5: links.x.bandwidth_bytes_per_s",
        ),
        (ONE + "[links.x]\nbandwidth_bytes_per_s = 1\nlatency_s = -1\n", "line 6: links.x.latency_s is -1"),
        (
            ONE + "[[topology]]\nname = 'n'\nlink = 'string'\n",
            "line 6: there is no link 'string'; known are eth",
        ),
        (
            ONE + "[[topology]]\nname = 'n'\nsize = 1\nlink = 'pcie-3'\n",
            "line 4: the topology holds 1 devices and",
        ),
        (
            ONE + 2 * "[[topology]]\nname = 'n'\nlink = 'pcie-3'\n",
            "line 4: level n needs a size; only the outermost",
        ),
        (
            "[devices.a]\ncount = 11\nprofile = 't4'\n[devices.a1]\ncount = 1\nprofile = 't4'",
            "two devices would have the same name",
        ),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as refused:
        read(text)
    assert "\n" not in str(refused.value)


def test_every_profile_names_its_source_and_can_be_used() -> None:
    shipped = tomllib.loads(PROFILES)
    kinds = {table["kind"] for table in shipped["devices"].values()}
    assert kinds == {"gpu", "tpu", "cpu", "fpga", "asic"}
    for name, table in shipped["devices"].items():
        assert len(table["source"]) > 20
        assert table["half_flops_per_s"] >= table["flops_per_s"]
        assert read(f"[devices.x]\ncount = 1\nprofile = '{name}'").groups[0].memory_bytes > 1e9
    for name in shipped["links"]:
        levels = f"[[topology]]\nname = 'all'\nlink = '{name}'\n"
        assert read(ONE + levels).distances[0].transfer_s(1e9) <= 1.001


@pytest.mark.parametrize(
    ("profile", "name"),
    [
        ("t4", "NVIDIA T4"),
        ("l4", "NVIDIA L4"),
        ("a10", "NVIDIA A10"),
        ("a100-80gb", "NVIDIA A100"),
        ("h100", "NVIDIA H100"),
        ("h200", "NVIDIA H200"),
        ("tpu-v5e", "Google TPU v5e"),
        ("tpu-v5p", "Google TPU v5p"),
        ("trainium", "AWS Trainium"),
    ],
)
def test_profiles_agree_with_the_hardware_that_is_recommended(profile: str, name: str) -> None:
    table = tomllib.loads(PROFILES)["devices"][profile]
    hardware = next(entry for entry in HARDWARE if entry.name == name)
    assert table["flops_per_s"] == hardware.float32_flops_per_s
    assert table["half_flops_per_s"] == hardware.half_flops_per_s
    assert table["memory_bytes"] == hardware.memory_bytes
    assert table["memory_bandwidth_bytes_per_s"] == hardware.memory_bandwidth_bytes_per_s


def test_the_documented_file_is_read_and_every_profile_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "cluster.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    cluster = read(example)
    assert [group.name for group in cluster.groups] == ["gpu", "host", "board"]
    assert [distance.devices for distance in cluster.distances[:2]] == [8, 16]
    assert cluster.distances[-1].transfer_s(5e12) == pytest.approx(1000, rel=1e-3)
    shipped = tomllib.loads(PROFILES)
    assert [name for name in (*shipped["devices"], *shipped["links"]) if f"`{name}`" not in page] == []
