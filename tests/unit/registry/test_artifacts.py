"""What was put in comes out unchanged, or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import fsspec
import pytest

from forescale.core.errors import ArtifactCorrupt, InvalidInput, NotFound, RegistryFailed
from forescale.registry.artifacts import ArtifactStore

CONTENT = b"weights" * 400_000  # several chunks


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt2"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "folder":
        return ArtifactStore(str(tmp_path / "store"))
    return ArtifactStore(f"memory://{tmp_path}/store", cache=tmp_path / "cache")


def test_what_is_put_in_comes_out(store: ArtifactStore, file: Path) -> None:
    artifact = store.put(file)
    assert artifact.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert artifact.size_bytes == len(CONTENT)
    file.write_bytes(b"changed afterwards")
    assert store.fetch(artifact.sha256).read_bytes() == CONTENT


def test_the_same_content_is_kept_once(store: ArtifactStore, file: Path, tmp_path: Path) -> None:
    assert store.put(file) == store.put(file)
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path != file]
    assert len(kept) <= 1  # the bucket's is not on this disk until it is fetched


def test_a_damaged_file_is_an_error_and_is_mended_by_adding_it_again(tmp_path: Path, file: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    sha256 = store.put(file).sha256
    kept = store.fetch(sha256)
    kept.chmod(0o644)
    kept.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(ArtifactCorrupt, match="add the model again"):
        store.fetch(sha256)
    store.put(file)
    assert store.fetch(sha256).read_bytes() == CONTENT


def test_a_bucket_s_object_is_verified_when_it_comes_and_when_it_is_read_again(
    tmp_path: Path, file: Path
) -> None:
    store = ArtifactStore(f"memory://{tmp_path}/store", cache=tmp_path / "cache")
    sha256 = store.put(file).sha256
    local = store.fetch(sha256)
    local.chmod(0o644)
    local.write_bytes(b"damaged copy")
    with pytest.raises(ArtifactCorrupt):
        store.fetch(sha256)
    assert store.fetch(sha256).read_bytes() == CONTENT
    local.unlink()
    fsspec.filesystem("memory").pipe_file(f"{tmp_path}/store/{sha256[:2]}/{sha256}", b"damaged object")
    with pytest.raises(ArtifactCorrupt):
        store.fetch(sha256)
    assert not local.exists()


def test_what_is_not_there_is_said(store: ArtifactStore) -> None:
    with pytest.raises(NotFound):
        store.fetch("0" * 64)


@pytest.mark.parametrize("address", ["../../etc/passwd", "", "A" * 64, "0" * 63])
def test_only_hashes_are_addresses(store: ArtifactStore, address: str) -> None:
    with pytest.raises(InvalidInput, match="not a SHA-256"):
        store.fetch(address)


def test_wrong_files(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, said in (("missing", "No such file"), ("empty", "is empty"), (".", "Is a directory")):
        with pytest.raises(InvalidInput, match=said):
            store.put(tmp_path / name)


def test_what_a_crash_left_is_swept_away(tmp_path: Path, file: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    kept = store.fetch(store.put(file).sha256)
    left = tmp_path / "store" / "incoming" / "tmp1234"
    left.write_bytes(b"half a mod")
    store.sweep()
    assert not left.exists()
    assert kept.exists()


def test_wrong_places(tmp_path: Path, file: Path) -> None:
    with pytest.raises(InvalidInput, match="no artifact store at"):
        ArtifactStore("nothing://like/this")
    with pytest.raises(InvalidInput, match="cache"):
        ArtifactStore("memory://bucket")
    with pytest.raises(RegistryFailed, match="cannot make the artifact store"):
        ArtifactStore(str(file))


def test_a_bucket_is_left_alone_since_others_may_use_it(
    store: ArtifactStore, file: Path, tmp_path: Path
) -> None:
    sha256 = store.put(file).sha256
    removed = store.keep_only(())
    assert removed == ((sha256,) if (tmp_path / "store").exists() else ())
    (tmp_path / "store" / "ab").mkdir(parents=True, exist_ok=True)
    (tmp_path / "store" / "ab" / "notes.txt").write_text("not an artifact")
    assert store.keep_only(()) == ()
