"""What the worker processes of the integration tests do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from forescale.core.cluster import Device
from forescale.core.errors import PeerGone
from forescale.engine.channel import Channel

IMPORTED_BY = os.getpid()


def echo(channel: Channel, device: Device, config: Mapping[str, Any]) -> None:
    """Send back what comes, until told to stop."""
    while True:
        message = channel.receive()
        assert message is not None
        if message.header["type"] == "stop":
            sys.stdout.write("told to stop\n")
            return
        channel.send({**message.header, "device": device.name, **config}, message.frames)


def describe(channel: Channel, device: Device, config: Mapping[str, Any]) -> None:
    """Tell what kind of process this is."""
    channel.send(
        {
            "type": "described",
            "cores": sorted(os.sched_getaffinity(0)),
            "environment": dict(os.environ),
            "argv": sys.orig_argv,
            "session": os.getsid(0),
            "ignores_interrupt": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
            "input": sys.stdin.read(),
            "has_torch": "torch" in sys.modules,
            "device_name": device.name,
            "imported_by": IMPORTED_BY,
            "pid": os.getpid(),
            "drawn": np.random.random(),  # noqa: NPY002 - as models do
        }
    )
    echo(channel, device, config)


def print_much(channel: Any, device: Device, config: Mapping[str, Any]) -> None:
    """Print in all ways where nothing can be written, and say that it did no harm."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)
    for _ in range(3):
        sys.stdout.write("a line\n")
        sys.stdout.flush()
        traceback.print_stack()
        subprocess.run([sys.executable, "-c", "print('a line')"], check=False)
    channel.send({"type": "printed"})


def fail(channel: Channel, device: Device, config: Mapping[str, Any]) -> None:
    raise RuntimeError(f"no luck with {config['thing']}\nsecond line")


def leave(channel: Channel, device: Device, config: Mapping[str, Any]) -> None:
    sys.exit(config["code"])


def stubborn(channel: Channel, device: Device, config: Mapping[str, Any]) -> None:
    """Ignore SIGTERM, start a process of its own, and carry on."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    channel.send({"type": "stubborn", "child": child.pid})
    while True:
        signal.pause()


def until_gone(channel: Channel, device: Device, config: Mapping[str, Any]) -> None:
    """Wait for the coordinator to vanish, and say so in a file."""
    channel.send({"type": "waiting"})
    try:
        while True:
            channel.receive()
    except PeerGone:
        with open(config["path"], "w", encoding="utf-8") as file:
            file.write("gone")
        raise
