"""How long a replica takes from the order to service, with a warm spare and without; what it adds per batch.

python benchmarks/bench_replicas.py [--repeats 3] [--out FILE.md]
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from table import environment, write_table
from torch import nn

from forescale.core.cluster import Device, DeviceKind
from forescale.engine.channel import ChannelServer, Frame
from forescale.engine.local import LocalBackend
from forescale.engine.serve.arrays import pack
from forescale.engine.serve.crew import Crew
from forescale.engine.serve.messages import Header, Load, Result, Run, address, from_replica
from forescale.engine.serve.roster import CrewEvent, CrewRules, Lost, Ready

CORE = min(os.sched_getaffinity(0))
CPU = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=8 << 30, cores=(CORE,))
WIDTH, TOKENS, ROWS = 256, 64, 8
BATCHES = 60


def encoder(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


def export(model: nn.Module, example: torch.Tensor, path: Path) -> Load:
    rows = torch.export.Dim("rows", min=1, max=256)
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=({0: rows},)), path)
    return Load(model=path.stem, version="1", format="pt2", path=str(path), max_rows=256)


class Site:
    """A crew with its channel, and a loop that waits for what is asked."""

    def __init__(self, folder: Path, spares: int) -> None:
        self.server = ChannelServer()
        self._backend = LocalBackend(invitation=self.server.invitation, log_dir=folder)
        self.crew = Crew(
            self._backend,
            lambda to, message: self.say(to, message.to_header()),
            [CPU],
            CrewRules(spares=spares),
        )
        self.results: list[Result] = []
        self._pids: dict[str, int] = {}

    def close(self) -> None:
        self.crew.close()
        self.server.close()

    def say(self, to: str, header: Header, frames: Sequence[Frame] = ()) -> None:
        process, _, replica = to.partition("/")
        self.server.send(process, {**header, "to": replica} if replica else header, frames)

    def turn(self) -> tuple[CrewEvent, ...]:
        self.server.poll(0.05, self.crew)
        while message := self.server.receive(0):
            said = from_replica(message.header)
            if said is None:
                self._pids[message.sender] = message.header["pid"]
            if isinstance(said, Result):
                self.results.append(said)
            replica = message.header.get("from")
            sender = address(message.sender, replica) if replica else message.sender
            self.crew.heard(sender, said, time.monotonic())
        return self.crew.poll(time.monotonic())

    def until(self, done: Callable[[tuple[CrewEvent, ...]], bool]) -> float:
        start_s = time.perf_counter()
        while not done(self.turn()):
            pass
        return time.perf_counter() - start_s

    def warm(self) -> None:
        self.until(lambda _: self.crew.spares() > 0)

    def serve(self, load: Load) -> tuple[str, float]:
        start_s = time.perf_counter()
        name = self.crew.place(load, CPU.name, time.monotonic())
        self.until(lambda events: any(isinstance(event, Ready) for event in events))
        return name, time.perf_counter() - start_s

    def lose(self, name: str) -> float:
        """Kill a replica's process; seconds until another serves in its place."""
        start_s = time.perf_counter()
        os.kill(self._pids[self.process(name)], signal.SIGKILL)
        self.until(lambda events: any(isinstance(event, Lost) for event in events))
        self.until(lambda events: any(isinstance(event, Ready) for event in events))
        return time.perf_counter() - start_s

    def process(self, name: str) -> str:
        return next(replica.process for replica in self.crew.replicas() if replica.name == name) or ""

    def batches_s(self, name: str, x: np.ndarray, batches: int) -> float:
        """Seconds for so many batches, of which two are always at the replica."""
        tensors, frames = pack({"src": x})
        process = self.process(name)
        self.results.clear()
        start_s = time.perf_counter()
        sent = 0
        while len(self.results) < batches:
            while sent < min(batches, len(self.results) + 2):
                self.say(address(process, name), Run(batch=sent, inputs=tensors).to_header(), frames)
                sent += 1
            self.turn()
        return time.perf_counter() - start_s


def starts(load: Load, folder: Path, repeats: int) -> list[float]:
    """Median seconds from order to service: without a spare, from one, and after a kill beside one."""
    cold_s, warm_s, again_s = [], [], []
    for _ in range(repeats):
        site = Site(folder, spares=0)
        cold_s.append(site.serve(load)[1])
        site.close()
        site = Site(folder, spares=1)
        site.warm()
        name, seconds = site.serve(load)
        warm_s.append(seconds)
        site.warm()
        again_s.append(site.lose(name))
        site.close()
    return [statistics.median(seconds) for seconds in (cold_s, warm_s, again_s)]


def throughput(load: Load, folder: Path, repeats: int) -> tuple[float, float]:
    """Batches per second: the program in a bare loop in this process, and through a replica, in turn."""
    x = torch.randn(ROWS, TOKENS, WIDTH)
    program = torch.export.load(load.path).module()
    site = Site(folder, spares=0)
    name, _ = site.serve(load)
    bare, served = [], []
    for _ in range(repeats):
        with torch.inference_mode():
            start_s = time.perf_counter()
            for _ in range(BATCHES):
                program(x)
            bare.append(BATCHES / (time.perf_counter() - start_s))
        served.append(BATCHES / site.batches_s(name, x.numpy(), BATCHES))
    site.close()
    return statistics.median(bare), statistics.median(served)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "replicas.md")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cases = [
            ("classifier, 64-10", export(nn.Linear(64, 10).eval(), torch.zeros(2, 64), folder / "a.pt2")),
            (
                "transformer, 8 layers",
                export(encoder(layers=8), torch.zeros(2, TOKENS, WIDTH), folder / "b.pt2"),
            ),
            (
                "one matrix, 10,000 x 10,000",
                export(nn.Linear(10_000, 10_000).eval(), torch.zeros(2, 10_000), folder / "c.pt2"),
            ),
        ]
        for what, load in cases:
            cold_s, warm_s, again_s = starts(load, folder / "logs", arguments.repeats)
            size = Path(load.path).stat().st_size / 1e6
            rows.append((f"{what}, {size:.1f} MB: without a spare", f"{cold_s:.2f} s", ""))
            rows.append(("... from a warm spare", f"{warm_s:.2f} s", "< 1 s"))
            rows.append(("... after kill -9, with a warm spare", f"{again_s:.2f} s", "< 1 s"))
        bare, served = throughput(cases[1][1], folder / "logs", arguments.repeats)
        rows.append((f"transformer, batches of {ROWS} x {TOKENS}, bare loop", f"{bare:.2f} per s", ""))
        rows.append(("... through a replica", f"{served:.2f} per s", ""))
        rows.append(("... share", f"{served / bare:.3f}", "≥ 0.97"))
    measured_on = environment(seed=0, threads="1 per process", repeats=f"{arguments.repeats}, medians")
    write_table(arguments.out, "Replicas", measured_on, ("", "measured", "asked"), rows)


if __name__ == "__main__":
    main()
