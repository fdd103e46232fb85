"""Trains the small quantile network that ships with the package, on simulated series only.

    python benchmarks/pretrain_network.py samples --seconds 240 --seed 0
    python benchmarks/pretrain_network.py train --batches 8000

Each run of ``samples`` adds a file; ``train`` takes all of them, and goes on from where it ended last.

Axes: B = sample, F = input, K = anchor, G = quantile level of the network.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from simulated_series import simulate
from torch import Tensor, nn

from forescale.forecast.forecaster import Array
from forescale.forecast.members.anchors import ANCHORS, INPUTS, Anchors
from forescale.forecast.members.member import Targets
from forescale.forecast.members.network import HIDDEN, LEVELS_G, WEIGHTS

SEASONS = (24, 48, 96, 144, 288, 720, 1440)
SERIES, TARGETS, ORIGINS = 200, 8, 24


@dataclass(slots=True)
class Past:
    """A history that can be stepped through."""

    values_NT: Array
    steps: int = 0

    def last(self, steps: int) -> Array:
        return self.values_NT[:, max(0, self.steps - steps) : self.steps]

    def at(self, ago_X: npt.NDArray[np.int64]) -> Array:
        return self.values_NT[:, self.steps - 1 - ago_X]

    def at_each(self, ago_NX: npt.NDArray[np.int64]) -> Array:
        return np.take_along_axis(self.values_NT, self.steps - 1 - ago_NX, axis=1)


def sample(rng: np.random.Generator) -> tuple[Array, Array, Array, Array]:
    """Inputs, anchors and targets relative to the reference in its unit, and weights, of some series."""
    season = int(rng.choice(SEASONS))
    steps = int(min(3.5 * season, 4500) + 500)
    values_NT = simulate(rng, SERIES, steps, season)
    lead_J = np.round(10.0 ** rng.uniform(0.0, 2.3, TARGETS)).astype(np.int64)
    lead_J[:2] = 1, 5
    peak_J = (rng.random(TARGETS) < 0.4) & (lead_J > 1)
    known_season = season if rng.random() < 0.75 else None
    anchors = Anchors(SERIES, Targets(lead_steps_J=lead_J, peak_J=peak_J), known_season)
    past = Past(values_NT)
    begin = int(rng.integers(20, 200))
    origins = set(rng.choice(np.arange(begin, steps - lead_J.max()), ORIGINS, replace=False).tolist())
    found: list[tuple[Array, ...]] = []
    for t in range(steps - int(lead_J.max())):
        past.steps = t + 1
        newest_N = values_NT[:, t]
        anchors.take(newest_N, newest_N, past)
        if t in origins:
            target_JN = np.stack(
                [
                    values_NT[:, t + 1 : t + lead + 1].max(axis=1) if peak else values_NT[:, t + lead]
                    for lead, peak in zip(lead_J.tolist(), peak_J.tolist(), strict=True)
                ]
            )
            unit_JN, reference_JN = anchors.unit_JN, anchors.anchors_JNK[..., 0]
            away_JNK = (anchors.anchors_JNK - reference_JN[..., None]) / unit_JN[..., None]
            found.append((anchors.inputs_JNF.copy(), away_JNK, (target_JN - reference_JN) / unit_JN, unit_JN))
    inputs_OJNF, away_OJNK, target_OJN, unit_OJN = (np.stack(part) for part in zip(*found, strict=True))
    # Every series counts alike, as it does in a mean of relative losses; so do its calm and its wild times.
    usual_JN = np.mean(np.abs(target_OJN) * unit_OJN, axis=0)
    weight_OJN = unit_OJN / np.maximum(usual_JN, 1e-9)
    keep = (weight_OJN < 100.0) & (np.abs(target_OJN) < 1e4)
    return inputs_OJNF[keep], away_OJNK[keep], target_OJN[keep], np.minimum(weight_OJN[keep], 20.0)


def write_samples(folder: Path, seed: int, seconds: float) -> None:
    rng = np.random.default_rng(seed)
    end_s = time.monotonic() + seconds
    parts: list[tuple[Array, ...]] = []
    while time.monotonic() < end_s:
        parts.append(sample(rng))
        print(f"{len(parts)} batches, {sum(len(p[2]) for p in parts)} samples", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    inputs_BF, away_BK, target_B, weight_B = (
        np.concatenate(part).astype(np.float32) for part in zip(*parts, strict=True)
    )
    np.savez(folder / f"samples_{seed}.npz", inputs=inputs_BF, away=away_BK, target=target_B, weight=weight_B)


class Network(nn.Module):
    """The network of `forescale.forecast.members.network`, to be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.third = nn.Linear(HIDDEN, len(LEVELS_G) * (ANCHORS + 1) + 1)

    def forward(self, inputs_BF: Tensor, away_BK: Tensor) -> Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first(inputs_BF))))
        out = self.third(hidden)
        levels = len(LEVELS_G)
        gates_BGK = torch.softmax(out[:, : levels * ANCHORS].reshape(-1, levels, ANCHORS), dim=2)
        offset_BG = out[:, levels * ANCHORS : -1]
        stretch_B1 = torch.exp(torch.clamp(out[:, -1:], -4.0, 4.0))
        return (gates_BGK * away_BK[:, None, :]).sum(2) + stretch_B1 * offset_BG


def train(folder: Path, batches: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    files = [dict(np.load(path)) for path in sorted(folder.glob("samples_*.npz"))]
    data = {name: torch.from_numpy(np.concatenate([file[name] for file in files])) for name in files[0]}
    network = Network()
    checkpoint = folder / "network.pt"
    if checkpoint.exists():
        network.load_state_dict(torch.load(checkpoint))
    mean_F = data["inputs"].mean(0)
    spread_F = data["inputs"].std(0) + 0.05
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    levels_G = torch.tensor(LEVELS_G, dtype=torch.float32)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, batches, eta_min=1e-5)
    smooth = 0.0
    for number in range(1, batches + 1):
        chosen_B = torch.randint(len(data["target"]), (2048,))
        inputs_BF = (data["inputs"][chosen_B] - mean_F) / spread_F
        quantiles_BG = network(inputs_BF, data["away"][chosen_B])
        error_BG = data["target"][chosen_B, None] - quantiles_BG
        loss_B = torch.maximum(levels_G * error_BG, (levels_G - 1.0) * error_BG).mean(1)
        loss = (loss_B * data["weight"][chosen_B]).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        smooth += max(0.002, 1.0 / number) * (float(loss.detach()) - smooth)
        if number % 1000 == 0 or number == batches:
            print(f"{number} batches, loss {smooth:.4f}", flush=True)
            torch.save(network.state_dict(), checkpoint)
            _export(network, mean_F, spread_F)


def _export(network: Network, mean_F: Tensor, spread_F: Tensor) -> None:
    """Write the weights, with the scaling of the inputs taken into the first layer."""
    with torch.no_grad():
        first = network.first.weight / spread_F
        shift = network.first.bias - first @ mean_F
        layers = {
            "first": first.T,
            "first_bias": shift,
            "second": network.second.weight.T,
            "second_bias": network.second.bias,
            "third": network.third.weight.T,
            "third_bias": network.third.bias,
        }
        halves = {name: value.numpy().astype(np.float16) for name, value in layers.items()}
        np.savez_compressed(WEIGHTS, allow_pickle=False, **halves)
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["samples", "train"])
    parser.add_argument("--folder", type=Path, default=Path("build/pretraining"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--batches", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.action == "samples":
        write_samples(asked.folder, asked.seed, asked.seconds)
    else:
        train(asked.folder, asked.batches)
