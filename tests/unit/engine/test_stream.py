"""The channel between processes of one machine: messages out of portions, and both its ends."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from forescale.core.errors import ChannelFailed, PeerGone
from forescale.engine.serve.link import ReplicaLink
from forescale.engine.serve.messages import Beat, Credit, FromReplica, Result, Tensor
from forescale.engine.stream import Decoder, StreamChannel, encode
from forescale.engine.wire import HEADER_LIMIT_BYTES

LARGE_BYTES = 3_000_001  # more than is read at once


def whole(header: dict, frames: list[bytes]) -> bytes:
    return b"".join(encode(header, frames))


def decoded(stream: bytes, portions: list[int]) -> list[tuple[dict, list[bytes]]]:
    """What comes out if the stream arrives in such portions, the last of them again and again."""
    decoder, at, found = Decoder(), 0, []
    while at < len(stream):
        wanted = portions.pop(0) if len(portions) > 1 else portions[0]
        room = decoder.buffer()
        part = stream[at : at + min(wanted, len(room))]
        room[: len(part)] = part
        found += [(header, [bytes(frame) for frame in frames]) for header, frames in decoder.came(len(part))]
        at += len(part)
    return found


HEADERS = st.dictionaries(st.text(max_size=5), st.integers(0, 1 << 40) | st.text(max_size=20), max_size=4)
FRAMES = st.lists(st.binary(max_size=70) | st.sampled_from([b"x" * 300_000, b"y" * (1 << 18)]), max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    messages=st.lists(st.tuples(HEADERS, FRAMES), min_size=1, max_size=5),
    portions=st.lists(st.integers(1, 100_000), min_size=1, max_size=20).map(lambda sizes: [*sizes, 65_536]),
)
def test_messages_survive_any_portions(messages: list[tuple[dict, list[bytes]]], portions: list[int]) -> None:
    stream = b"".join(whole(header, frames) for header, frames in messages)
    assert decoded(stream, portions) == messages


def test_frames_are_writable_aligned_and_their_message_s_own() -> None:
    stream = whole({"n": 1}, [b"abc", np.arange(5.0).tobytes()]) + whole({"n": 2}, [b"zzz"])
    decoder = Decoder()
    decoder.buffer()[: len(stream)] = stream
    (_, (text, values)), (_, (other,)) = decoder.came(len(stream))
    array = np.frombuffer(values, np.float64)
    assert array.flags.aligned
    array[0] = 7  # torch wants memory that it may write
    text[0:1] = b"X"
    assert (bytes(text), bytes(other), array.tolist()) == (b"Xbc", b"zzz", [7, 1, 2, 3, 4])


@pytest.mark.parametrize(
    "stream",
    [
        b"GET / HTTP/1.1\r\n\r\n      ",
        struct.pack("<QQ", 8, 1 << 50) + bytes(16),  # more than there is memory
        struct.pack("<QQ", 16, 32) + b"\xc1" * 16,  # no msgpack
        struct.pack("<QQ", 2, 32) + b"\x01\x02" + bytes(14),  # no header
        struct.pack("<QQ", 4, 32) + b"\x92\x80\x91\x64" + bytes(12),  # a frame that is not there
    ],
)
def test_nonsense_is_an_error(stream: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - what it says differs
        decoded(stream, [len(stream)])


def test_header_above_the_limit_is_refused_before_it_is_sent() -> None:
    with pytest.raises(ValueError, match="frames"):
        encode({"text": "x" * HEADER_LIMIT_BYTES})


class Site:
    """A link, what it heard, and workers in threads."""

    def __init__(self, path: Path) -> None:
        self.link = ReplicaLink(path)
        self.heard: list[tuple[str, FromReplica, list[bytes]]] = []
        self._news = asyncio.Event()
        self.link.listen(self._hear)

    def _hear(self, name: str, said: FromReplica, frames: tuple[memoryview, ...]) -> None:
        self.heard.append((name, said, [bytes(frame) for frame in frames]))
        self._news.set()

    def reaches(self, name: str) -> bool:
        try:
            self.link.send(name, {"type": "drain"})
        except PeerGone:
            return False
        return True

    async def until(self, messages: int) -> None:
        while len(self.heard) < messages:
            self._news.clear()
            await self._news.wait()

    async def connect(self, name: str) -> StreamChannel:
        """A channel whose name has been heard."""
        channel = await asyncio.to_thread(StreamChannel, self.link.invitation, name)
        channel.send(Beat().to_header())
        await self.until(len(self.heard) + 1)
        return channel


def run(path: Path, test: Callable[[Site], Awaitable[None]]) -> None:
    @contextlib.asynccontextmanager
    async def site() -> AsyncGenerator[Site]:
        made = Site(path / "s")
        await made.link.open()
        try:
            yield made
        finally:
            made.link.close()

    async def bounded() -> None:
        async with asyncio.timeout(60), site() as made:
            await test(made)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(bounded())


def test_large_frames_pass_both_ways_while_both_ends_send(tmp_path: Path) -> None:
    big = np.random.default_rng(0).bytes(LARGE_BYTES)

    async def test(site: Site) -> None:
        channel = await site.connect("w")
        got: list[bytes] = []

        def work() -> None:
            for number in range(3):
                outputs = (Tensor(name="y", datatype="UINT8", shape=(LARGE_BYTES,)),)
                channel.send(Result(batch=number, seconds=0.0, outputs=outputs).to_header(), [big])
            for _ in range(3):
                message = channel.receive()
                assert message is not None
                got.append(bytes(message.frames[0]))

        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(3):
            site.link.send("w", {"type": "run"}, [big])
        await site.until(4)
        await asyncio.to_thread(thread.join)
        assert got == [big] * 3
        assert [frames for _, _, frames in site.heard[1:]] == [[big]] * 3
        channel.close()

    run(tmp_path, test)


def test_what_was_sent_before_the_end_is_heard_and_then_nobody_is_there(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        channel = await site.connect("w")
        channel.send(Credit(n=2).to_header())
        channel.close()
        await site.until(2)
        assert site.heard[-1][:2] == ("w", Credit(n=2))
        while site.reaches("w"):
            await asyncio.sleep(0)
        assert not site.reaches("nobody")

    run(tmp_path, test)


def test_a_worker_notices_the_end_of_the_other_end_after_reading_what_it_said(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        channel = await site.connect("w")
        assert await asyncio.to_thread(channel.receive, 0.01) is None
        site.link.send("w", {"type": "drain"})
        site.link.close()
        message = await asyncio.to_thread(channel.receive)
        assert message is not None
        assert message.header == {"type": "drain"}
        with pytest.raises(PeerGone):
            await asyncio.to_thread(channel.receive)
        with pytest.raises(PeerGone):
            channel.send(Beat().to_header())
        channel.close()

    run(tmp_path, test)


def test_whoever_connects_again_takes_over_the_name(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        first = await site.connect("w")
        second = await site.connect("w")
        first.close()
        site.link.send("w", {"type": "drain"})
        assert (await asyncio.to_thread(second.receive)) is not None
        site.link.send("w", {"type": "drain"})  # also after the loop has seen the end of the first
        assert (await asyncio.to_thread(second.receive)) is not None
        second.close()

    run(tmp_path, test)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n      ", whole({"type": "beat"}, [])])
def test_a_stranger_is_shown_out_and_others_stay(tmp_path: Path, said: bytes) -> None:
    async def test(site: Site) -> None:
        channel = await site.connect("w")
        with capture_logs() as logs:
            reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
            writer.write(said)
            assert await reader.read() == b""
            writer.close()
        assert [line["event"] for line in logs] == ["peer_dropped"]
        channel.send(Credit(n=1).to_header())
        await site.until(2)
        channel.close()

    run(tmp_path, test)


def test_a_socket_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    async def test() -> None:
        with pytest.raises(ChannelFailed, match="cannot listen at"):
            await ReplicaLink(tmp_path / "absent" / "s").open()

    asyncio.run(test())


def test_nobody_to_connect_to_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(PeerGone, match="gone"):
        StreamChannel(ReplicaLink(tmp_path / "s").invitation, "w")
