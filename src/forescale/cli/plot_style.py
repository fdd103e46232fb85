"""How all plots look."""

from __future__ import annotations

from typing import Any


def plot_style(*, ink: str, muted: str, line: str) -> dict[Any, Any]:
    """Settings of matplotlib.

    Args:
        ink: colour of what is to be read.
        muted: of what explains it.
        line: of axes and grid.
    """
    return {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": ink,
        "axes.edgecolor": line,
        "axes.labelcolor": muted,
        "axes.titlecolor": ink,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": line,
        "grid.linewidth": 0.7,
        "xtick.color": muted,
        "ytick.color": muted,
        "legend.frameon": False,
        "legend.labelcolor": ink,
        "savefig.facecolor": "white",
    }
