"""What a worker process does before and after its entry.

Nothing heavy is imported before the process is pinned to its cores, because libraries size their thread pools
when they are imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import ForescaleError, InvalidInput, PeerGone
from forescale.engine.backend import ProcessSpec
from forescale.engine.stream import ADDRESS, StreamChannel
from forescale.engine.wire import Frame, Invitation

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class WorkerChannel(Protocol):
    """What every channel lets a worker do."""

    def send(self, header: Mapping[str, Any], frames: Sequence[Frame] = (), /) -> object: ...

    def close(self) -> object: ...


Entry = Callable[[Any, Device, Mapping[str, Any]], None]
"""Called with the channel of the invitation's kind, the device, and the config."""

_PR_SET_PDEATHSIG = 1


def request(spec: ProcessSpec, invitation: Invitation) -> bytes:
    """What ``main`` reads from standard input to become the process of ``spec``: one line of JSON."""
    fields = {
        "name": spec.address,
        "entry": spec.entry,
        "preload": spec.preload,
        "device": asdict(spec.device),
        "config": dict(spec.config),
        "invitation": asdict(invitation),
        "import_path": [folder or os.getcwd() for folder in sys.path],
    }
    return json.dumps(fields).encode() + b"\n"


def main() -> int:
    """Become the process that standard input describes; the exit code.

    It sends ``{"type": "connected", "pid": ...}`` first, and if the entry raises ``{"type": "failed",
    "error": one line, "traceback": ...}``. It ends when its standard input does: when its parent dies.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's to handle
    print_what_fits()
    asked, parent = _read_request()
    die_with_parent()  # not before: one that was forked has its parent only now
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    device = _device(asked["device"])
    _pin(device)
    sys.path[:] = asked["import_path"]
    with contextlib.closing(_channel(Invitation(**asked["invitation"]), asked["name"])) as channel:
        channel.send({"type": "connected", "pid": os.getpid()})
        return _run(asked, channel, device)


def _channel(invitation: Invitation, name: str) -> WorkerChannel:
    if invitation.address.startswith(ADDRESS):
        return StreamChannel(invitation, name)
    from forescale.engine.channel import Channel  # noqa: PLC0415 - only here ZeroMQ is needed

    return Channel(invitation, name)


def _run(asked: Mapping[str, Any], channel: WorkerChannel, device: Device) -> int:
    module, _, function = asked["entry"].partition(":")
    try:
        for early in asked["preload"]:
            import_module(early)
        call: Entry = getattr(import_module(module), function)
        call(channel, device, asked["config"])
    except PeerGone as error:
        raise SystemExit(str(error)) from error
    except Exception as error:  # noqa: BLE001 - whatever the user's code raises is told to the coordinator
        traceback.print_exc()
        channel.send({"type": "failed", "error": _line(error), "traceback": traceback.format_exc()})
        return 1
    return 0


def print_what_fits() -> None:
    """From now on, printing to a disk that is full does nothing, instead of ending the process."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        output = io.TextIOWrapper(_Output(number, "wb", closefd=False), "utf-8", "backslashreplace")
        output.reconfigure(write_through=True)
        setattr(sys, name, output)


class _Output(io.FileIO):
    """A file that loses what there is no room for."""

    def write(self, octets: ReadableBuffer, /) -> int:
        with contextlib.suppress(OSError):
            super().write(octets)
        return memoryview(octets).nbytes


def _line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    return text if isinstance(error, ForescaleError) else f"{type(error).__name__}: {text}"


def die_with_parent() -> None:
    """Ask Linux to kill this process when the thread that started it ends; elsewhere there is ``_watch``."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _read_request() -> tuple[dict[str, Any], int]:
    """The request, and a private descriptor of the pipe; standard input is empty from now on."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            raise SystemExit("the parent process ended before it said what to do")
        line += part
    parent = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return json.loads(line), parent


def _watch(parent: int) -> None:
    while os.read(parent, 1):
        pass
    os._exit(1)  # no clean-up: there is nobody left to hand anything to


def _device(fields: dict[str, Any]) -> Device:
    kind = DeviceKind(fields.pop("kind"))
    return Device(kind=kind, cores=tuple(fields.pop("cores")), **fields)


def _pin(device: Device) -> None:
    if not device.cores or not hasattr(os, "sched_setaffinity"):
        return
    try:
        os.sched_setaffinity(0, device.cores)
    except OSError as error:
        raise InvalidInput(f"{device.name}: cannot run on cores {device.cores}: {error.strerror}") from error
