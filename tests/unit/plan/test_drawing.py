from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest

from forescale.graph.model import ModelGraph
from forescale.plan.drawing import draw_svg
from forescale.plan.partition import partition, predict
from forescale.plan.partition_plan import PartitionPlan, Schedule, Stage
from unit.plan.graphs import GraphBuilder, chain, problem

SVG = "{http://www.w3.org/2000/svg}"


def drawn(graph: ModelGraph, *splits: tuple[int, ...]) -> ET.Element:
    request = problem(graph, speeds=[1.0] * len(splits))
    stages = tuple(Stage(device=f"cpu{index}", operators=split) for index, split in enumerate(splits))
    prediction = predict(request, stages, 2, Schedule.GPIPE)
    plan = PartitionPlan(stages=stages, microbatches=2, schedule=Schedule.GPIPE, prediction=prediction)
    return ET.fromstring(draw_svg(graph, plan))


def texts(picture: ET.Element) -> list[str]:
    return [element.text or "" for element in picture.iter(f"{SVG}text")]


def test_a_plan_shows_devices_modules_traffic_and_the_predicted_step() -> None:
    graph = chain(4, elements=1000)
    shown = texts(drawn(graph, (0, 1), (2, 3)))
    assert {"cpu0", "cpu1", "layers.0", "layers.3", "1 tensor", "4 kB"} <= set(shown)
    assert any(text.startswith("Predicted step: ") for text in shown)
    assert sum(text.endswith("busy") for text in shown) == 2


def test_a_tensor_that_skips_a_stage_goes_round_it() -> None:
    builder = GraphBuilder()
    builder.add("a", "x", elements=10)
    builder.add("b", "a", elements=10)
    builder.add("c", "a", "b", elements=10)
    picture = drawn(builder.build(["c"], {"x": 8}), (0,), (1,), (2,))
    assert len(list(picture.iter(f"{SVG}path"))) == 3
    assert "1 tensor, 40 B" in texts(picture)


def test_replicas_stand_side_by_side_and_say_how_they_share() -> None:
    picture = drawn(chain(3), (0, 1, 2), (0, 1, 2))
    assert {"cpu0", "cpu1"} <= set(texts(picture))
    assert any(text.startswith("2 replicas, microbatches 1 + 1") for text in texts(picture))
    assert not list(picture.iter(f"{SVG}path"))


def test_an_output_goes_to_the_loss_on_the_last_stage() -> None:
    builder = GraphBuilder()
    builder.add("early", "x")
    builder.add("late", "x")
    picture = drawn(builder.build(["early", "late"], {"x": 8}), (0,), (1,))
    assert len(list(picture.iter(f"{SVG}path"))) == 1


def test_deep_models_are_gathered_into_few_boxes() -> None:
    builder = GraphBuilder()
    previous = "x"
    for block in range(6):
        for part in ("norm", "attention.query", "attention.key", "mlp.up", "mlp.down"):
            previous = builder.add(f"{part}{block}", previous, module=f"blocks.{block}.{part}")
    graph = builder.build([previous], {"x": 8})
    shown = texts(drawn(graph, tuple(range(15)), tuple(range(15, 30))))
    assert "blocks.1.attention" in shown
    assert "blocks.1.attention.query" not in shown


def test_a_hundred_modules_beside_each_other_still_fit() -> None:
    graph = chain(100)
    picture = drawn(graph, tuple(range(50)), tuple(range(50, 100)))
    assert len(list(picture.iter(f"{SVG}rect"))) < 50
    assert any(re.fullmatch(r"layers\.\d+ … layers\.\d+", text) for text in texts(picture))


def test_names_cannot_break_out_of_the_picture() -> None:
    builder = GraphBuilder()
    builder.add("a", "x", module="<script>&\"'")
    picture = drawn(builder.build(["a"], {"x": 8}), (0,))
    assert "<script>&\"'" in texts(picture)
    assert not list(picture.iter(f"{SVG}script"))


@pytest.mark.parametrize("count", [1, 2])
def test_the_planners_own_plans_can_be_drawn(count: int) -> None:
    graph = chain(10)
    plan = partition(problem(graph, speeds=[1.0] * count))
    picture = ET.fromstring(draw_svg(graph, plan))
    assert picture.get("class") == "fp"
    assert draw_svg(graph, plan) == draw_svg(graph, plan)
