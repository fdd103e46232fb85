from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import psutil
import pytest
import zmq

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import ChannelFailed, PeerGone
from forescale.engine.backend import ProcessSpec
from forescale.engine.channel import Channel, ChannelServer
from forescale.engine.local import LocalBackend
from forescale.engine.wire import HEADER_LIMIT_BYTES, Invitation, Message

DEADLINE_S = 60.0


@pytest.fixture
def server() -> Iterator[ChannelServer]:
    with ChannelServer() as server:
        yield server


@pytest.fixture
def worker(server: ChannelServer) -> Iterator[Channel]:
    """A connected worker named ``w``, in this process."""
    with Channel(server.invitation, "w") as worker:
        worker.send({"type": "hello"})
        assert came(server).header == {"type": "hello"}
        yield worker


def came(end: Channel | ChannelServer) -> Message:
    message = end.receive(DEADLINE_S)
    assert message is not None, "nothing came"
    return message


def packed(value: object) -> bytes:
    data = msgpack.packb(value)
    assert data is not None
    return data


def raw_dealer(context: zmq.Context, invitation: Invitation) -> zmq.Socket:
    """What somebody who has the keys but not our code could use."""
    dealer = context.socket(zmq.DEALER)
    dealer.curve_serverkey = invitation.server_key.encode()
    dealer.curve_publickey = invitation.public_key.encode()
    dealer.curve_secretkey = invitation.secret_key.encode()
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.connect(invitation.address)
    return dealer


def test_messages_keep_order_header_and_frames(server: ChannelServer, worker: Channel) -> None:
    header = {
        "type": "t",
        "int": 2**40,
        "float": 0.1,
        "none": None,
        "text": "é",
        "bytes": b"\0",
        "list": [1, {}],
    }
    for number in range(50):
        server.send("w", {**header, "number": number}, [b"", b"x" * number])
    for number in range(50):
        message = came(worker)
        assert message.sender == ""
        assert message.header == {**header, "number": number}
        assert [bytes(frame) for frame in message.frames] == [b"", b"x" * number]


def test_large_frames_arrive_intact_from_another_process(server: ChannelServer, tmp_path: Path) -> None:
    size_bytes = 64 << 20
    payload = bytearray(hashlib.shake_256(b"seed").digest(1 << 20) * (size_bytes >> 20))
    payload[-1] ^= 1
    device = Device(name="cpu0", kind=DeviceKind.CPU, memory_bytes=0)
    with LocalBackend(invitation=server.invitation, log_dir=tmp_path) as backend:
        backend.start(ProcessSpec(entry="integration.process_entries:echo", device=device))
        assert came(server).header["type"] == "connected"
        tracker = server.send("cpu0", {"type": "big"}, [payload, b"small"])
        big, small = came(server).frames
        assert tracker.done  # it has come back: nothing reads our memory any more
        assert big == payload
        assert bytes(small) == b"small"


def test_sent_memory_is_kept_alive(server: ChannelServer, worker: Channel) -> None:
    worker.send({"type": "t"}, [bytearray(b"a" * (1 << 20))])  # nobody but the channel refers to it
    assert bytes(came(server).frames[0]) == b"a" * (1 << 20)


def test_received_frames_outlive_their_message_and_channel() -> None:
    with ChannelServer() as server, Channel(server.invitation, "w") as worker:
        worker.send({"type": "t"}, [b"short", b"b" * (1 << 20)])
        short, long = came(server).frames
    assert bytes(short) == b"short"
    assert bytes(long) == b"b" * (1 << 20)
    long[0] = 0  # and they are the receiver's to change


def test_receive_gives_up_after_its_timeout(server: ChannelServer, worker: Channel) -> None:
    assert server.receive(0) is None
    assert worker.receive(0) is None
    assert server.receive(0.001) is None


def test_poll_wakes_for_another_descriptor(server: ChannelServer) -> None:
    left, right = socket.socketpair()
    with left, right:
        right.send(b"x")
        assert server.poll(DEADLINE_S, left) is False
        with Channel(server.invitation, "w") as worker:
            worker.send({})
            left.recv(1)
            assert server.poll(DEADLINE_S, left) is True


def test_sending_to_nobody_is_an_error(server: ChannelServer) -> None:
    with pytest.raises(PeerGone, match="cpu9 is not connected"):
        server.send("cpu9", {"type": "t"})


@pytest.mark.parametrize("wrong", ["client", "server"])
def test_wrong_key_gets_nothing_through(server: ChannelServer, wrong: str) -> None:
    public_key, secret_key = (key.decode() for key in zmq.curve_keypair())
    keys = (
        {"public_key": public_key, "secret_key": secret_key}
        if wrong == "client"
        else {"server_key": public_key}
    )
    with Channel(dataclasses.replace(server.invitation, **keys), "w") as intruder:
        intruder.send({"type": "forged"})
        with pytest.raises(PeerGone):
            intruder.receive(DEADLINE_S)
        with pytest.raises(PeerGone):
            intruder.send({"type": "forged again"})
        with Channel(server.invitation, "w") as worker:
            worker.send({"type": "real"})
            assert came(server).header == {"type": "real"}
            assert server.receive(0) is None


def test_no_key_gets_nothing_through(server: ChannelServer) -> None:
    context = zmq.Context()
    try:
        with context.socket(zmq.DEALER) as plain:
            plain.setsockopt(zmq.LINGER, 0)
            refusal = plain.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_DISCONNECTED)
            plain.connect(server.invitation.address)
            plain.send_multipart([packed({"type": "forged"})])
            assert refusal.poll(int(DEADLINE_S * 1000))
            plain.disable_monitor()
            refusal.close(0)
        assert server.receive(0) is None
    finally:
        context.term()


@pytest.mark.parametrize(
    "parts",
    [
        [b"\xc1"],  # a byte msgpack never uses
        [b"\x81"],  # a mapping that ends before its entry
        [b"\x80\x80"],  # two headers
        [packed([1, 2])],
        [packed({1: 2})],
        [b"\x91" * 100_000],
        [b""],
        [bytes(HEADER_LIMIT_BYTES + 1)],
    ],
    ids=["not-msgpack", "cut-off", "trailing", "list", "number-key", "deep", "empty", "too-large"],
)
def test_malformed_message_is_dropped_and_reported(
    server: ChannelServer, capsys: pytest.CaptureFixture[str], parts: list[bytes]
) -> None:
    context = zmq.Context()
    try:
        with raw_dealer(context, server.invitation) as dealer:
            dealer.send_multipart(parts)
            dealer.send_multipart([packed({"type": "fine"})])
            assert came(server).header == {"type": "fine"}
    finally:
        context.term()
    assert "message_dropped" in capsys.readouterr().out


def test_header_above_the_limit_is_refused_before_it_is_sent(server: ChannelServer, worker: Channel) -> None:
    for end in (worker.send, lambda header: server.send("w", header)):
        with pytest.raises(ValueError, match="send what is large as frames"):
            end({"blob": bytes(HEADER_LIMIT_BYTES)})
    worker.send({"type": "still fine"})
    assert came(server).header == {"type": "still fine"}


def test_worker_reads_what_was_sent_before_its_coordinator_vanished() -> None:
    with ChannelServer() as server, Channel(server.invitation, "w") as worker:
        worker.send({"type": "hello"})
        came(server)
        server.send("w", {"type": "stop"})
        server.close()
        assert came(worker).header == {"type": "stop"}
        for _ in range(2):
            with pytest.raises(PeerGone):
                worker.receive(DEADLINE_S)
        with pytest.raises(PeerGone):
            worker.send({"type": "t"})


def own_threads() -> list[str]:
    """Names of the channel library's threads; libraries that other tests use start some of their own."""
    names: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text())
    return sorted(name for name in names if name.startswith("ZMQ"))


def test_close_is_harmless_twice_and_leaks_nothing() -> None:
    def run_once() -> None:
        with ChannelServer() as server, Channel(server.invitation, "w") as worker:
            worker.send({"type": "t"}, [bytes(1 << 20)])
            came(server)
            worker.close()
            server.close()

    run_once()  # what libraries open once stays open
    before = psutil.Process().num_fds(), own_threads()
    run_once()
    deadline_s = time.monotonic() + 10.0
    # The kernel counts a thread that has been joined until it has cleared it away.
    while (after := (psutil.Process().num_fds(), own_threads())) != before and time.monotonic() < deadline_s:
        os.sched_yield()
    assert after == before


def test_address_that_is_not_ours_is_named() -> None:
    with pytest.raises(ChannelFailed, match=r"cannot listen on 192\.0\.2\.1"):
        ChannelServer("192.0.2.1")  # TEST-NET-1: nobody has it


def test_missing_encryption_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda capability: False)
    with pytest.raises(ChannelFailed, match="CURVE"):
        ChannelServer()


def test_secret_stays_out_of_texts(server: ChannelServer) -> None:
    assert server.invitation.secret_key not in repr(server.invitation)
