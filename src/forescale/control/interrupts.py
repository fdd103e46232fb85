"""When Ctrl-C may end what a run is doing, and when it has to wait."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

_ASKED_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """While entered, SIGINT, SIGTERM and SIGHUP raise ``KeyboardInterrupt``, but not inside :meth:`held`.

    A message that went to some workers only, or half an answer, would leave a run that can neither go on nor
    be saved. A signal with a handler of the caller's own, or that is ignored (``nohup``), is left alone.
    Outside the main thread nothing changes: Python delivers signals there alone.
    """

    def __init__(self) -> None:
        self._replaced: dict[signal.Signals, Any] = {}
        self._process = os.getpid()
        self._holding = False
        self._pending = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _ASKED_TO_END:
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, signal.default_int_handler):
                    signal.signal(number, self._asked)
                    self._replaced[number] = before
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._replaced.items():
            signal.signal(number, before)
        self._replaced.clear()

    def _asked(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if not self._holding or os.getpid() != self._process:  # a process that the batches' loader forked
            raise KeyboardInterrupt
        self._pending = True

    @contextmanager
    def held(self) -> Generator[None]:
        """What is inside is done completely; an interrupt meanwhile is raised at its end.

        If it fails, the failure is raised instead.
        """
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            pending, self._pending = self._pending, False
        if pending:
            raise KeyboardInterrupt
