"""Results of the serving benchmarks: kept part by part as JSON, and shown as one page of Markdown."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from table import environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of a table.

    Attributes:
        asked: what it should be; "": nothing is asked.
        is_met: None: nothing is asked, or it cannot be said.
    """

    what: str
    measured: str
    asked: str = ""
    is_met: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What one part found.

    Attributes:
        how: a sentence or two on how it was measured.
        figures: the numbers behind the rows, for machines.
    """

    title: str
    how: str
    rows: tuple[Row, ...]
    figures: Mapping[str, object] = field(default_factory=dict)


def load_average() -> str:
    return f"{os.getloadavg()[0]:.2f}"


class Results:
    """The results in a folder; a part that is measured again takes its old results' place."""

    def __init__(self, folder: Path) -> None:
        self._json = folder / "serving.json"
        self._page = folder / "serving.md"
        self._parts = json.loads(self._json.read_text()) if self._json.exists() else {}

    def keep(self, part: str, section: Section, *, took_s: float, load_before: str, is_quick: bool) -> None:
        date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        notes = [date, f"{took_s:.0f} s", f"load average before: {load_before}"]
        notes += ["quick: fewer and shorter runs than meant"] if is_quick else []
        self._parts[part] = {**asdict(section), "measured_on": dict(environment()), "notes": notes}
        self._json.parent.mkdir(parents=True, exist_ok=True)
        self._json.write_text(json.dumps(self._parts, indent=1) + "\n")

    def write(self, order: list[str]) -> None:
        """Write the page, parts in this order."""
        parts = [self._parts[name] for name in order if name in self._parts]
        lines = ["# Serving", ""]
        same = {json.dumps(part["measured_on"]): part["measured_on"] for part in parts}
        lines += [f"- {name}: {value}" for name, value in next(iter(same.values()), {}).items()]
        for part in parts:
            lines += ["", f"## {part['title']}", "", part["how"], ""]
            lines += ["| | measured | asked | |", "|---|---|---|---|"]
            for row in part["rows"]:
                verdict = {True: "yes", False: "**no**", None: ""}[row["is_met"]]
                lines.append(f"| {row['what']} | {row['measured']} | {row['asked']} | {verdict} |")
            lines += ["", f"({'; '.join(part['notes'])})"]
        self._page.write_text("\n".join(lines) + "\n")


def show(section: Section) -> None:
    print(f"\n{section.title}\n  {section.how}")
    width = max(len(row.what) for row in section.rows)
    for row in section.rows:
        verdict = {True: "yes", False: "NO", None: ""}[row.is_met]
        print(f"  {row.what:<{width}}  {row.measured:<44} {row.asked:<22} {verdict}".rstrip(), flush=True)
