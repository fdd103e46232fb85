"""What a container may use: CPU quota and memory limit of this process's control group (v1 and v2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """``cores``: CPU seconds per second; None where nothing limits."""

    cores: float | None
    memory_bytes: int | None


def _limits(root: Path, path: str, *files: str) -> Iterator[tuple[float, ...]]:
    """The numbers in ``files`` of the group and of all groups above it: a limit anywhere on the way applies.

    Inside a container ``path`` often names a directory of the host, which is not there; then the
    container sees its own group at ``root``.
    """
    directory = root / path.strip("/")
    for group in (directory, *directory.parents):
        texts = [(group / file).read_text() for file in files if (group / file).is_file()]
        words = [word for text in texts for word in text.split()]
        if texts and not {"max", "-1"} & set(words):
            yield tuple(float(word) for word in words)
        if group == root:
            return


def read_limits(membership: str, root: Path = CGROUP_ROOT) -> Limits:
    """The tightest limits that apply.

    Args:
        membership: the text of ``/proc/self/cgroup``, lines ``number:controllers:path``.
        root: where control groups are mounted.
    """
    cores: list[float] = []
    memory: list[float] = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            cores += [limit[0] / limit[1] for limit in _limits(root, path, "cpu.max")]
            memory += [limit[0] for limit in _limits(root, path, "memory.max")]
        if "cpu" in controllers.split(","):
            quotas = _limits(root / "cpu", path, "cpu.cfs_quota_us", "cpu.cfs_period_us")
            cores += [quota / period for quota, period in quotas]
        if "memory" in controllers.split(","):
            memory += [limit[0] for limit in _limits(root / "memory", path, "memory.limit_in_bytes")]
    return Limits(cores=min(cores, default=None), memory_bytes=int(min(memory)) if memory else None)


def own_limits() -> Limits:
    """The limits of this process; none where there are no control groups."""
    try:
        membership = Path("/proc/self/cgroup").read_text()
    except FileNotFoundError:
        return Limits(cores=None, memory_bytes=None)
    return read_limits(membership)
