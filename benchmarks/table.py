"""Tables of results: printed, and written as Markdown with what they were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import forescale


def environment(**inputs: object) -> Mapping[str, str]:
    """Hardware, versions and inputs (seed, ...) of a measurement."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "CPU": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": f"forescale {forescale.__version__}, torch {torch.__version__}, "
        f"numpy {np.__version__}, Python {platform.python_version()}",
        **{name: str(value) for name, value in inputs.items()},
    }


def write_table(
    out: Path,
    title: str,
    measured_on: Mapping[str, str],
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
) -> None:
    """Prints a table and writes it to ``out``."""
    lines = [f"# {title}", ""]
    lines += [f"- {name}: {value}" for name, value in measured_on.items()]
    lines += ["", _row(header), _row(["---"] * len(header)), *(_row(row) for row in rows), ""]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines))
    print("\n".join(lines), f"\nwritten to {out}")


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
