"""Pictures of placements: what they show, and that nothing lies outside of them."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

from forescale.plan.placement.picture import draw_placement
from forescale.plan.placement.problem import Net, PlacementProblem
from unit.plan.placements import answer, chain

SVG = "{http://www.w3.org/2000/svg}"


def boxes(root: ET.Element, kind: str) -> list[ET.Element]:
    return [box for box in root.iter(f"{SVG}rect") if box.get("class") == kind]


def hints(root: ET.Element) -> list[str]:
    return [title.text or "" for title in root.iter(f"{SVG}title")]


def texts(root: ET.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def draw(problem: PlacementProblem, device_N: list[int], **options: float) -> ET.Element:
    return ET.fromstring(draw_placement(problem, answer(problem, device_N), **options))


def test_bars_are_work_then_transfers_to_one_scale() -> None:
    root = draw(chain([6.0, 1.0, 2.0], cost=4.0), [0, 1, 1])  # loads 10, 7 and 0
    work = [boxes(root, f"k{device}")[-1 - count] for device, count in ((0, 1), (1, 2))]
    transfers = [boxes(root, f"tint k{device}")[-1] for device in (0, 1)]
    unit = float(work[0].get("width", "")) / 6
    assert float(work[1].get("width", "")) == pytest.approx(3 * unit, abs=0.1)
    assert [float(box.get("width", "")) for box in transfers] == pytest.approx([4 * unit] * 2, abs=0.1)
    assert float(transfers[0].get("x", "")) == pytest.approx(float(work[0].get("x", "")) + 6 * unit, abs=0.1)
    assert "acc0: 6.000 work, 4.000 transfers" in hints(root)
    assert "Longest load: 10.000" in texts(root)


def test_the_bound_stands_where_a_load_of_it_would_end() -> None:
    root = draw(chain([6.0, 4.0]), [0, 0], lower_bound=5.0)
    (line,) = [path for path in root.iter(f"{SVG}path") if path.get("class") == "bound"]
    full = boxes(root, "k0")[1]
    middle = float(full.get("x", "")) + float(full.get("width", "")) / 2
    assert float(line.get("d", "").split(",")[0].removeprefix("M")) == pytest.approx(middle, abs=0.2)
    assert any("none is below 5.000" in text for text in texts(root))


def test_small_graphs_are_drawn_node_by_node_at_their_depth() -> None:
    problem = replace(
        chain([1.0, 1.0, 1.0, 1.0]),
        nets=(
            Net(cost=1.0, nodes=(0, 1)),
            Net(cost=1.0, nodes=(1, 2)),
            Net(cost=1.0, nodes=(3, 2)),  # node 3 has no source: it stands before its reader
        ),
    )
    root = draw(problem, [0, 0, 1, 1])
    x = {
        title.text: float(box.get("x", "0"))
        for box in root.iter(f"{SVG}rect")
        if (title := box.find(f"{SVG}title")) is not None and "node" in (title.text or "")
    }
    at = [x[f"node n{node} on acc{node // 2}: 1"] for node in range(4)]
    assert at[0] < at[1] < at[2]
    assert at[3] == at[1]
    lines = [path.get("class", "") for path in root.iter(f"{SVG}path") if "edge" in path.get("class", "")]
    assert sorted(lines) == ["edge", "edge", "edge across"]


@pytest.mark.parametrize("nodes", [1, 60, 400, 401, 1500])
@pytest.mark.parametrize("count", [1, 9, 70])
def test_everything_is_inside(nodes: int, count: int) -> None:
    problem = chain([1.0] * nodes, count=count)
    root = draw(problem, [node * count // nodes for node in range(nodes)])
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    for box in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(box.get(name, "")) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
        assert w >= 0
    assert all(0 <= float(text.get("y", "")) <= height for text in root.iter(f"{SVG}text"))


def test_large_graphs_show_where_along_them_a_device_works() -> None:
    problem = chain([1.0] * 1000)
    root = draw(problem, [0] * 500 + [1] * 500)
    assert not [title for title in hints(root) if "node" in title]
    first, second = (
        next(path for path in root.iter(f"{SVG}path") if path.get("class") == f"k{device}")
        for device in (0, 1)
    )
    heights = [
        [float(step.split()[0]) for step in path.get("d", "").split("V")[1:-1]] for path in (first, second)
    ]
    assert heights[0][0] < heights[0][-1]  # y grows downwards: work at the beginning, none at the end
    assert heights[1][0] > heights[1][-1]


def test_of_many_devices_the_longest_loads_are_shown() -> None:
    problem = chain([float(node + 1) for node in range(70)], count=70, cost=0.0)
    root = draw(problem, list(range(70)))
    assert "acc69" in texts(root)
    assert "acc3" not in texts(root)
    assert any("7 more devices" in text for text in texts(root))


def test_names_cannot_bring_markup() -> None:
    problem = replace(chain([1.0, 1.0]), nodes=("<script>", 'a"&b'))
    root = draw(problem, [0, 1])
    assert any("node <script> on acc0" in hint for hint in hints(root))
    assert not list(root.iter(f"{SVG}script"))


def test_a_graph_that_takes_no_time_is_drawn() -> None:
    problem = chain([0.0, 0.0], cost=0.0)
    assert "Longest load: 0.000" in texts(draw(problem, [0, 1]))
    assert np.isfinite(answer(problem, [0, 1]).objective)
