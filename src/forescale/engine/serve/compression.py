"""Bodies as gzip or deflate."""

from __future__ import annotations

import zlib

from forescale.core.errors import BadRequest

_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}  # zlib's codes for its two containers
_WORTH_BYTES = 1024  # below, compressing costs more than it saves


def decompress(body: bytes, encoding: bytes, limit_bytes: int) -> bytes:
    """The body that ``encoding`` was made of.

    Raises:
        BadRequest: another encoding, broken data, or more than ``limit_bytes`` in it.
    """
    bits = _WINDOW_BITS.get(encoding)
    if bits is None:
        raise BadRequest(
            f"content encoding {encoding.decode('latin-1')!r} is not gzip or deflate", status=415
        )
    stream = zlib.decompressobj(bits)
    try:
        plain = stream.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise BadRequest(f"the body is not {encoding.decode()}: {error}") from error
    if len(plain) > limit_bytes:
        raise BadRequest(f"the body is larger than {limit_bytes:,} bytes", status=413)
    if not stream.eof or stream.unused_data:
        raise BadRequest(f"the body is not one whole {encoding.decode()} stream")
    return plain


def choose_encoding(accepted: bytes, size_bytes: int) -> bytes | None:
    """How to compress an answer of that size, for a client's Accept-Encoding; None: not at all."""
    if not accepted or size_bytes < _WORTH_BYTES:
        return None
    refused = (b"q=0", b"q=0.0", b"q=0.00", b"q=0.000")
    names = {
        name.strip()
        for name, _, weight in (part.partition(b";") for part in accepted.lower().split(b","))
        if weight.strip() not in refused
    }
    return next((encoding for encoding in _WINDOW_BITS if encoding in names), None)


def compress(body: bytes, encoding: bytes) -> bytes:
    stream = zlib.compressobj(1, zlib.DEFLATED, _WINDOW_BITS[encoding])
    return stream.compress(body) + stream.flush()
