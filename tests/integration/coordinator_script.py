"""A coordinator to be killed: starts two workers, prints their process ids, waits for ever."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from forescale.core.cluster import Device, DeviceKind
from forescale.engine.backend import ProcessSpec
from forescale.engine.channel import ChannelServer
from forescale.engine.local import LocalBackend

server = ChannelServer()
backend = LocalBackend(invitation=server.invitation, log_dir=Path(sys.argv[1]))
for name in ("cpu0", "cpu1"):
    device = Device(name=name, kind=DeviceKind.CPU, memory_bytes=0)
    preload = ("integration.process_entries",) if sys.argv[2] == "fork" else ()
    backend.start(ProcessSpec(entry="integration.process_entries:echo", device=device, preload=preload))
pids: list[int] = []
while len(pids) < 2:
    message = server.receive()
    assert message is not None
    pids.append(message.header["pid"])
sys.stdout.write(f"{pids[0]} {pids[1]}\n")
sys.stdout.flush()
if sys.argv[2] == "interrupt":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with backend:
        server.receive()
signal.pause()
