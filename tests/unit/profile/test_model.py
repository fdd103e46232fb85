from __future__ import annotations

import json
from dataclasses import fields, replace

import numpy as np
import pytest

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import InvalidInput
from forescale.graph.model import (
    MemoryEvent,
    ModelGraph,
    Operator,
    Parameter,
    SavedStorage,
    SymbolSource,
    Tensor,
)
from forescale.plan.problem import MicrobatchCosts
from forescale.profile.hardware import HARDWARE, suggest_hardware
from forescale.profile.measurement import OperatorMeasurement, typical
from forescale.profile.model import KindProfile, ModelProfile
from forescale.profile.roofline import Roofline
from forescale.profile.summary import Limit, costliest_modules, find_bottleneck

CPU = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=10**9)
SLOW = replace(CPU, name="cpu1", speed=0.5)
TRUTH = Roofline(dispatch_s=1e-5, flops_per_s=1e11, bytes_per_s=4e10)


def operator(index: int, target: str, read: str, made: str, parameter: str | None, path: str) -> Operator:
    reads = (parameter,) if parameter else ()
    return Operator(
        index=index,
        name=made,
        target=target,
        args=({"tensor": read}, *({"parameter": name} for name in reads)),
        kwargs={},
        outputs=(made,),
        returns_tuple=False,
        module_path=path,
        source="",
        random=False,
        inputs=(read,),
        parameters=reads,
        buffers=(),
        mutated_buffers=(),
    )


def graph() -> ModelGraph:
    """x (rows, 512) -> linear -> relu -> linear -> view"""
    names = ("x", "h", "a", "y", "z")
    tensors = {
        name: Tensor(
            name=name,
            producer=index - 1 if index else None,
            consumers=(index,) if index < 4 else (),
            shape=("rows", 512),
            dtype="float32",
            requires_grad=index > 0,
        )
        for index, name in enumerate(names)
    }
    return ModelGraph(
        operators=(
            operator(0, "aten.linear.default", "x", "h", "w0", "body.up"),
            operator(1, "aten.relu.default", "h", "a", None, "body"),
            operator(2, "aten.linear.default", "a", "y", "w1", "body.down"),
            operator(3, "aten.alias.default", "y", "z", None, ""),
        ),
        tensors=tensors,
        parameters={
            name: Parameter(name=name, aliases=(), shape=(512, 512), dtype="float32", trainable=True)
            for name in ("w0", "w1")
        },
        buffers={},
        buffer_updates=(),
        inputs=("x",),
        outputs=("z",),
        symbols={"rows": SymbolSource(tensor="x", axis=0)},
        example={"rows": 8},
        saved=(SavedStorage(name="a", operators=(1, 2), size_bytes="2048*rows"),),
        memory=(
            MemoryEvent(operator=1, backward=False, begins=True, storage="a", size_bytes="2048*rows"),
            MemoryEvent(operator=2, backward=True, begins=True, storage="2#0", size_bytes="4096*rows"),
            MemoryEvent(operator=2, backward=True, begins=False, storage="2#0", size_bytes="4096*rows"),
        ),
    )


def measurement(rows: int, roofline: Roofline = TRUTH) -> OperatorMeasurement:
    """What a device that follows ``roofline`` exactly would have measured."""
    blank = ModelProfile(graph=graph(), kinds={}, optimizer_state_ratio=0.0)
    work = blank.work({"rows": rows})
    loss_s = float(roofline.seconds(np.array(0.0), np.array(2 * 2048.0 * rows)))
    backward_s_O = roofline.seconds(work.backward_flops_O, work.backward_bytes_O)
    return OperatorMeasurement(
        binding={"rows": rows},
        forward_s_O=roofline.seconds(work.forward_flops_O, work.forward_bytes_O),
        backward_s_O=backward_s_O,
        input_s_O=0.6 * backward_s_O,
        weight_s_O=0.5 * backward_s_O,
        loss_forward_s=loss_s,
        loss_backward_s=loss_s,
        loss_saved_bytes=100.0 * rows,
    )


def profile(*measurements: OperatorMeasurement) -> ModelProfile:
    kind = KindProfile(measurements=measurements, optimizer_s_per_byte=1e-10)
    return ModelProfile(graph=graph(), kinds={DeviceKind.CPU: kind}, optimizer_state_ratio=2.0)


def test_costs_are_what_the_planner_takes() -> None:
    costs = profile(measurement(64)).microbatch_costs({"rows": 64}, [CPU, SLOW])
    taken = MicrobatchCosts(**costs)
    assert {field.name for field in fields(MicrobatchCosts)} == set(costs)
    assert taken.forward_s_DO.shape == (2, 4)
    assert taken.tensor_bytes["h"] == 64 * 2048
    assert taken.saved_bytes_R.tolist() == [64 * 2048]
    assert taken.loss_saved_bytes == pytest.approx(6400)
    # what begins and ends in its backward, beside the saved storage
    assert taken.workspace_bytes_O.tolist() == [0.0, 0.0, 64 * 4096, 0.0]


def test_the_measured_microbatch_is_given_back_and_speed_divides() -> None:
    measured = measurement(64)
    costs = profile(measured).microbatch_costs({"rows": 64}, [CPU, SLOW])
    assert costs["forward_s_DO"][0] == pytest.approx(measured.forward_s_O)
    assert costs["backward_s_DO"][1] == pytest.approx(2 * measured.backward_s_O)
    assert costs["input_s_DO"][1] == pytest.approx(2 * measured.input_s_O)
    assert costs["weight_s_DO"][1] == pytest.approx(2 * measured.weight_s_O)
    assert costs["loss_forward_s_D"] == pytest.approx([measured.loss_forward_s, 2 * measured.loss_forward_s])


@pytest.mark.parametrize("rows", [1, 16, 256, 4096])
def test_other_sizes_follow_the_roofline(rows: int) -> None:
    costs = profile(measurement(64)).microbatch_costs({"rows": rows}, [CPU])
    expected = measurement(rows)
    assert costs["forward_s_DO"][0] == pytest.approx(expected.forward_s_O, rel=0.02)
    assert costs["backward_s_DO"][0] == pytest.approx(expected.backward_s_O, rel=0.02)
    assert costs["weight_s_DO"][0] == pytest.approx(expected.weight_s_O, rel=0.02)
    assert costs["loss_backward_s_D"][0] == pytest.approx(expected.loss_backward_s, rel=0.02)


def test_between_two_measured_sizes_the_deviation_is_interpolated() -> None:
    small, large = measurement(64), measurement(1024)
    slower = replace(large, forward_s_O=1.5 * large.forward_s_O)
    model = profile(small, slower)
    at = {rows: model.microbatch_costs({"rows": rows}, [CPU])["forward_s_DO"][0] for rows in (64, 512, 1024)}
    assert at[64][:3] == pytest.approx(small.forward_s_O[:3])
    assert at[1024][:3] == pytest.approx(slower.forward_s_O[:3])
    assert at[512][3] == pytest.approx(1.25 * TRUTH.dispatch_s)  # the same in both: the mean
    ratio = at[512][0] / measurement(512).forward_s_O[0]
    assert 1.1 < ratio < 1.5


def test_costs_are_remembered() -> None:
    model = profile(measurement(64))
    assert model.seconds({"rows": 3}, DeviceKind.CPU) is model.seconds({"rows": 3}, DeviceKind.CPU)


def test_json_keeps_everything() -> None:
    model = profile(measurement(64), measurement(128))
    again = ModelProfile.from_json(json.loads(json.dumps(model.to_json())), graph())
    before, after = (each.microbatch_costs({"rows": 100}, [CPU]) for each in (model, again))
    assert after["forward_s_DO"] == pytest.approx(before["forward_s_DO"])
    assert after["loss_saved_bytes"] == before["loss_saved_bytes"]
    assert again.optimizer_s_per_byte([CPU, SLOW]) == pytest.approx([1e-10, 2e-10])


def test_a_kind_that_was_not_measured_is_refused() -> None:
    gpu = Device(name="cuda0", kind=DeviceKind.CUDA, memory_bytes=1)
    with pytest.raises(InvalidInput, match="cuda"):
        profile(measurement(64)).microbatch_costs({"rows": 1}, [gpu])


def test_typical_is_the_median_of_the_devices() -> None:
    one = measurement(64)
    outlier = replace(one, forward_s_O=100 * one.forward_s_O, loss_forward_s=100.0)
    middle = typical([one, outlier, one])
    assert middle.forward_s_O == pytest.approx(one.forward_s_O)
    assert middle.loss_forward_s == one.loss_forward_s


def test_modules_are_ranked_and_add_up() -> None:
    model = profile(measurement(64))
    modules = costliest_modules(model, {"rows": 64}, CPU)
    assert {module.path for module in modules} == {"body.up", "body", "body.down", ""}
    assert modules[0].path == "body.down"  # its backward has a gradient more to compute
    assert modules[0].parameter_bytes == 512 * 512 * 4
    assert sum(module.fraction for module in modules) == pytest.approx(1.0)
    assert {module.path for module in costliest_modules(model, {"rows": 64}, CPU, depth=1)} == {"body", ""}


def test_the_bottleneck_is_named() -> None:
    model = profile(measurement(4096))
    found = find_bottleneck(model, {"rows": 4096}, CPU)
    assert found.limit is Limit.COMPUTE
    assert sum(found.fractions.values()) == pytest.approx(1.0)
    slow_memory = replace(CPU, flops_per_s=1e15, memory_bandwidth_bytes_per_s=1e9)
    assert find_bottleneck(model, {"rows": 4096}, slow_memory).limit is Limit.BANDWIDTH
    assert find_bottleneck(model, {"rows": 4096}, CPU, link_s=1e3).limit is Limit.LINK
    short = find_bottleneck(model, {"rows": 4096}, CPU, needed_bytes=CPU.memory_bytes + 5)
    assert short.limit is Limit.CAPACITY
    assert "5 bytes" in short.reason
    assert (
        find_bottleneck(profile(measurement(1)), {"rows": 1}, replace(CPU, flops_per_s=1e18)).limit
        is not Limit.COMPUTE
    )


def test_hardware_that_is_enough_is_preferred_to_hardware_that_is_fastest() -> None:
    work = profile(measurement(64)).work({"rows": 4096})
    easy = suggest_hardware(work, needed_bytes=1e9, step_s=1.0, target_s=1.0)
    assert easy.chosen is not None
    assert easy.chosen.hardware is HARDWARE[0]
    big = suggest_hardware(work, needed_bytes=50e9, step_s=1.0, target_s=1e-9)
    assert big.chosen is not None
    assert big.chosen.step_s == min(candidate.step_s for candidate in big.candidates if candidate.fits)
    assert big.chosen.hardware.memory_bytes > 50e9
    none = suggest_hardware(work, needed_bytes=1e14, step_s=1.0)
    assert none.chosen is None
    assert "split it over 19" in none.reason
