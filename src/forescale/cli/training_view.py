"""A run while it goes on: a bar on a terminal, a line now and then elsewhere. Always on standard error."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from forescale.cli.console import console
from forescale.cli.units import moved, percent, seconds, si
from forescale.engine.messages import CheckpointWritten, Event, Repartitioned, RunStarted, StepFinished
from forescale.plan.wording import spell_microbatches, spell_places

_RECENT_STEPS = 10  # figures that jump with every step are means over so many
_LINE_EVERY_S = 5.0


class TrainingView:
    """Hand its methods to ``train``, inside a ``with`` block."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._recent: deque[StepFinished] = deque(maxlen=_RECENT_STEPS)
        self._line_due_s = 0.0
        self._is_terminal = sys.stderr.isatty()
        self._progress = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            # It alone is cut off where the terminal is narrow.
            TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)),
            console=console(stderr=True),
            expand=True,
            refresh_per_second=4,  # drawing takes time from the devices
            disable=not self._is_terminal,
        )
        self._bar = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def prepare(self, doing: str) -> None:
        """Shows what happens before the first step."""
        self._progress.update(self._bar, description=doing)
        if not self._is_terminal:
            self._print(doing)

    def show(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._progress.update(self._bar, total=self._steps, completed=event.next_step)
                microbatches = spell_microbatches(event.plan)
                self._print(f"plan: {spell_places(event.plan)}; microbatches: {microbatches}")
            case StepFinished():
                self._recent.append(event)
                self._show_step(event)
            case Repartitioned():
                self._recent.clear()
                cost = f"{seconds(event.pause_s)} pause, {moved(event.moved_bytes)} moved"
                self._print(f"step {event.step}: repartitioned ({cost}): {event.reason}")
            case CheckpointWritten():
                self._print(f"step {event.step}: checkpoint {event.path}")
            case _:
                pass  # batches ahead: many, and the plan they lead to is shown; a lost worker ends the run

    def _show_step(self, event: StepFinished) -> None:
        self._progress.update(self._bar, completed=event.step + 1, description=self._figures(event))
        if self._is_terminal:
            return
        now_s = time.monotonic()
        if now_s >= self._line_due_s or event.step + 1 == self._steps:
            self._line_due_s = now_s + _LINE_EVERY_S
            self._print(f"step {event.step + 1}/{self._steps}: {self._figures(event)}")

    def _figures(self, event: StepFinished) -> str:
        total_s = sum(step.step_s for step in self._recent)
        observed_s = total_s / len(self._recent)
        tokens_per_s = sum(step.tokens for step in self._recent) / total_s
        predicted_s = sum(step.predicted_s for step in self._recent) / len(self._recent)
        busy_s = {s.device: s.forward_s + s.backward_s + s.optimizer_s for s in event.stages}
        loads = ", ".join(f"{device} {percent(value_s / event.step_s)}" for device, value_s in busy_s.items())
        return (
            f"loss {event.loss:.4f}, {si(tokens_per_s, 'tokens/s')}, step {seconds(observed_s)} "
            f"({seconds(predicted_s)} predicted), busy: {loads}"
        )

    def _print(self, text: str) -> None:
        self._progress.console.print(text, markup=False, soft_wrap=True)
