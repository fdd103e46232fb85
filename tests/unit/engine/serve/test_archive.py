"""Archives are read without running what they hold."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import ForescaleError, InvalidInput, UntrustedModel
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.serve.formats import Order, pt2
from forescale.engine.serve.formats.archive import Rows, checked_program, signature

CPU = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=0)
Fields = dict[str, Any]


def rewritten(path: Path, to: Path, change: Callable[[str, bytes], bytes]) -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, change(entry.partition("/")[2], old.read(entry)))
    return to


def program_of(path: Path) -> Fields:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("model/models/model.json"))


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_signature_of_a_dynamic_program(dynamic_pt2: Path) -> None:
    found, rows = signature(program_of(dynamic_pt2), None)
    assert found == Signature(
        inputs=(
            TensorSpec(name="ids", datatype="INT64", shape=(None, None)),
            TensorSpec(name="mask", datatype="FP32", shape=(None, None)),
        ),
        outputs=(
            TensorSpec(name="logits", datatype="FP32", shape=(None, 3)),
            TensorSpec(name="length", datatype="FP32", shape=(None,)),
        ),
    )
    assert rows == Rows(least=1, most=64)
    assert pt2.inspect(Order(path=dynamic_pt2)) == found


def test_fixed_rows_and_names_of_the_archives_own(fixed_pt2: Path) -> None:
    assert pt2.inspect(Order(path=fixed_pt2)) == Signature(
        inputs=(TensorSpec(name="point", datatype="FP32", shape=(None, 2)),),
        outputs=(TensorSpec(name="image", datatype="FP32", shape=(None, 2)),),
    )
    assert signature(program_of(fixed_pt2), None)[1] == Rows(least=4, most=4)


def test_names_must_be_as_many_as_tensors(fixed_pt2: Path) -> None:
    with pytest.raises(InvalidInput, match="names 2 inputs and 1 outputs"):
        signature(program_of(fixed_pt2), {"inputs": ["a", "b"], "outputs": ["c"]})


def test_the_checked_program_computes_what_the_model_does(
    dynamic_pt2: Path, two_heads: torch.nn.Module
) -> None:
    loaded = pt2.load(Order(path=dynamic_pt2), CPU)
    ids, mask = torch.arange(8).reshape(2, 4), torch.ones(2, 4)
    outputs = loaded.run({"ids": ids.numpy(), "mask": mask.numpy()}).wait().outputs
    with torch.no_grad():
        expected = two_heads(ids, mask)
    np.testing.assert_allclose(outputs["logits"], expected["logits"].numpy(), rtol=1e-6)
    np.testing.assert_array_equal(outputs["length"], [4.0, 4.0])


def test_lengths_are_checked_though_others_fitted_before(dynamic_pt2: Path) -> None:
    loaded = pt2.load(Order(path=dynamic_pt2), CPU)
    ids = np.arange(8).reshape(2, 4)
    for _ in range(2):
        outputs = loaded.run({"ids": ids, "mask": np.ones((2, 4), np.float32)}).wait().outputs
        assert outputs["length"].tolist() == [4.0, 4.0]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="to be equal to 4, but got 1"):
            loaded.run({"ids": ids, "mask": np.ones((2, 1), np.float32)})
    outputs = loaded.run({"ids": ids[:1], "mask": np.ones((1, 4), np.float32)}).wait().outputs
    assert outputs["length"].tolist() == [4.0]


def test_outputs_are_not_the_state_that_the_next_batch_changes(tmp_path: Path) -> None:
    class Sum(torch.nn.Module):
        total: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(1, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.add_(x)
            return self.total[:, :1]

    program = torch.export.export(Sum(), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "sum.pt2")
    loaded = pt2.load(Order(path=tmp_path / "sum.pt2"), CPU)
    first, second = (loaded.run({"x": np.ones((1, 2), np.float32)}).wait().outputs for _ in range(2))
    assert (first["output"].tolist(), second["output"].tolist()) == ([[1.0]], [[2.0]])


def test_no_pickle_in_the_archive_is_read(dynamic_pt2: Path, tmp_path: Path) -> None:
    """``sample_inputs`` is the pickle that every archive has; torch.export.load falls for this one."""
    marker = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(Bomb(marker), buffer)
    path = rewritten(
        dynamic_pt2,
        tmp_path / "model.pt2",
        lambda entry, old: buffer.getvalue() if entry == "data/sample_inputs/model.pt" else old,
    )
    pt2.load(Order(path=path), CPU)
    assert not marker.exists()
    with pytest.raises(Exception, match=r"expected tuple or dict|not enough arguments"):
        torch.export.load(path)
    assert marker.exists(), "the bomb is live: it would have been noticed"


@pytest.mark.parametrize("kind", ["weights", "constants"])
def test_pickled_weights_are_refused(dynamic_pt2: Path, tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "ran"

    def change(entry: str, old: bytes) -> bytes:
        if entry == f"data/{kind}/model_{kind}_config.json":
            return old.replace(b'"use_pickle": false', b'"use_pickle": true')
        return pickle.dumps(Bomb(marker)) if entry.startswith(f"data/{kind}/") else old

    path = rewritten(dynamic_pt2, tmp_path / "model.pt2", change)
    with pytest.raises(UntrustedModel, match="pickled"):
        pt2.load(Order(path=path), CPU)
    assert not marker.exists()


def test_custom_objects_are_refused(dynamic_pt2: Path, tmp_path: Path) -> None:
    path = rewritten(
        dynamic_pt2,
        tmp_path / "model.pt2",
        lambda entry, old: (
            old.replace(b'"tensor_0"', b'"opaque_obj_0"') if "constants_config" in entry else old
        ),
    )
    with pytest.raises(UntrustedModel, match="pickled"):
        pt2.load(Order(path=path), CPU)


def first_node(program: Fields) -> Fields:
    return program["graph_module"]["graph"]["nodes"][0]


def call_anything(program: Fields) -> None:
    first_node(program)["target"] = "torch.os.system"


def read_a_file(program: Fields) -> None:
    first_node(program)["target"] = "torch.ops.aten.from_file.default"


def reach_for_internals(program: Fields) -> None:
    first_node(program)["target"] = "torch.ops.aten.__init__.__globals__.clear"


def run_in_a_size(program: Fields) -> None:
    size = program["graph_module"]["graph"]["tensor_values"]["ids"]["sizes"][0]
    size["as_expr"]["expr_str"] = "__import__('os').system('true')"


def run_an_attribute_in_a_size(program: Fields) -> None:
    size = program["graph_module"]["graph"]["tensor_values"]["ids"]["sizes"][0]
    size["as_expr"]["expr_str"] = "Symbol('s0').func"


def inject_source(program: Fields) -> None:
    program["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"] = "x=print(1)"


def inject_a_weights_name(program: Fields) -> None:
    spec = program["graph_module"]["signature"]["input_specs"][0]["parameter"]
    spec["parameter_name"] = 'a", print(1)) #'


def import_a_class(program: Fields) -> None:
    call = program["graph_module"]["module_call_graph"][0]["signature"]
    call["out_spec"] = call["out_spec"].replace("builtins.dict", "collections.defaultdict")


@pytest.mark.parametrize(
    "spoil",
    [
        call_anything,
        read_a_file,
        reach_for_internals,
        run_in_a_size,
        run_an_attribute_in_a_size,
        inject_source,
        inject_a_weights_name,
        import_a_class,
    ],
)
def test_what_only_code_needs_is_refused(dynamic_pt2: Path, spoil: Callable[[Fields], None]) -> None:
    program = program_of(dynamic_pt2)
    checked_program(program)
    spoil(program)
    with pytest.raises(UntrustedModel, match="--trust"):
        checked_program(program)


def test_guards_are_dropped(dynamic_pt2: Path) -> None:
    program = program_of(dynamic_pt2)
    assert program["guards_code"]
    assert checked_program(program)["guards_code"] == []


def test_trust_loads_with_torch_itself(dynamic_pt2: Path) -> None:
    loaded = pt2.load(Order(path=dynamic_pt2, trust=True), CPU)
    outputs = (
        loaded.run({"ids": np.zeros((1, 2), np.int64), "mask": np.ones((1, 2), np.float32)}).wait().outputs
    )
    assert outputs["logits"].shape == (1, 3)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "other_zip", "no_program", "list"])
def test_what_is_no_archive_is_one_line(dynamic_pt2: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.pt2"
    whole = dynamic_pt2.read_bytes()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("hello")
        case "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        case "other_zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("x/y", "z")
        case "no_program":
            rewritten(dynamic_pt2, path, lambda entry, old: b"{}" if entry.startswith("models/") else old)
        case _:
            rewritten(dynamic_pt2, path, lambda entry, old: b"[]" if entry.startswith("models/") else old)
    for read in (lambda: pt2.inspect(Order(path=path)), lambda: pt2.load(Order(path=path), CPU)):
        with pytest.raises(ForescaleError, match=r"is no archive that torch\.export\.save") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_another_signature_than_registered_is_refused(fixed_pt2: Path) -> None:
    declared = Signature(
        inputs=(TensorSpec(name="point", datatype="INT64", shape=(None, 2)),),
        outputs=(TensorSpec(name="image", datatype="FP32", shape=(None, 2)),),
    )
    with pytest.raises(InvalidInput, match=r"registered with inputs \['INT64'\], but has \['FP32'\]"):
        pt2.load(Order(path=fixed_pt2, signature=declared), CPU)
