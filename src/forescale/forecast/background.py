"""Processes in which models are fitted while forecasts go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection

_NICENESS = 10  # what decides has the cores first


@contextmanager
def background_processes(count: int) -> Generator[Executor]:
    """Processes that are being started when this returns, so that no decision waits for that.

    They compute with one thread each, at low priority. Ctrl-C does not reach them; they end when the context
    does, in the midst of a fit too, and when this process does, whatever ends it. As always with ``spawn``,
    a script that uses them must do so below ``if __name__ == "__main__"``.
    """
    context = get_context("spawn")
    listening, held_open = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_enlist, initargs=(listening,))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by those started now
    try:
        for _ in range(count):
            pool.submit(_start)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield pool
    finally:
        held_open.close()
        pool.shutdown()
        listening.close()


def _start() -> None:
    """The first task of a process: a pool starts one when there is something to do."""


def _enlist(listening: Connection) -> None:
    os.setpgid(0, 0)
    os.nice(_NICENESS)
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with, args=(listening,), daemon=True).start()


def _end_with(listening: Connection) -> None:
    """Ends this process and those it has started once nobody is there for whom it works."""
    parent = parent_process()
    assert parent
    connection.wait([listening, parent.sentinel])
    os.killpg(0, signal.SIGKILL)
