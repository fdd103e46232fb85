"""What our pictures are made of: SVG that brings its own colours for light and dark surroundings."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

CHARACTER_WIDTH = 6.6
"""Of an average character, in user units."""
COLOURS = 8
"""How many the classes ``k0``, ``k1``, … have."""

_STYLE = """
.fp{--ink:#1c2024;--soft:#5d646d;--line:#d9dcdf;--lane:#f6f7f5;--c0:#1f6fd1;--c1:#c2570c;--c2:#16806a;--c3:#8a3ea8;
--c4:#a3243b;--c5:#5b6b12;--c6:#0b6f8f;--c7:#7a5230;
font:12px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
.fp text{fill:var(--ink)}.fp .soft{fill:var(--soft)}.fp .big{font-size:16px;font-weight:600}
.fp .name{font-size:14px;font-weight:600}.fp .end{text-anchor:end}.fp .mid{text-anchor:middle}
.fp .lane{fill:var(--lane);stroke:var(--line)}.fp .rail{fill:var(--line)}
.fp .tint{fill-opacity:.16;stroke-opacity:.55}.fp .arrow{fill:none;stroke:var(--soft);stroke-width:1.6}
.fp .tip{fill:var(--soft)}.fp .edge{fill:none;stroke:var(--soft);stroke-width:.7;stroke-opacity:.45}
.fp .across{stroke:var(--ink);stroke-opacity:.7}
.fp .bound{fill:none;stroke:var(--ink);stroke-width:1.8;stroke-dasharray:5 3}
.fp .k0{fill:var(--c0);stroke:var(--c0)}.fp .k1{fill:var(--c1);stroke:var(--c1)}
.fp .k2{fill:var(--c2);stroke:var(--c2)}.fp .k3{fill:var(--c3);stroke:var(--c3)}
.fp .k4{fill:var(--c4);stroke:var(--c4)}.fp .k5{fill:var(--c5);stroke:var(--c5)}
.fp .k6{fill:var(--c6);stroke:var(--c6)}.fp .k7{fill:var(--c7);stroke:var(--c7)}
@media (prefers-color-scheme:dark){.fp{--ink:#e6e8ea;--soft:#9aa3ac;--line:#363c43;--lane:#23282d;
--c0:#6fabf5;--c1:#f2a15f;--c2:#55c9ab;--c3:#cf94e6;--c4:#f08c9c;--c5:#bccb5f;--c6:#63c6e6;--c7:#d3a983}}
"""


def document(summary: str, width: float, height: float, parts: Iterable[str]) -> str:
    """A document of these elements, also fit to be put into HTML; ``summary`` stands for what is seen."""
    label = escape(summary, quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="fp" role="img" aria-label="{label}" '
        f'viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}">'
        f"<style>{_STYLE}</style>{''.join(parts)}</svg>"
    )


def text(x: float, y: float, content: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(content)}</text>'


def shortened(name: str, room: float) -> str:
    """The end of a module path says more than its beginning."""
    most = int(room / CHARACTER_WIDTH)
    return name if len(name) <= most else "…" + name[-most + 1 :]
