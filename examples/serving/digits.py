"""Trains a classifier of handwritten digits in seconds, and exports it for serving.

pip install scikit-learn
python examples/serving/digits.py digits.pt2

The digits are those that scikit-learn brings along: 1,797 images of 8 x 8 pixels with values from 0 to 16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

EPOCHS, ROWS = 30, 64
TEST_FRACTION = 0.2
MOST_ROWS = 256  # of a batch when serving


class DigitClassifier(nn.Module):
    """Pixels (rows x 64, 0 to 16) to the likeliest digit (rows) and the probability of each (rows x 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def logits(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels / 16)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        logits = self.logits(pixels)
        return {"digit": logits.argmax(1), "probabilities": logits.softmax(1)}


def digits() -> tuple[Tensor, Tensor]:
    """Images as rows of pixels, and what they show."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - only this example needs it
    except ImportError as error:
        raise SystemExit("this example needs scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)


def train(pixels: Tensor, labels: Tensor, *, epochs: int = EPOCHS) -> DigitClassifier:
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).split(ROWS):
            loss = functional.cross_entropy(model.logits(pixels[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def export(model: DigitClassifier, path: Path) -> None:
    """Write the model as ``torch.export`` archive, for batches of any size up to ``MOST_ROWS``.

    Input and outputs keep the names they have in ``forward``; ``signature.json`` could give them others.
    """
    rows = torch.export.Dim("rows", min=1, max=MOST_ROWS)
    program = torch.export.export(model, (torch.zeros(2, 64),), dynamic_shapes=({0: rows},))
    names = {"inputs": ["pixels"], "outputs": ["digit", "probabilities"]}
    torch.export.save(program, path, extra_files={"signature.json": json.dumps(names)})


def main(path: Path) -> None:
    torch.manual_seed(0)
    pixels, labels = digits()
    order = torch.randperm(len(pixels))
    test, rest = order.split(
        [round(TEST_FRACTION * len(order)), len(order) - round(TEST_FRACTION * len(order))]
    )
    model = train(pixels[rest], labels[rest])
    with torch.inference_mode():
        accuracy = (model(pixels[test])["digit"] == labels[test]).float().mean().item()
    export(model, path)
    request = {
        "inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 64], "data": pixels[test[0]].tolist()}]
    }
    path.with_suffix(".json").write_text(json.dumps(request))
    print(f"{path}: accuracy {accuracy:.3f} on {len(test)} digits it has not seen")
    print(f"{path.with_suffix('.json')}: a request whose answer should be {labels[test[0]]}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "digits.pt2"))
