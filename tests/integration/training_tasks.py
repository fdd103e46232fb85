"""Tasks whose training is compared with the plain loop. Workers import this module for the losses."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from forescale.engine.train.task import TrainingTask
from models import GPT, Mixture, Moody, ResNet, RunningMean, TwoHeads, UNet

VOCABULARY = 64


def random(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights in every run, whatever ran before."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return make().to(dtype)


def texts(steps: int, rows: int = 8, length: int = 12, *, vary: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Token ids, most of which follow from the one before, and their successors.

    Args:
        vary: every batch has another length and number of rows.
    """
    found: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        shape = (rows - step % 3, length + 3 * (step % 4) + 1) if vary else (rows, length + 1)
        ids = torch.randint(0, VOCABULARY, shape, generator=random(step))
        odd = torch.rand(shape, generator=random(step)) < 0.1
        for place in range(1, shape[1]):
            follows = (5 * ids[:, place - 1] + 3) % VOCABULARY
            ids[:, place] = torch.where(odd[:, place], ids[:, place], follows)
        found.append((ids[:, :-1], ids[:, 1:]))
    return found


def images(
    steps: int, classes: int = 10, *, pixels: bool = False, dtype: torch.dtype = torch.float32
) -> list[Any]:
    """Nine images a batch; the target is a class per image, or per pixel."""
    shape = (9, 16, 16) if pixels else (9,)
    return [
        (
            torch.randn(9, 3, 16, 16, generator=random(step), dtype=dtype),
            torch.randint(0, classes, shape, generator=random(step)),
        )
        for step in range(steps)
    ]


def vectors(steps: int, width: int = 8, rows: int = 10, dtype: torch.dtype = torch.float64) -> list[Any]:
    return [
        (
            torch.randn(rows, width, generator=random(step), dtype=dtype),
            torch.randint(0, 4, (rows,), generator=random(step)),
        )
        for step in range(steps)
    ]


def token_loss(output: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), batch[1].flatten())


def squared_loss(output: Any, batch: Any) -> Tensor:
    return functional.mse_loss(output, batch[1])


def class_loss(output: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(output, batch[1])


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def momentum(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)


def gpt(
    dtype: torch.dtype = torch.float32, *, steps: int = 6, vary: bool = False, **changes: Any
) -> TrainingTask:
    """A GPT; keywords that are the model's go to it, all others to the task."""
    of_model = {k: changes.pop(k) for k in ("dropout", "tied") if k in changes}
    wanted: dict[str, Any] = {
        "loss": token_loss,
        "optimizer": adamw,
        "batches": texts(steps, vary=vary),
        **changes,
    }
    return TrainingTask(model=seeded(lambda: GPT(**of_model), dtype), **wanted)


def hugging_face_loss(output: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten())


def hugging_face_gpt(dtype: torch.dtype = torch.float32) -> TrainingTask:
    """GPT-2 as published, tiny; takes dicts with a mask and returns a dataclass. Its embeddings are tied."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 - slow to import, and workers need it not

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        for ids, labels in texts(6)
    ]
    return TrainingTask(
        model=seeded(lambda: GPT2LMHeadModel(config), dtype),
        loss=hugging_face_loss,
        optimizer=adamw,
        batches=batches,
        inputs=["input_ids", "attention_mask"],
    )


def resnet(dtype: torch.dtype = torch.float32) -> TrainingTask:
    return TrainingTask(
        model=seeded(ResNet, dtype), loss=class_loss, optimizer=momentum, batches=images(6, dtype=dtype)
    )


def unet(dtype: torch.dtype = torch.float32) -> TrainingTask:
    return TrainingTask(
        model=seeded(UNet, dtype),
        loss=class_loss,
        optimizer=adamw,
        batches=images(6, 2, pixels=True, dtype=dtype),
    )


def two_heads_loss(output: Any, batch: Any) -> Tensor:
    early, late = output["heads"]
    assert output["name"] == "two heads"
    return functional.cross_entropy(late, batch[1]) + 0.3 * functional.cross_entropy(early, batch[1])


def two_heads() -> TrainingTask:
    """Outputs of two stages in the loss, and one that the loss leaves out: its layer must not even decay."""
    model = seeded(TwoHeads, torch.float64)
    return TrainingTask(
        model=model,
        loss=two_heads_loss,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
        batches=vectors(6),
    )


def vector_model(*extra: nn.Module) -> nn.Sequential:
    layers = [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), *extra, nn.Tanh(), nn.Linear(8, 8), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 4))


def running_mean() -> TrainingTask:
    return TrainingTask(
        model=seeded(lambda: vector_model(RunningMean(8)), torch.float64),
        loss=class_loss,
        optimizer=adamw,
        batches=vectors(6),
    )


def mixture() -> TrainingTask:
    return TrainingTask(
        model=seeded(lambda: vector_model(Mixture(), Mixture()), torch.float64),
        loss=class_loss,
        optimizer=adamw,
        batches=vectors(6),
    )


def untraceable() -> TrainingTask:
    """Falls back to whole modules."""
    return TrainingTask(
        model=seeded(lambda: vector_model(Moody(), Moody(), Moody()), torch.float64),
        loss=class_loss,
        optimizer=adamw,
        batches=vectors(6),
    )


def frozen() -> TrainingTask:
    """A frozen layer in the middle, and one that nobody calls (which an optimizer never touches)."""

    class WithSpare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.spare = vector_model(), nn.Linear(3, 3)
            self.body[2].requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    return TrainingTask(
        model=seeded(WithSpare, torch.float64),
        loss=class_loss,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        batches=vectors(6),
    )


def grouped(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """No decay for vectors, another rate for the first matrix; one parameter is left out."""
    found = list(parameters)
    matrices = [p for p in found if p.dim() > 1]
    groups = [
        {"params": matrices[:1], "lr": 3e-3},
        {"params": matrices[1:], "weight_decay": 0.3},
        {"params": [p for p in found if p.dim() == 1][:-1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3)


def adafactor(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Its state has other shapes than the parameters."""
    return torch.optim.Adafactor(parameters, lr=1e-2)


def halving(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


def steady(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda _: 1.0)


PADDING = 0


def unpadded_tokens(batch: Any) -> float:
    return float((batch[1] != PADDING).sum())


def padded_loss(output: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), batch[1].flatten(), ignore_index=PADDING)


def padded_texts(steps: int) -> list[tuple[Tensor, Tensor]]:
    found = texts(steps, rows=9)
    for step, (_, targets) in enumerate(found):
        for row in range(len(targets)):
            targets[row, 3 + (7 * row + step) % 9 :] = PADDING
    return found


class Reconstruction(nn.Module):
    """Takes one tensor; a part of its forward gives no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 8)
        self.gate = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.enter(x))
        with torch.no_grad():
            gate = torch.sigmoid(self.gate(hidden))
        return self.leave(hidden * gate + 0.1 * torch.sigmoid(self.gate(hidden.detach())))


def reconstruction_loss(output: Tensor, batch: Tensor) -> Tensor:
    return functional.mse_loss(output, batch)


def reconstruction() -> TrainingTask:
    return TrainingTask(
        model=seeded(Reconstruction, torch.float64),
        loss=reconstruction_loss,
        optimizer=adamw,
        batches=[x for x, _ in vectors(6)],
    )


def chosen_inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"ids": batch["text"]["ids"]}


def nested_loss(output: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), batch["text"]["next"].flatten()) * batch["scale"]


def nested() -> TrainingTask:
    """A nested batch with a number in it; a callable picks what the model takes."""
    batches = [{"text": {"ids": ids, "next": labels}, "scale": 0.5} for ids, labels in texts(6)]
    return gpt(torch.float64, batches=batches, inputs=chosen_inputs, loss=nested_loss)


def with_optimizer_instance() -> TrainingTask:
    model = seeded(vector_model, torch.float64)
    return TrainingTask(
        model=model,
        loss=class_loss,
        optimizer=torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9),
        batches=vectors(6),
    )


def with_the_model_in_the_loss() -> TrainingTask:
    model = seeded(vector_model, torch.float64)
    first = model.get_parameter("0.weight")
    return TrainingTask(
        model=model,
        loss=lambda output, batch: class_loss(output, batch) + first.square().sum(),
        optimizer=adamw,
        batches=vectors(6),
    )


class Crossing(nn.Module):
    """Masks, indices, a number and complex numbers are made early and read late."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        positive, order, mean, empty = x > 0, x.argsort(-1), x.mean(), x[:0]
        spectrum = torch.fft.rfft(self.first(x))
        y = self.second(torch.tanh(self.second(torch.fft.irfft(spectrum, n=8))))
        y = torch.where(positive, y, 0.0) * mean + y.gather(1, order) + empty.sum()
        return self.last(torch.fft.irfft(spectrum * torch.fft.rfft(y), n=8))


def crossing() -> TrainingTask:
    return TrainingTask(
        model=seeded(Crossing, torch.float64), loss=class_loss, optimizer=adamw, batches=vectors(6)
    )


class ShapeNumbers(nn.Module):
    """Divides by fractions and roots of sizes that change from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = vector_model()

    def forward(self, x: Tensor) -> Tensor:
        rows, length = x.shape[:2]
        return self.body(x.sum(1) / length**0.5) * (1 / length) + torch.full((4,), length / rows).sin()


def shape_numbers() -> TrainingTask:
    batches = [
        (
            torch.randn(9, 3 + step, 8, generator=random(step), dtype=torch.float64),
            torch.randint(0, 4, (9,), generator=random(step)),
        )
        for step in range(6)
    ]
    model = seeded(ShapeNumbers, torch.float64)
    return TrainingTask(model=model, loss=class_loss, optimizer=adamw, batches=batches)


class Checkpointed(nn.Module):
    """Reentrant checkpoints; nothing that enters the second carries a gradient, so its layer gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.left, self.right, self.leave = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        left = checkpoint(self.left, torch.tanh(self.enter(x)), use_reentrant=True)
        return self.leave(torch.tanh(left) + checkpoint(self.right, x, use_reentrant=True))


def checkpointed() -> TrainingTask:
    return TrainingTask(
        model=seeded(Checkpointed, torch.float64), loss=class_loss, optimizer=adamw, batches=vectors(6)
    )


@dataclass(frozen=True)
class Labelled:
    """A batch as a dataclass, with a mapping of arrays and a list of labels."""

    x: Tensor
    more: Mapping[str, Any]
    labels: list[int]


def labelled_loss(output: Tensor, batch: Labelled) -> Tensor:
    by_label = functional.cross_entropy(output, torch.tensor(batch.labels))
    return by_label + functional.cross_entropy(output, torch.from_numpy(batch.more["array"]))


def of_labelled(batch: Labelled) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (batch.x,), {}


def labelled() -> TrainingTask:
    batches = [Labelled(x, UserDict(array=y.numpy()), y.flip(0).tolist()) for x, y in vectors(6)]
    return TrainingTask(
        model=seeded(vector_model, torch.float64),
        loss=labelled_loss,
        optimizer=adamw,
        batches=batches,
        inputs=of_labelled,
    )


class Recurrent(nn.Module):
    """A two-way LSTM; its captured form is for sequences of one length."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.body = nn.Sequential(nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.lstm(x)[0].mean(1))


def recurrent() -> TrainingTask:
    batches = [(x[:, :3], y) for x, y in shape_numbers().batches]
    return replace(shape_numbers(), model=seeded(Recurrent, torch.float64), batches=batches)
