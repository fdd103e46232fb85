"""Losses of pipelined training against the plain loop with the same microbatches, over 30 steps of AdamW.

The plain loop is PyTorch as everybody writes it: microbatches one after the other, gradients accumulated.
With dropout, where it draws other random numbers, the run on one device takes its place.

    python benchmarks/bench_losses.py [--out FILE.md]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from table import environment, write_table
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the plain loop and the models are those of the tests

import transformers  # noqa: E402

import forescale as fs  # noqa: E402
from forescale.plan.partition_plan import Schedule  # noqa: E402
from integration import training_tasks as tasks  # noqa: E402
from integration.training import Cuts, Trained, Workers, loss_difference, plain, state_difference  # noqa: E402
from models import GPT, Mixture, ResNet, UNet  # noqa: E402

STEPS, MICROBATCHES, SEED = 30, 4, 0
UNTIED, TIED = 1e-6, 1e-5
TWO, THREE = Cuts(at=(0.5,)), Cuts(at=(0.3, 0.7))
SCATTERED = replace(THREE, scatter=1)
REPARTITIONED = {
    0: TWO,
    8: Cuts(at=(0.2,)),
    15: replace(THREE, scatter=2),
    22: Cuts(at=(0.7,), devices=(2, 1)),
}
RECOMPUTED = replace(THREE, recompute=True, schedule=Schedule.GPIPE)

Make = Callable[[], fs.TrainingTask]


def task(make: Callable[[], nn.Module], loss: Any, batches: list[Any], **more: Any) -> Make:
    return lambda: fs.TrainingTask(
        model=tasks.seeded(make), loss=loss, optimizer=tasks.adamw, batches=batches, seed=SEED, **more
    )


def gpt(batches: list[Any] | None = None, autocast: torch.dtype | None = None, **changes: Any) -> Make:
    batches = batches or tasks.texts(STEPS, rows=8, length=32)
    make = lambda: GPT(width=64, blocks=4, **changes)  # noqa: E731
    return task(make, tasks.token_loss, batches, autocast=autocast)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tasks.VOCABULARY, 48)
        self.layers = nn.ModuleList(nn.LSTM(48, 48, batch_first=True) for _ in range(3))
        self.head = nn.Linear(48, tasks.VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.head(x)


class Translator(nn.Module):
    """``nn.Transformer`` with the usual masks."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(tasks.VOCABULARY, 48), nn.Embedding(tasks.VOCABULARY, 48)
        self.body = nn.Transformer(48, 4, 2, 2, 96, 0.0, batch_first=True)
        self.head = nn.Linear(48, tasks.VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.body(self.source(ids), self.target(ids), tgt_mask=mask))


def experts() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), Mixture(16, 6), Mixture(16, 6), nn.LayerNorm(16), nn.Linear(16, 4)
    )


def hugging_face(
    model: Callable[[], nn.Module], loss: Any, inputs: Callable[[Tensor], dict[str, Tensor]]
) -> Make:
    texts = tasks.texts(STEPS, rows=8, length=24)
    batches = [{**inputs(ids), "labels": labels} for ids, labels in texts]
    return task(model, loss, batches, inputs=tuple(inputs(texts[0][0])))


def only_ids(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids}


def with_mask(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < 20).expand_as(ids).long()}


def with_decoder(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "decoder_input_ids": ids.roll(1, 1)[:, :24]}


def logits_loss(output: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten())


def picture_loss(output: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(output.logits, batch[1])


SIZES: Mapping[str, Any] = {
    "vocab_size": tasks.VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BODY: Mapping[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
}  # fmt: skip


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_positions=64,
        n_embd=48,
        n_layer=3,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **SIZES,
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **BODY, **SIZES))


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **BODY, **SIZES)
    return transformers.MixtralForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64, **BODY, **SIZES
    )
    return transformers.BertForMaskedLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=48,
        d_kv=12,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        **SIZES,
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        image_size=16, patch_size=4, id2label=dict(enumerate("0123456789")), **BODY
    )
    return transformers.ViTForImageClassification(config)


pictures, pixels = tasks.images(STEPS), tasks.images(STEPS, 2, pixels=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A task, how it is cut, and what is allowed."""

    make: Make
    cuts: Mapping[str, Cuts | Mapping[int, Cuts]]
    allowed: float = UNTIED
    against_one_device: bool = False


BOTH = {"2 stages": TWO, "3 stages": THREE}
ALL = {**BOTH, "3 stages, scattered": SCATTERED, "3 repartitions": REPARTITIONED}
CASES: Mapping[str, Case] = {
    "GPT": Case(make=gpt(), cuts={"1 device": Cuts(at=()), **ALL, "3 stages, recomputed": RECOMPUTED}),
    "GPT, tied embeddings": Case(make=gpt(tied=True), cuts=ALL, allowed=TIED),
    "GPT-2 of transformers (tied)": Case(
        make=hugging_face(gpt2, logits_loss, with_mask), cuts=ALL, allowed=TIED
    ),
    "ResNet with BatchNorm": Case(make=task(lambda: ResNet(16), tasks.class_loss, pictures), cuts=ALL),
    "U-Net": Case(make=task(lambda: UNet(16), tasks.class_loss, pixels), cuts=ALL),
    "GPT, lengths and rows change every step": Case(
        make=gpt(tasks.texts(STEPS, rows=8, length=24, vary=True)), cuts=ALL
    ),
    "GPT, dropout 0.1 (against one device)": Case(make=gpt(dropout=0.1), cuts=ALL, against_one_device=True),
    "GPT, bfloat16 autocast": Case(make=gpt(autocast=torch.bfloat16), cuts=BOTH),
    "Llama": Case(make=hugging_face(llama, logits_loss, only_ids), cuts=BOTH),
    "BERT (tied)": Case(make=hugging_face(bert, logits_loss, with_mask), cuts=BOTH, allowed=TIED),
    "T5 (tied)": Case(make=hugging_face(t5, logits_loss, with_decoder), cuts=BOTH, allowed=TIED),
    "ViT": Case(make=task(vit, picture_loss, pictures), cuts=BOTH),
    "Mixtral (mixture of experts)": Case(make=hugging_face(mixtral, logits_loss, only_ids), cuts=BOTH),
    "experts chosen by index": Case(
        make=task(experts, tasks.class_loss, tasks.vectors(STEPS, dtype=torch.float32)), cuts=BOTH
    ),
    "LSTM": Case(make=task(Recurrent, tasks.token_loss, tasks.texts(STEPS)), cuts=BOTH),
    "nn.Transformer": Case(make=task(Translator, tasks.token_loss, tasks.texts(STEPS)), cuts=BOTH),
}


def buffer_difference(trained: Trained, reference: Trained, parameters: set[str]) -> str:
    buffers = [name for name in trained.state if name not in parameters]
    return f"{state_difference(trained, reference, buffers):.1e}" if buffers else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "losses.md")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as folder, Workers(Path(folder)) as workers:
        for name, case in CASES.items():
            parameters = {n for n, _ in case.make().model.named_parameters()}
            reference = (
                workers.train(case.make(), Cuts(at=()), STEPS)
                if case.against_one_device
                else plain(case.make(), STEPS, MICROBATCHES)
            )
            for cut, cuts in case.cuts.items():
                trained = workers.train(case.make(), cuts, STEPS)
                difference = loss_difference(trained, reference)
                verdict = "yes" if difference <= case.allowed else "**no**"
                losses = f"{trained.losses[0]:.3f} → {trained.losses[-1]:.3f}"
                buffers = buffer_difference(trained, reference, parameters)
                rows.append((name, cut, losses, f"{difference:.1e}", f"{case.allowed:.0e}", verdict, buffers))
                print(*rows[-1], sep=" | ", flush=True)
    header = ("model", "cut", "loss", "largest difference", "allowed", "reached", "buffers differ by")
    write_table(out, "Losses against the plain loop", environment(seed=SEED, steps=STEPS), header, rows)


if __name__ == "__main__":
    main()
