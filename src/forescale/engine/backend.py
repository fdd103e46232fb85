"""What the engine asks of whatever runs its processes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from forescale.core.cluster import Device

_ENTRY = re.compile(r"\w+(\.\w+)*:\w+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """A process to start.

    Attributes:
        entry: ``package.module:function``, called as ``function(channel, device, config)``.
        device: where it runs; its cores and accelerator are the only ones the process sees.
        environment: variables set on top of this process's own.
        config: what the entry is told, JSON-able and small; big things travel over the channel.
        name: its address on the channel and the name of its log file, unique among living
            processes (None: the device's name).
        preload: modules to import before the entry's. Processes with the same ones may be forked from one
            that has imported them, so importing them must leave no threads that a fork would break.

    Raises:
        ValueError: ``entry`` or the name is not of that form.
    """

    entry: str
    device: Device
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    name: str | None = None
    preload: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _ENTRY.fullmatch(self.entry):
            raise ValueError(f"entry {self.entry!r} is not of the form package.module:function")
        if not _NAME.fullmatch(self.address):
            raise ValueError(f"{self.address!r} cannot name a process: use letters, digits and '_.-'")

    @property
    def address(self) -> str:
        """The name the process has on the channel."""
        return self.name or self.device.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessHandle:
    """A started process.

    Attributes:
        name: its address on the channel.
        device: the device's name.
        pid: its number; 0: it is still to be forked.
    """

    name: str
    device: str
    pid: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessExit:
    """How a process ended.

    Attributes:
        code: exit status; None when a signal ended it.
        signal: number of that signal; None when it exited.
        cause: one sentence for people, with the last line the process wrote.
        log_tail: last lines it wrote to its output.
    """

    handle: ProcessHandle
    code: int | None
    signal: int | None
    cause: str
    log_tail: tuple[str, ...]


class ProcessBackend(Protocol):
    """Starts processes on devices, and tells when they end. Use it from one thread."""

    def start(self, spec: ProcessSpec) -> ProcessHandle:
        """Start a process and return without waiting for it; it connects to the channel by itself."""
        ...

    def stop(self, handle: ProcessHandle, grace_s: float) -> ProcessExit:
        """End a process: ask, wait ``grace_s``, then kill it and all it started.

        Harmless when it has ended.
        """
        ...

    def kill(self, handle: ProcessHandle) -> None:
        """End a process and all it started at once, without waiting: ``exits`` tells when it is gone.

        Harmless when it has ended.
        """
        ...

    def exits(self) -> tuple[ProcessExit, ...]:
        """What ended since last asked, each once, without those ended by ``stop``. Does not wait."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable when ``exits`` has something to tell."""
        ...

    def close(self) -> None:
        """Stop everything still running. Harmless the second time."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...
