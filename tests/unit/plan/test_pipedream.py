"""The reader of PipeDream's graphs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from forescale.core.cluster import Link
from forescale.core.errors import InvalidInput
from forescale.plan.cluster_file import ClusterFile, DeviceGroup, Kind, Level
from forescale.plan.placement.devices import TRAINING_STATE
from forescale.plan.placement.pipedream import published_cluster, read_pipedream
from forescale.plan.placement.place import place
from forescale.plan.placement.problem import PlacementProblem


def line(name: str, description: str = "ReLU", **changes: str) -> str:
    figures = {
        "forward_compute_time": "1.000",
        "backward_compute_time": "2.000",
        "activation_size": "1000000.000",
        "parameter_size": "100.000",
        **changes,
    }
    return f"{name} -- {description} -- " + ", ".join(f"{key}={value}" for key, value in figures.items())


def text(*lines: str) -> str:
    return "\n".join(lines)


def read(*lines: str, devices: int = 2) -> PlacementProblem:
    return read_pipedream(text(*lines), published_cluster(devices))


def test_reads_times_sizes_and_edges() -> None:
    problem = read(
        line("node3", "Conv2d(3, 64, kernel_size=(3, 3))", backward_compute_time="4.5"),
        line("node1", activation_size="0.0"),
        line("node2"),
        "\tnode3 -- node1",
        "\tnode3 -- node2",
        "\tnode1 -- node2",
        "\tnode3 -- node2",
    )
    assert problem.nodes == ("node3", "node1", "node2")
    assert problem.work_KN.tolist() == [[5.5, 3.0, 3.0]]
    # 1 MB there and its gradient back at 1 GB/s; nothing takes no time.
    assert [(net.cost, net.nodes) for net in problem.nets] == [(2.0, (0, 1, 2)), (0.0, (1, 2))]
    assert problem.memory_bytes_N.tolist() == [TRAINING_STATE * 100 + 1e6, TRAINING_STATE * 100, 1e6 + 400]
    assert problem.devices == ("acc0", "acc1")
    assert problem.kinds[0].memory_bytes == 16e9
    assert not problem.backward_N.any()


def test_descriptions_may_have_separators_and_sizes_may_be_lists() -> None:
    problem = read(
        line("a", "LSTM -- (1024, 1024), forward", activation_size="[2000000.0; 1000000.0]"),
        line("b", "", activation_size="[]") + " -- stage_id=3",
        "\ta -- b",
    )
    assert problem.nodes == ("a", "b")
    assert problem.nets[0].cost == pytest.approx(6.0)
    assert problem.memory_bytes_N[1] == 400


def test_a_source_that_is_an_input_costs_nothing_and_another_input_does() -> None:
    problem = read(line("a", "Input"), line("b", "InputNorm"), "\ta -- b")
    assert problem.work_KN.tolist() == [[0.0, 3.0]]
    assert problem.memory_bytes_N[0] == 0
    assert problem.nets[0].cost == 0


def test_groups_divide_the_times_by_their_speed() -> None:
    groups: list[tuple[str, Kind, float | None]] = [
        ("fast", "gpu", 2.0),
        ("slow", "cpu", 0.5),
        ("plain", "fpga", None),
    ]
    cluster = ClusterFile(
        groups=tuple(
            DeviceGroup(
                name=name,
                kind=kind,
                count=1,
                flops_per_s=None,
                half_flops_per_s=None,
                memory_bytes=1e9,
                memory_bandwidth_bytes_per_s=None,
                speed_ratio=speed,
                pays_transfers=kind != "cpu",
            )
            for name, kind, speed in groups
        ),
        levels=(Level(name="all", members=2, link=Link(bandwidth_bytes_per_s=1e6, latency_s=0.5)),),
    )
    problem = read_pipedream(text(line("a"), line("b"), "\ta -- b"), cluster)
    assert problem.work_KN[:, 0].tolist() == [1.5, 6.0, 3.0]
    assert [kind.pays_transfers for kind in problem.kinds] == [True, False, True]
    assert problem.devices == ("fast0", "slow0", "plain0")
    assert problem.nets[0].cost == 2 * (500 + 1000)


def test_a_cpu_without_a_speed_is_refused() -> None:
    (group,) = published_cluster(1).groups
    cluster = ClusterFile(
        groups=(
            DeviceGroup(
                name="host",
                kind="cpu",
                count=1,
                flops_per_s=None,
                half_flops_per_s=None,
                memory_bytes=group.memory_bytes,
                memory_bandwidth_bytes_per_s=None,
                speed_ratio=None,
                pays_transfers=False,
            ),
        ),
        levels=(),
    )
    with pytest.raises(InvalidInput, match=r"give devices\.host a speed"):
        read_pipedream(line("a"), cluster)


def test_one_node_is_placed() -> None:
    assert place(read(line("a")), contiguous=True).objective == 3.0


def test_parts_without_edges_between_them_are_shared_out() -> None:
    assert place(read(line("a"), line("b"), devices=2), contiguous=True).objective == 3.0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the graph has no nodes"),
        (["node1 -- ReLU"], "line 1 of the PipeDream graph is no node; it should read ID -- DESCRIPTION"),
        ([line("a"), "\ta"], "line 2 of the PipeDream graph is no edge"),
        ([line("a"), line("a")], "line 2 .* node a is there twice"),
        ([line("a"), "\ta -- b"], "the edge a -- b names b, which is no node"),
        ([line("a"), "\ta -- a"], "a cycle .* node a"),
        ([line("a"), line("b"), line("c"), "\ta -- b", "\tb -- c", "\tc -- b"], "a cycle .* node [bc]"),
        ([line("a", forward_compute_time="-1")], "forward_compute_time of node a is -1; it must be finite"),
        ([line("a", backward_compute_time="nan")], "backward_compute_time of node a is nan"),
        ([line("a", backward_compute_time="1e999")], "backward_compute_time of node a is 1e999"),
        ([line("a", activation_size="[1.0; -2.0]")], "activation_size of node a is .*-2.0; it must be"),
        ([line("a", activation_size="[1.0; x]")], "activation_size of node a is ' x', no number"),
        ([line("a", parameter_size="12b")], "parameter_size of node a is '12b', no number"),
        ([line("a").replace("forward_compute_time=1.000, ", "")], "line 1 .* is no node"),
        ([line("a")[:-12]], "line 1 .* is no node"),
    ],
)
def test_a_wrong_graph_is_refused(lines: list[str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read(*lines)


def samples() -> list[Path]:
    return sorted(Path(os.environ.get("FORESCALE_DATA", "none"), "pipedream").glob("*.txt"))


@pytest.mark.skipif(not samples(), reason="needs FORESCALE_DATA, a folder with pipedream/*.txt")
def test_published_profiles_are_read_whole() -> None:
    for path in samples():
        content = path.read_text()
        problem = read_pipedream(content, published_cluster(4))
        assert len(problem.nodes) == content.count("forward_compute_time")
        assert sum(len(net.nodes) - 1 for net in problem.nets) == content.count("\n\t")
        times = [part.split(",")[0] for part in content.split("compute_time=")[1:]]
        (loader,) = [part for part in content.split("\n") if " -- Input -- " in part]
        loading = [part.split(",")[0] for part in loader.split("compute_time=")[1:]]
        total = sum(map(float, times)) - sum(map(float, loading))
        assert np.isclose(problem.work_KN.sum(), total)
