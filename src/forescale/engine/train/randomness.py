"""Seeds for random operators, the same however the model is cut."""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1


def operator_seed(device: torch.device, seed: int, step: int, microbatch: int, operator: int) -> None:
    """Seeds the device's default generator for one call of one operator."""
    mixed = seed & _MASK
    for value in (step, microbatch, operator):
        mixed = _splitmix64(mixed ^ value)
    generator = (
        torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    )
    generator.manual_seed(mixed)


def _splitmix64(state: int) -> int:
    """Steele, Lea & Flood, *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014, fig. 16."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
