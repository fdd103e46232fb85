"""Which format a text is, and what a cluster does to a graph that brings its own devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forescale.core.errors import InvalidInput
from forescale.plan.cluster_file import ClusterFile, read_cluster
from forescale.plan.placement.reading import FORMATS, TIME_UNIT, Format, detect_format, read_graph

PIPEDREAM = (
    "a -- ReLU -- forward_compute_time=1, backward_compute_time=1, activation_size=1, parameter_size=1"
)
PIPER = '{"maxDevices": 2, "mbsInBatch": 8, "nodes": [], "edges": []}'
EMPTY_MODEL = '{"format": 1, "operators": []}'


def published(**changes: Any) -> str:
    node = {"supportedOnFpga": 1, "cpuLatency": 10.0, "fpgaLatency": 4.0, "isBackwardNode": 0, "size": 5.0}
    return json.dumps(
        {
            "maxSizePerFPGA": 100.0,
            "maxFPGAs": 2,
            "maxCPUs": 1,
            "nodes": [{**node, "id": 1}, {**node, "id": 2, "supportedOnFpga": 0}],
            "edges": [{"sourceId": 1, "destId": 2, "cost": 3.0}],
            **changes,
        }
    )


def cluster(text: str) -> ClusterFile:
    return read_cluster(text, profiles="[devices]\n[links]\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (published(), "device-placement"),
        ("\n" + published()[:60], "device-placement"),
        (PIPEDREAM, "pipedream"),
        (PIPER, "piper"),
        (EMPTY_MODEL, "model"),
    ],
)
def test_a_format_is_known_by_what_it_contains(text: str, expected: Format) -> None:
    assert detect_format(text) == expected


@pytest.mark.parametrize("text", ["[]", "{}", '{"nodes": []}', "hello", "\x00\x89PNG\r\n", "node1 -- node2"])
def test_another_text_is_refused_with_what_would_be_read(text: str) -> None:
    with pytest.raises(InvalidInput, match="no graph in a known format") as refused:
        read_graph(text)
    assert all(name in str(refused.value) for name in FORMATS)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_file_is_called_so(text: str) -> None:
    with pytest.raises(InvalidInput, match="the graph's file is empty"):
        read_graph(text)


def test_every_format_says_its_unit_of_time() -> None:
    assert set(TIME_UNIT) == set(FORMATS)


def test_a_published_graph_keeps_its_devices_without_a_cluster() -> None:
    assert read_graph(published()).devices == ("acc0", "acc1", "cpu0")
    assert read_graph(published(), devices=3).devices == ("acc0", "acc1", "acc2", "cpu0")


def test_a_cluster_takes_the_place_of_a_published_graphs_devices() -> None:
    problem = read_graph(
        published(),
        cluster=cluster(
            "[devices.quick]\ncount = 2\nmemory_bytes = 7\nspeed = 2\n"
            "[devices.host]\ncount = 1\nmemory_bytes = 9\nkind = 'cpu'\nspeed = 0.5\n"
            "[devices.board]\ncount = 1\nmemory_bytes = 8\nkind = 'fpga'\n"
        ),
    )
    assert problem.devices == ("quick0", "quick1", "host0", "board0")
    assert problem.work_KN.tolist() == [[2.0, float("inf")], [20.0, 20.0], [4.0, float("inf")]]
    assert [kind.memory_bytes for kind in problem.kinds] == [7, 9, 8]
    assert [kind.pays_transfers for kind in problem.kinds] == [True, False, True]
    assert problem.nets[0].cost == 3.0


def test_a_cluster_that_cannot_run_a_node_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no device can run node 2"):
        read_graph(published(), cluster=cluster("[devices.a]\ncount = 1\nmemory_bytes = 7\n"))


def test_a_pipedream_graph_needs_devices() -> None:
    assert read_graph(PIPEDREAM, devices=3).devices == ("acc0", "acc1", "acc2")
    with pytest.raises(InvalidInput, match="says nothing of devices; give a cluster file or their number"):
        read_graph(PIPEDREAM)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": EMPTY_MODEL}, "a model says nothing of devices; give a cluster file"),
        ({"text": EMPTY_MODEL, "devices": 2}, "a model says nothing of devices; give a cluster file"),
        ({"text": PIPER}, "Piper's graphs"),
        ({"text": PIPEDREAM, "devices": 2, "batch": {"s0": 1}}, "only a model has symbols"),
        (
            {"text": PIPEDREAM, "devices": 2, "graph_format": "device-placement"},
            "not a device-placement graph",
        ),
        ({"text": published(), "devices": 2, "graph_format": "pipedream"}, "line 1 of the PipeDream graph"),
        ({"text": published()[:60]}, "not a device-placement graph"),
        ({"text": published(nodes=[], edges=[])}, "the graph has no nodes"),
    ],
)
def test_what_cannot_be_read_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_graph(**arguments)


def test_a_cluster_and_a_number_of_devices_exclude_each_other() -> None:
    with pytest.raises(InvalidInput, match="not both"):
        read_graph(PIPEDREAM, devices=2, cluster=cluster("[devices.a]\ncount = 1\nmemory_bytes = 7\n"))


def test_a_model_is_read_without_torch() -> None:
    code = "import sys, forescale.plan.placement.reading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def samples() -> list[Path]:
    return sorted(Path(os.environ.get("FORESCALE_DATA", "none")).glob("p*/*.*"))


@pytest.mark.skipif(not samples(), reason="needs FORESCALE_DATA, a folder with partition/ and pipedream/")
def test_samples_are_told_apart() -> None:
    for path in samples():
        expected = "pipedream" if path.suffix == ".txt" else "device-placement"
        assert detect_format(path.read_text()) == ("piper" if "piper" in path.name else expected)
