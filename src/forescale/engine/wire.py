"""What channels between processes carry: a header and raw buffers ("frames")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import msgpack

HEADER_LIMIT_BYTES = 16 << 20

Frame = bytes | bytearray | memoryview
"""A contiguous buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """What a worker needs to connect: an address and, unless that is a Unix socket, keys (Z85 text).

    It holds the run's secret: hand it over standard input or something as private, never argv or environment.
    """

    address: str
    server_key: str = ""
    public_key: str = ""
    secret_key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message.

    Attributes:
        sender: name of the process it comes from ("" for the coordinator).
        header: what was sent, with tuples become lists.
        frames: writable buffers of this message's own; they live as long as something refers to them.
    """

    sender: str
    header: Mapping[str, Any]
    frames: tuple[memoryview, ...]


def pack(header: object) -> bytes:
    """The header as msgpack.

    Raises:
        ValueError: it is larger than ``HEADER_LIMIT_BYTES``.
    """
    packed = cast(bytes, msgpack.packb(header))
    if len(packed) > HEADER_LIMIT_BYTES:
        raise ValueError(f"a header of {len(packed):,} bytes; send what is large as frames")
    return packed


def unpack(packed: Frame) -> object:
    """What was packed, with tuples become lists.

    Raises:
        ValueError: it is no msgpack, or too large.
    """
    if len(packed) > HEADER_LIMIT_BYTES:
        raise ValueError(f"a header of {len(packed):,} bytes")
    try:
        return msgpack.unpackb(packed)
    except msgpack.UnpackException as error:
        raise ValueError(str(error)) from error
