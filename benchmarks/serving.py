"""Every figure of serving, beside other servers where they have the same.

    python benchmarks/serving.py --peers FOLDER [--only throughput,overload] [--quick] [--out FOLDER]

The other servers are installed into environments of their own in FOLDER, once. Needs wrk. Takes 16 minutes
after that, on a machine that does nothing else. If interrupted it leaves no process, and what was measured
before is kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from serving_faults import killed_controller, killed_replicas, version_changes
from serving_growth import many_models, memory, starts
from serving_load import NoWrk, check_wrk
from serving_overload import overload
from serving_results import Results, Section, load_average, show
from serving_throughput import Bench, throughput, transformer_share

from serving_processes import Processes

PARTS: dict[str, Callable[[Bench], Section]] = {
    "throughput": throughput,
    "transformer": transformer_share,
    "memory": memory,
    "models": many_models,
    "starts": starts,
    "overload": overload,
    "replicas": killed_replicas,
    "controller": killed_controller,
    "versions": version_changes,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Every figure of serving, beside other servers.")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="of the other servers; default: without")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,...", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs, to try the script")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    try:
        check_wrk()
    except NoWrk as error:
        parser.error(str(error))
    results = Results(arguments.out)
    failed: list[str] = []
    for part in chosen:
        load_before, start_s = load_average(), time.monotonic()
        try:
            section = _run(part, arguments.peers, arguments.quick)
        except Exception:  # noqa: BLE001 - the other parts are worth measuring
            traceback.print_exc()
            failed.append(part)
            continue
        took_s = time.monotonic() - start_s
        results.keep(part, section, took_s=took_s, load_before=load_before, is_quick=arguments.quick)
        results.write(list(PARTS))
        show(section)
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def _run(part: str, environments: Path | None, is_quick: bool) -> Section:
    with tempfile.TemporaryDirectory(prefix="serving-") as folder, Processes(Path(folder)) as processes:
        home = None if environments is None else environments.resolve()
        return PARTS[part](Bench(processes=processes, environments=home, is_quick=is_quick, say=_say))


def _say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
