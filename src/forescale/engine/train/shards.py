"""Checkpoints on disk: each worker writes what it owns, under the model's own names.

    step-00000100/
      model-00001-of-00002.safetensors       parameters and persistent buffers
      model.safetensors.index.json           which file holds which name (the layout of Hugging Face)
      optimizer-00001-of-00002.safetensors   optimiser state, "NAME/KEY"
      trainer.json                           step, learning-rate scheduler, parameter groups, scalars

A directory that ends in ``.partial`` was interrupted and is never read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from forescale.core.errors import CheckpointMismatch
from forescale.graph.model import ModelGraph

_FORMAT = 1
_STEP = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one worker wrote: names in its model file, and optimiser scalars by ``NAME/KEY``."""

    model_file: str
    names: tuple[str, ...]
    scalars: Mapping[str, Any]


def write_shard(
    directory: Path,
    number: int,
    of: int,
    tensors: Mapping[str, torch.Tensor],
    states: Mapping[str, Mapping[str, Any]],
) -> Shard:
    """Writes one worker's part and forces it to disk.

    Raises:
        OSError: the disk is full, or not writable.
    """
    suffix = f"-{number + 1:05d}-of-{of:05d}.safetensors"
    optimizer = {
        f"{n}/{k}": v for n, state in states.items() for k, v in state.items() if isinstance(v, torch.Tensor)
    }
    scalars = {
        f"{n}/{k}": v for n, state in states.items() for k, v in state.items() if f"{n}/{k}" not in optimizer
    }
    for kind, values in (("model", tensors), ("optimizer", optimizer)):
        path = directory / (kind + suffix)
        try:
            save_file({n: v.detach().cpu().contiguous() for n, v in values.items()}, path)
        except SafetensorError as error:  # it wraps the system's error in its text
            raise OSError(f"cannot write {path.name}: {error}") from error
        _sync(path)
    return Shard(model_file="model" + suffix, names=tuple(tensors), scalars=scalars)


def complete(
    partial: Path, final: Path, graph: ModelGraph, shards: Sequence[Shard], trainer: Mapping[str, Any]
) -> None:
    """Writes the index and gives the checkpoint its final name, all or nothing."""
    aliases = {a: p.name for p in (*graph.parameters.values(), *graph.buffers.values()) for a in p.aliases}
    index = {
        "metadata": {"aliases": aliases},
        "weight_map": {name: shard.model_file for shard in shards for name in shard.names},
    }
    scalars = {key: value for shard in shards for key, value in shard.scalars.items()}
    record = {"format": _FORMAT, **trainer, "optimizer_scalars": scalars}
    for name, value in (("model.safetensors.index.json", index), ("trainer.json", record)):
        (partial / name).write_text(json.dumps(value, indent=1))
        _sync(partial / name)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint under ``directory``."""
    found = [path for path in directory.glob("step-*") if _STEP.fullmatch(path.name)]
    return max(found, default=None)


def remove_partial(directory: Path) -> None:
    """Removes what a killed run left unfinished under ``directory``."""
    for path in directory.glob("step-*.partial"):
        shutil.rmtree(path)


class Checkpoint:
    """A complete checkpoint.

    Raises:
        CheckpointMismatch: ``path`` is not one, or a file in it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._index = json.loads((path / "model.safetensors.index.json").read_text())
            self.trainer: dict[str, Any] = json.loads((path / "trainer.json").read_text())
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error
        if self.trainer.get("format") != _FORMAT:
            raise CheckpointMismatch(
                f"{path} has format {self.trainer.get('format')}; this version reads {_FORMAT}"
            )
        for name in sorted(set(self._index["weight_map"].values())):
            for written in (name, "optimizer" + name.removeprefix("model")):  # every worker wrote both
                with self._opened(path / written):
                    pass

    def model(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name."""
        files: Mapping[str, str] = self._index["weight_map"]
        return self._read((name, files[name]) for name in names)

    def names(self) -> tuple[str, ...]:
        return tuple(self._index["weight_map"])

    def aliases(self) -> Mapping[str, str]:
        """Other names of tied tensors -> the name they are stored under."""
        return self._index["metadata"]["aliases"]

    def optimizer(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Optimiser state by parameter and key; what had none yet is absent."""
        wanted = set(names)
        states: dict[str, dict[str, Any]] = {}
        found = dict(self.trainer["optimizer_scalars"])
        for path in sorted(self.path.glob("optimizer-*.safetensors")):
            with self._opened(path) as file:
                found |= {k: file.get_tensor(k) for k in file.keys() if k.rpartition("/")[0] in wanted}  # noqa: SIM118
        for key, value in found.items():
            name, _, entry = key.rpartition("/")
            if name in wanted:
                states.setdefault(name, {})[entry] = value
        return states

    def _read(self, places: Iterable[tuple[str, str]]) -> dict[str, torch.Tensor]:
        by_file: dict[str, list[str]] = {}
        for name, file in places:
            by_file.setdefault(file, []).append(name)
        values: dict[str, torch.Tensor] = {}
        for file_name, names in by_file.items():
            with self._opened(self.path / file_name) as file:
                values |= {name: file.get_tensor(name) for name in names}
        return values

    def _opened(self, path: Path) -> Any:
        """One of its files; opening compares the file's length with what its head says."""
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise self._damaged(f"{path.name}: {error}") from error

    def _damaged(self, reason: object) -> CheckpointMismatch:
        return CheckpointMismatch(
            f"{self.path} is not a complete checkpoint ({reason}); remove it to go on from the one before it"
        )

    def check(self, graph: ModelGraph) -> None:
        """Raises CheckpointMismatch unless the checkpoint is of this model."""
        expected = {p.name: p.shape for p in graph.parameters.values()}
        expected |= {b.name: b.shape for b in graph.buffers.values() if b.persistent}
        missing = [name for name in expected if name not in self._index["weight_map"]]
        extra = [name for name in self._index["weight_map"] if name not in expected]
        if missing or extra:
            name = (missing or extra)[0]
            what = "lacks" if missing else "holds"
            raise CheckpointMismatch(
                f"{self.path} is of another model: it {what} {name}; resume with the model it was written by"
            )
        for name, tensor in self.model(expected).items():
            if tuple(tensor.shape) != expected[name]:
                shapes = f"{tuple(tensor.shape)} there and {expected[name]} here"
                raise CheckpointMismatch(f"{self.path} is of another model: {name} is {shapes}")


def load_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """The whole model's state dict under its original names, for ``model.load_state_dict``.

    Args:
        path: a checkpoint, or a directory of checkpoints (the newest is taken).

    Raises:
        CheckpointMismatch: no complete checkpoint is there.
    """
    checkpoint = Checkpoint(latest(Path(path)) or Path(path))
    values = checkpoint.model(checkpoint.names())
    return values | {alias: values[name] for alias, name in checkpoint.aliases().items() if name in values}
