"""What a process was at, by what it was sent and has said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fake_processes import SIGNATURE
from forescale.engine.serve.link import ReplicaLink
from forescale.engine.serve.messages import (
    Drain,
    Failed,
    FromReplica,
    Hello,
    Load,
    Result,
    Run,
    Warm,
)
from forescale.engine.stream import Decoder

HELLO = Hello(model="a", version="1", replica="p/a", signature=SIGNATURE, max_rows=8)
LOAD = Load(model="a", version="1", format="pt2", path="m.pt2")


class Wire:
    """A link to processes that say what the test says."""

    def __init__(self, folder: Path, *processes: str) -> None:
        self.heard: list[tuple[str, FromReplica]] = []
        self.link = ReplicaLink(folder / "replicas")
        self.link.listen(lambda sender, said, _: self.heard.append((sender, said)))
        self.peers = {name: Peer(name) for name in processes}
        for name, peer in self.peers.items():
            self.link.hear(peer, {"name": name}, ())  # type: ignore[arg-type]

    def says(self, sender: str, said: FromReplica) -> None:
        process, _, replica = sender.partition("/")
        header = {**said.to_header(), "from": replica} if replica else said.to_header()
        self.link.hear(self.peers[process], header, ())  # type: ignore[arg-type]


class Peer:
    """A connection that keeps what it is sent."""

    def __init__(self, name: str) -> None:
        self.name = ""
        self.transport = self
        self.sent: list[Mapping] = []

    def is_closing(self) -> bool:
        return False

    def writelines(self, parts: list[bytes]) -> None:
        decoder = Decoder()
        whole = b"".join(parts)
        decoder.buffer()[: len(whole)] = whole
        self.sent += [header for header, _ in decoder.came(len(whole))]


def batch(number: int) -> Mapping:
    return Run(batch=number, inputs=()).to_header()


def done(number: int) -> Result:
    return Result(batch=number, seconds=0.1, outputs=())


def test_an_address_is_a_process_and_a_name_in_the_header(tmp_path: Path) -> None:
    wire = Wire(tmp_path, "p", "q", "r")
    wire.link.send("p/a", batch(1))
    wire.link.send("p", Drain().to_header())
    run, drain = wire.peers["p"].sent
    assert (run["batch"], run["to"]) == (1, "a")
    assert drain == Drain().to_header()
    wire.says("p", Warm())
    wire.says("p/a", done(1))
    assert wire.heard == [("p", Warm()), ("p/a", done(1))]


def test_a_process_is_at_the_first_of_its_tasks_that_it_has_not_answered(tmp_path: Path) -> None:
    wire = Wire(tmp_path, "p", "q", "r")
    for to, header in (
        ("p/a", LOAD.to_header()),
        ("q/z", batch(1)),
        ("p/b", batch(1)),
        ("p/c", batch(1)),
        ("p/b", Drain().to_header()),
        ("p/b", batch(2)),
    ):
        wire.link.send(to, header)
    wire.says("p/a", HELLO)
    wire.says("p/b", done(1))
    assert wire.link.ended("p") == "c"
    assert wire.link.ended("p") is None
    wire.says("p/c", done(1))  # its last words, late
    assert wire.link.ended("q") == "z"


def test_failing_is_an_answer_but_only_of_what_was_at_hand(tmp_path: Path) -> None:
    wire = Wire(tmp_path, "p", "q", "r")
    wire.link.send("p/a", batch(1))
    wire.link.send("p/b", batch(1))
    wire.says("p/a", Failed(batch=1, error="no", failure="model"))
    wire.says("p/a", Failed(error="no memory", failure="memory"))
    assert wire.link.ended("p") == "b"
    wire.link.send("r/a", batch(1))
    wire.says("r/a", done(1))
    assert wire.link.ended("r") is None
