"""Load on a server: ``wrk`` with a fixed number of connections, each with one request at a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = """\
local file = io.open("{body}", "rb")
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
{headers}
function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\\nRESULT {{"requests": %d, "microseconds": %d, "p50": %d, "p99": %d, "refused": %d, "broken": %d}}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), errors.status,
    errors.connect + errors.read + errors.write + errors.timeout))
end
"""


class NoWrk(Exception):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What ``wrk`` saw.

    Attributes:
        failed: answers with another status than 2xx and 3xx, and broken connections.
    """

    requests: int
    per_s: float
    median_s: float
    p99_s: float
    failed: int


def check_wrk() -> None:
    """Raises ``NoWrk`` if it is not installed."""
    if shutil.which("wrk") is None:
        raise NoWrk("the load comes from wrk, which is not installed: apt-get install wrk")


def wrk(
    url: str,
    body: bytes,
    *,
    connections: int,
    seconds: float,
    headers: Mapping[str, str] | None = None,
) -> Load:
    """Load for so many (whole) seconds.

    Raises:
        RuntimeError: wrk could not run.
    """
    fields = {"Content-Type": "application/json", **(headers or {})}
    with tempfile.TemporaryDirectory() as folder:
        body_path, script = Path(folder) / "body", Path(folder) / "load.lua"
        body_path.write_bytes(body)
        lines = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in fields.items())
        script.write_text(_SCRIPT.format(body=body_path, headers=lines))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"]
        done = subprocess.run([*command, "-s", str(script), url], capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(f"wrk failed: {done.stderr.strip() or done.stdout.strip()}")
    told = json.loads(line.removeprefix("RESULT "))
    return Load(
        requests=told["requests"],
        per_s=told["requests"] / (told["microseconds"] / 1e6),
        median_s=told["p50"] / 1e6,
        p99_s=told["p99"] / 1e6,
        failed=told["refused"] + told["broken"],
    )
