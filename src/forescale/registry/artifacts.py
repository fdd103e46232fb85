"""Files by their content: what was put in comes out unchanged, or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from forescale.core.errors import ArtifactCorrupt, InvalidInput, NotFound, RegistryFailed
from forescale.registry.records import Artifact

_CHUNK_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_INCOMING = "incoming"


class ArtifactStore:
    """A folder, or a bucket of an object store, that holds each file under its SHA-256.

    A file appears under its address only when it is whole: in a folder it is written beside and renamed, and
    object stores show no object before its last byte. A crash leaves a part in ``incoming``, which no address
    leads to.

    Args:
        url: a folder, or anything that fsspec knows (``s3://bucket/models``, ``gs://...``).
        cache: folder for local copies where the store is not a local folder; needed only then.

    Raises:
        InvalidInput: fsspec does not know the URL, or its driver is not installed.
        RegistryFailed: the folder cannot be made.
    """

    def __init__(self, url: str, *, cache: Path | None = None) -> None:
        try:
            found: tuple[Any, str] = cast(Any, fsspec).url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InvalidInput(f"no artifact store at {url}: {error}") from error
        self._files, root = found
        self._is_local = isinstance(self._files, LocalFileSystem)
        if not self._is_local and cache is None:
            raise InvalidInput(f"the artifact store {url} is not a local folder and needs a cache folder")
        self._root = root.rstrip("/")
        self._local = Path(root) if cache is None or self._is_local else cache
        with _failures("make"):
            (self._local / _INCOMING).mkdir(parents=True, exist_ok=True)

    def put(self, path: Path) -> Artifact:
        """Keep a copy of a file. Putting the same content again changes nothing.

        Raises:
            InvalidInput: the file cannot be read, or is empty.
            RegistryFailed: the store cannot be written.
        """
        try:
            source = path.open("rb")
        except OSError as error:
            raise InvalidInput(f"cannot read {path}: {error.strerror}") from error
        with source, _failures("write to"), self._part() as (part, copy):
            sha256, size_bytes = _copy(source, copy)
            if not size_bytes:
                raise InvalidInput(f"{path} is empty")
            artifact = Artifact(sha256=sha256, size_bytes=size_bytes)
            if not self._is_whole(artifact):
                self._publish(part, sha256)
        return artifact

    def fetch(self, sha256: str) -> Path:
        """A local file with that content. Read it only.

        Raises:
            NotFound: there is none.
            ArtifactCorrupt: what the store has is something else.
            RegistryFailed: the store cannot be read.
        """
        if not _SHA256.fullmatch(sha256):
            raise InvalidInput(f"{sha256[:80]!r} is not a SHA-256")
        local = self._local / _place(sha256)
        if not self._is_local and not local.exists():
            self._download(sha256, local)
        if not local.exists():
            raise NotFound(f"artifact {sha256[:12]} is not in the store; add the model again")
        with _failures("read"), local.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            if not self._is_local:
                local.unlink(missing_ok=True)  # the next attempt fetches it anew
            raise ArtifactCorrupt(sha256, f"its content has the hash {found[:12]}")
        return local

    def sweep(self) -> None:
        """Remove what crashes left behind. Call it only while nobody else puts files in."""
        for part in (self._local / _INCOMING).iterdir():
            part.unlink(missing_ok=True)

    def keep_only(self, named: Collection[str]) -> tuple[str, ...]:
        """Remove all files from a folder but these; what was removed. Nobody else may put files in meanwhile.

        Objects of a bucket stay: others may keep theirs there.
        """
        if not self._is_local:
            return ()
        removed: list[str] = []
        with _failures("tidy"):
            for path in self._local.glob("[0-9a-f][0-9a-f]/*"):
                if _SHA256.fullmatch(path.name) and path.name not in named:
                    path.unlink()
                    removed.append(path.name)
        return tuple(removed)

    def _is_whole(self, artifact: Artifact) -> bool:
        """Whether the store has it already; a damaged file is replaced."""
        if not self._is_local:
            address = f"{self._root}/{_place(artifact.sha256)}"
            return self._files.exists(address) and self._files.size(address) == artifact.size_bytes
        try:
            return self.fetch(artifact.sha256).stat().st_size == artifact.size_bytes
        except (NotFound, ArtifactCorrupt):
            return False

    def _publish(self, part: Path, sha256: str) -> None:
        if self._is_local:
            _rename(part, self._local / _place(sha256))
        else:
            self._files.put_file(str(part), f"{self._root}/{_place(sha256)}")

    def _download(self, sha256: str, local: Path) -> None:
        address = f"{self._root}/{_place(sha256)}"
        with _failures("read"):
            if not self._files.exists(address):
                return
            with self._part() as (part, copy), self._files.open(address, "rb") as source:
                found, _ = _copy(source, copy)
                if found == sha256:
                    _rename(part, local)
        if found != sha256:
            raise ArtifactCorrupt(sha256, f"its content has the hash {found[:12]}")

    @contextmanager
    def _part(self) -> Generator[tuple[Path, BinaryIO]]:
        """A file to be filled and renamed; it goes away if it was not."""
        descriptor, name = tempfile.mkstemp(dir=self._local / _INCOMING)
        try:
            with os.fdopen(descriptor, "wb") as copy:
                yield Path(name), copy
        finally:
            Path(name).unlink(missing_ok=True)


def _place(sha256: str) -> str:
    return f"{sha256[:2]}/{sha256}"


def _copy(source: Any, copy: BinaryIO) -> tuple[str, int]:
    """Copies to the disk, not merely to its cache; hash and size of what was copied."""
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK_BYTES):
        digest.update(chunk)
        copy.write(chunk)
    copy.flush()
    os.fsync(copy.fileno())
    return digest.hexdigest(), copy.tell()


def _rename(part: Path, final: Path) -> None:
    final.parent.mkdir(exist_ok=True)
    part.chmod(0o444)
    part.replace(final)
    for folder in (final.parent, final.parent.parent):  # so that the names survive a power cut, too
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _failures(doing: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise RegistryFailed(f"cannot {doing} the artifact store: {error.strerror or error}") from error
