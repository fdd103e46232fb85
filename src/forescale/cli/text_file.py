"""Text files that a command reads, UTF-8 or UTF-16, also by gzip, and what it says of those it cannot."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from forescale.core.errors import InvalidInput

Parsed = TypeVar("Parsed")
_GZIP = b"\x1f\x8b"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(
    path: Path, parse: Callable[[Iterator[str]], Parsed], on_progress: Callable[[float], None] | None = None
) -> Parsed:
    """What ``parse`` makes of the file's lines; ``on_progress`` is told the fraction of it that is read.

    Raises:
        InvalidInput: it cannot be read, or ``parse`` says so; the message begins with the path.
    """
    if path.is_dir():
        raise InvalidInput(f"cannot read {path}: it is a folder")
    try:
        with path.open("rb") as file:
            packed = file.peek(2).startswith(_GZIP)
            content = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=file))) if packed else file
            begin = content.peek(8192)
            encoding = "utf-16" if begin.startswith(_UTF16) else "utf-8-sig"
            if b"\0" in begin and encoding != "utf-16":
                raise InvalidInput("it is not text, but binary")
            text = io.TextIOWrapper(content, encoding=encoding, newline="")
            return parse(_told(text, file, on_progress) if on_progress else text)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"cannot read {path}: it is not text in UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidInput(f"cannot read {path}: it is compressed by gzip, but damaged") from error
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error


def _told(lines: Iterator[str], file: BinaryIO, on_progress: Callable[[float], None]) -> Iterator[str]:
    size_bytes = max(1, os.fstat(file.fileno()).st_size)
    for number, line in enumerate(lines):
        if number % 4096 == 0:
            on_progress(min(1.0, file.tell() / size_bytes))
        yield line
