"""The example of examples/serving, on made-up digits: scikit-learn is nothing the tests need."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from forescale.core.cluster import Device, DeviceKind
from forescale.core.signature import Signature, TensorSpec
from forescale.engine.serve.formats import Order, pt2

EXAMPLE = Path(__file__).parents[2] / "examples" / "serving" / "digits.py"
CPU = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=0)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_example", EXAMPLE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_exported_classifier_answers_as_the_trained_one(example: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    labels = torch.arange(80) % 10
    pixels = 16 * torch.nn.functional.one_hot(labels, 64).float() + torch.rand(80, 64)
    model = example.train(pixels, labels, epochs=20)
    path = tmp_path / "digits.pt2"
    example.export(model, path)

    assert pt2.inspect(Order(path=path)) == Signature(
        inputs=(TensorSpec(name="pixels", datatype="FP32", shape=(None, 64)),),
        outputs=(
            TensorSpec(name="digit", datatype="INT64", shape=(None,)),
            TensorSpec(name="probabilities", datatype="FP32", shape=(None, 10)),
        ),
    )
    served = pt2.load(Order(path=path), CPU)
    assert (served.least_rows, served.most_rows) == (1, example.MOST_ROWS)
    answer = served.run({"pixels": pixels.numpy()}).wait().outputs
    assert answer["digit"].tolist() == labels.tolist()
    with torch.inference_mode():
        expected = model(pixels)["probabilities"].numpy()
    np.testing.assert_allclose(answer["probabilities"], expected, rtol=1e-5)


def test_without_scikit_learn_it_says_what_to_install(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)  # what "not installed" looks like to import
    with pytest.raises(SystemExit, match="pip install scikit-learn"):
        example.digits()
