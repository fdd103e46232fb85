"""How long a live repartition pauses training, against the bytes it moves and against checkpoint and restart.

python benchmarks/bench_pause.py [--out FILE.md]
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from forced import cut_plan, forced_run, template_of
from table import environment, write_table
from workloads import gpt_task, parameters

from forescale.engine.train.engine import TrainingEngine
from forescale.engine.train.shards import Checkpoint, checkpoint_path
from forescale.profile.devices import find_cluster

MOVES, ROWS, LENGTH, MICROBATCHES = 10, 4, 64, 2
LOOPBACK_BYTES = 64 << 20


def _loopback(rank: int, port: int, cores: tuple[int, int], results: mp.SimpleQueue) -> None:
    os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    tensor, seconds = torch.ones(LOOPBACK_BYTES, dtype=torch.uint8), []
    for _ in range(9):
        dist.barrier()
        start_s = time.perf_counter()
        work = dist.isend(tensor, 1) if rank == 0 else dist.irecv(tensor, 0)
        assert work is not None
        work.wait()
        dist.barrier()
        seconds.append(time.perf_counter() - start_s)
    if rank == 0:
        results.put(LOOPBACK_BYTES / statistics.median(seconds[2:]))
    dist.destroy_process_group()


def loopback_bytes_per_s(cores: tuple[int, int]) -> float:
    """Bandwidth of one large gloo message between two pinned processes, received into warm memory."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    peers = [context.Process(target=_loopback, args=(rank, port, cores, results)) for rank in range(2)]
    for peer in peers:
        peer.start()
    bandwidth = results.get()
    for peer in peers:
        peer.join()
    return bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pause.md")
    out = parser.parse_args().out
    cluster = find_cluster(2)
    cores = (cluster.devices[0].cores[0], cluster.devices[1].cores[0])
    before = loopback_bytes_per_s(cores)
    task = gpt_task(width=512, layers=6, rows=ROWS, length=LENGTH, count=6 * MOVES + 20)
    size = parameters(task.model)
    with tempfile.TemporaryDirectory() as folder, forced_run(task, cluster, Path(folder)) as run:
        count = len(run.graph.operators)
        early, late = (
            cut_plan(run.graph, cluster, (round(share * count),), MICROBATCHES) for share in (0.34, 0.67)
        )
        run.start(late)
        run.steps(4)
        outcome = run.steps(4 * MOVES, {4 + 4 * k: (early, late)[k % 2] for k in range(MOVES)})
        restart_s = _checkpoint_and_restart(run, task, cluster, Path(folder), late)
    after = loopback_bytes_per_s(cores)
    bandwidth = statistics.median((before, after))
    pauses = [r.pause_s for r in outcome.repartitions]
    moved = statistics.median(r.moved_bytes for r in outcome.repartitions)
    pause, limit = statistics.median(pauses), 3 * moved / bandwidth + 0.020
    rows = [
        ("model", f"{size / 1e6:.1f} M parameters, AdamW", ""),
        ("moved each time", f"{moved / 1e6:.1f} MB (parameters and optimiser state of a third)", ""),
        (
            "loopback bandwidth, this run",
            f"{bandwidth / 1e9:.2f} GB/s ({before / 1e9:.2f} before, {after / 1e9:.2f} after)",
            "",
        ),
        (
            "pause, median of 10",
            f"{pause * 1e3:.1f} ms",
            f"≤ 3 × bytes / bandwidth + 20 ms = {limit * 1e3:.1f} ms",
        ),
        ("pause, worst of 10", f"{max(pauses) * 1e3:.1f} ms", ""),
        ("checkpoint and restart", f"{restart_s:.2f} s", ""),
        ("restart / pause", f"{restart_s / pause:.0f} ×", "≥ 40 ×"),
    ]
    write_table(out, "Pause of a live repartition", environment(seed=0), ("", "measured", "asked"), rows)


def _checkpoint_and_restart(run, task, cluster, folder: Path, plan) -> float:
    """What a job without live moves pays: write, start workers again, load; without capture and profile."""
    start_s = time.perf_counter()
    step = len(run.outcome.steps)
    run.engine.checkpoint(step)
    while run.engine.busy:
        run.outcome.note(run.engine.next_event())
    written_s = time.perf_counter() - start_s
    checkpoint = Checkpoint(checkpoint_path(folder / "checkpoints", step))
    start_s = time.perf_counter()
    with TrainingEngine(cluster, folder / "again") as engine:
        engine.set_up(task, run.captured, template_of(task, run.captured))
        engine.start(plan, checkpoint)
        restarted_s = time.perf_counter() - start_s
        engine.close()
    return written_s + restarted_s


if __name__ == "__main__":
    main()
