"""Every format runs what it loads, and refuses what does not belong to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import InvalidInput, UntrustedModel
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.serve.arrays import Array
from forescale.engine.serve.formats import FORMATS, Order, factory, format_named, format_of, safetensors

CPU = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=0, cores=(0,))
POINTS = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(None, 2)),),
    outputs=(TensorSpec(name="y", datatype="FP32", shape=(None, 2)),),
)
TEXT = Signature(
    inputs=(TensorSpec(name="input_ids", datatype="INT64", shape=(None, None)),),
    outputs=(TensorSpec(name="logits", datatype="FP32", shape=(None, 3)),),
)
BERT: dict[str, Any] = {
    "architecture": "BertForSequenceClassification",
    "config": {
        "model_type": "bert",
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "num_labels": 3,
    },
}


def test_formats_are_found_by_name_and_by_ending() -> None:
    assert all(callable(format_named(name).load) and callable(format_named(name).inspect) for name in FORMATS)
    assert [format_of(Path(f"m{ending}")) for ending in (".pt2", ".onnx", ".safetensors")] == [
        "pt2",
        "onnx",
        "safetensors",
    ]


def test_unknown_formats_are_named() -> None:
    with pytest.raises(InvalidInput, match="'pickle' is no model format; there are pt2"):
        format_named("pickle")
    with pytest.raises(InvalidInput, match=r"m\.bin ends in none of"):
        format_of(Path("m.bin"))


# --- factory ---------------------------------------------------------------------------------------


def scaled(path: Path, device: str, *, by: float = 1.0) -> Any:
    assert device == "cpu"
    reused = np.zeros((1, 2), np.float32)

    def run(inputs: dict[str, Array]) -> dict[str, Array]:
        np.multiply(inputs["x"], by, out=reused)
        return {"y": reused}

    return run


NAME = f"{__name__}:scaled"


def made(**fields: Any) -> Order:
    order: dict[str, Any] = {
        "path": Path("unused"),
        "signature": POINTS,
        "options": {"factory": NAME},
        "factories": (NAME,),
    }
    return Order(**{**order, **fields})


def test_a_factorys_arrays_are_its_own() -> None:
    model = factory.load(made(options={"factory": NAME, "arguments": {"by": 2.0}}), CPU)
    first = model.run({"x": np.ones((1, 2), np.float32)}).wait().outputs
    model.run({"x": np.zeros((1, 2), np.float32)})
    assert first["y"].tolist() == [[2.0, 2.0]]


def test_a_factory_must_be_allowed_named_and_there() -> None:
    with pytest.raises(UntrustedModel, match="not among those"):
        factory.load(made(factories=()), CPU)
    with pytest.raises(InvalidInput, match="of the form"):
        factory.inspect(made(options={"factory": "os.system"}))
    with pytest.raises(InvalidInput, match="there is no factory"):
        factory.load(made(options={"factory": "os:nothing"}, factories=("os:nothing",)), CPU)
    with pytest.raises(InvalidInput, match="add it with a signature"):
        factory.inspect(made(signature=None))


# --- safetensors -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**BERT["config"])
    model = transformers.BertForSequenceClassification(config).eval()
    path = tmp_path_factory.mktemp("bert") / "model.safetensors"
    save_file(model.state_dict(), path)
    return path, model


def test_a_transformer_from_its_weights_alone(bert: tuple[Path, torch.nn.Module]) -> None:
    path, model = bert
    ids = np.arange(6).reshape(2, 3)
    loaded = safetensors.load(Order(path=path, options=BERT, signature=TEXT), CPU)
    outputs = loaded.run({"input_ids": ids}).wait().outputs
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-5)


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = {
        "model_type": "gpt2",
        "vocab_size": 12,
        "n_positions": 4,
        "n_embd": 4,
        "n_layer": 1,
        "n_head": 1,
    }
    model = transformers.GPT2LMHeadModel(transformers.AutoConfig.for_model(**config)).eval()
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, tmp_path / "m.safetensors")
    text = Signature(
        inputs=TEXT.inputs, outputs=(TensorSpec(name="logits", datatype="FP32", shape=(None, None, 12)),)
    )
    order = Order(
        path=tmp_path / "m.safetensors",
        options={"architecture": "GPT2LMHeadModel", "config": config},
        signature=text,
    )
    ids = np.array([[1, 2]])
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    outputs = safetensors.load(order, CPU).run({"input_ids": ids}).wait().outputs
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "need the options architecture"),
        ({**BERT, "architecture": "AutoConfig"}, "'AutoConfig' is no model of transformers"),
        ({**BERT, "config": {**BERT["config"], "num_labels": 4}}, "size mismatch for classifier"),
        ({**BERT, "config": {**BERT["config"], "num_hidden_layers": 2}}, "16 are missing"),
        ({**BERT, "config": {**BERT["config"], "num_hidden_layers": 0}}, "16 are unknown"),
    ],
)
def test_weights_that_do_not_fit(bert: tuple[Path, torch.nn.Module], options: dict, error: str) -> None:
    with pytest.raises(InvalidInput, match=error):
        safetensors.load(Order(path=bert[0], options=options, signature=TEXT), CPU)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "auto_map"])
def test_configs_that_would_fetch_code_are_refused(key: str) -> None:
    options = {**BERT, "config": {**BERT["config"], "text_config": {key: "someone/kernels"}}}
    with pytest.raises(UntrustedModel, match=key):
        safetensors.inspect(Order(path=Path("unused"), options=options, signature=TEXT))


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "m.safetensors").write_bytes(b"hello")
    with pytest.raises(InvalidInput, match="is no safetensors file"):
        safetensors.load(Order(path=tmp_path / "m.safetensors", options=BERT, signature=TEXT), CPU)


IMAGES = Signature(
    inputs=(TensorSpec(name="image", datatype="FP32", shape=(None, 3, 32, 32)),),
    outputs=(TensorSpec(name="logits", datatype="FP32", shape=(None, 5)),),
)


def test_a_model_of_timm_from_its_weights_alone(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5).eval()
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    options = {"architecture": "timm/resnet10t", "config": {"num_classes": 5}}
    order = Order(path=tmp_path / "m.safetensors", options=options, signature=IMAGES)
    images = np.random.default_rng(0).random((2, 3, 32, 32), np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    outputs = safetensors.load(order, CPU).run({"image": images}).wait().outputs
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("key", ["pretrained", "pretrained_cfg_overlay", "checkpoint_path"])
def test_models_of_timm_that_would_fetch_weights_are_refused(key: str) -> None:
    options = {"architecture": "timm/resnet10t", "config": {key: "elsewhere"}}
    with pytest.raises(UntrustedModel, match=key):
        safetensors.inspect(Order(path=Path("unused"), options=options, signature=IMAGES))


def test_a_model_of_timm_has_one_input() -> None:
    two = Signature(inputs=(*IMAGES.inputs, *POINTS.inputs), outputs=IMAGES.outputs)
    order = Order(path=Path("unused"), options={"architecture": "timm/resnet10t"}, signature=two)
    with pytest.raises(InvalidInput, match="has one input and one output"):
        safetensors.inspect(order)


# --- ONNX ------------------------------------------------------------------------------------------


def matmul(path: Path, rows: int | str) -> Path:
    """``y = x @ [[1, 2], [3, 4]]``."""
    onnx = pytest.importorskip("onnx")
    number = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "points",
        [onnx.helper.make_tensor_value_info("x", number, [rows, 2])],
        [onnx.helper.make_tensor_value_info("y", number, [rows, 2])],
        [onnx.helper.make_tensor("w", number, [2, 2], [1.0, 2.0, 3.0, 4.0])],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


@pytest.mark.parametrize(("rows", "limits"), [("rows", (1, None)), (3, (3, 3))])
def test_an_onnx_model(tmp_path: Path, rows: int | str, limits: tuple[int, int | None]) -> None:
    pytest.importorskip("onnxruntime")
    order = Order(path=matmul(tmp_path / "m.onnx", rows))
    onnx = format_named("onnx")
    assert onnx.inspect(order) == POINTS
    model = onnx.load(order, CPU)
    assert (model.signature, model.least_rows, model.most_rows) == (POINTS, *limits)
    assert onnx.load(replace(order, threads=2), CPU).threads == 2
    assert model.run({"x": np.ones((3, 2), np.float32)}).wait().outputs["y"].tolist() == [[4.0, 6.0]] * 3


def test_onnx_models_that_are_something_else(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "m.onnx").write_bytes(b"hello")
    with pytest.raises(InvalidInput, match="is no ONNX model"):
        format_named("onnx").inspect(Order(path=tmp_path / "m.onnx"))
    other = Signature(inputs=TEXT.inputs, outputs=POINTS.outputs)
    with pytest.raises(InvalidInput, match="registered with inputs"):
        format_named("onnx").load(Order(path=matmul(tmp_path / "n.onnx", "rows"), signature=other), CPU)
