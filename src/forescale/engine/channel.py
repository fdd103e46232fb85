"""The one authenticated channel between the coordinator and its workers.

ZeroMQ over TCP with CURVE: a fresh server key and a fresh client key per run. The client's secret key is the
run's secret; it reaches workers over their standard input, and nobody without it can send or read a byte.
Processes of one machine that must be quick have ``engine/stream.py`` instead.

A message is a msgpack header and raw buffers ("frames"), which are neither copied when sent (above 64 KiB)
nor when received. ``engine/tensors.py`` turns tensors into frames; this module knows nothing about them.
Queues are unbounded, so that sending never waits for a peer that hangs. Use a channel from one thread.
"""

from __future__ import annotations

import hmac
import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, cast

import zmq
from zmq.utils import z85

from forescale.core.errors import ChannelFailed, PeerGone
from forescale.engine.wire import Frame, Invitation, Message, pack, unpack

_ZAP_ADDRESS = "inproc://zeromq.zap.01"  # where libzmq asks whether a key may connect (ZeroMQ RFC 27)
_ZAP_DOMAIN = b"forescale"
_PARTINGS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Waitable(Protocol):
    """Something with a file descriptor that becomes readable."""

    def fileno(self) -> int: ...


class ChannelServer:
    """The coordinator's side: any number of workers, each known by its name.

    Args:
        host: address of the interface to listen on, as workers reach it.

    Attributes:
        invitation: what workers need to connect.

    Raises:
        ChannelFailed: this pyzmq has no CURVE, or the address cannot be bound.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._context = zmq.Context()
        self._gate: threading.Thread | None = None
        self._router = self._context.socket(zmq.ROUTER)
        _configure(self._router)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to nobody is an error, not silence
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a restarted worker takes over its name
        try:
            self.invitation = self._listen(host)
        except zmq.ZMQError as error:
            self.close()
            raise ChannelFailed(f"cannot listen on {host}: {error.strerror}") from error

    def _listen(self, host: str) -> Invitation:
        if not zmq.has("curve"):
            self.close()
            raise ChannelFailed("this pyzmq was built without CURVE encryption; install pyzmq's own wheel")
        server_key, server_secret = zmq.curve_keypair()
        public_key, secret_key = zmq.curve_keypair()
        gate = self._context.socket(zmq.REP)
        gate.bind(_ZAP_ADDRESS)
        self._gate = threading.Thread(target=_admit, args=(gate, z85.decode(public_key)), daemon=True)
        self._gate.start()
        self._router.setsockopt(zmq.CURVE_SERVER, 1)
        self._router.setsockopt(zmq.CURVE_SECRETKEY, server_secret)
        self._router.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
        self._router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        port = self._router.bind_to_random_port(f"tcp://{host}")
        return Invitation(
            address=f"tcp://{host}:{port}",
            server_key=server_key.decode(),
            public_key=public_key.decode(),
            secret_key=secret_key.decode(),
        )

    def send(self, to: str, header: Mapping[str, Any], frames: Sequence[Frame] = ()) -> zmq.MessageTracker:
        """Send without waiting.

        Frames above 64 KiB are not copied: leave their memory as it is until the returned tracker is ``done``
        (``wait(timeout_s)`` waits for it).

        Raises:
            PeerGone: no worker of that name is connected.
            ValueError: the header is larger than ``HEADER_LIMIT_BYTES``.
        """
        packed = pack(header)
        try:
            self._router.send(to.encode(), zmq.SNDMORE)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            raise PeerGone(f"{to} is not connected") from error
        return _send(self._router, packed, frames)

    def poll(self, timeout_s: float | None, *others: Waitable) -> bool:
        """Wait until a message is here or one of ``others`` is readable.

        Args:
            timeout_s: wait at most this long (None: for ever).

        Returns:
            Whether a message is here.
        """
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        for other in others:
            poller.register(other.fileno(), zmq.POLLIN)
        return any(ready is self._router for ready, _ in poller.poll(_milliseconds(timeout_s)))

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message, or None after ``timeout_s`` (None: wait for ever).

        A malformed message is logged and dropped.
        """
        deadline_s = _deadline_s(timeout_s)
        while self.poll(deadline_s - time.monotonic()):
            identity, *parts = self._router.recv_multipart(copy=False)
            sender = identity.bytes.decode(errors="replace")
            try:
                return _message(sender, parts)
            except ValueError as error:
                import structlog  # noqa: PLC0415 - no worker needs its 60 ms of import

                structlog.get_logger().error("message_dropped", sender=sender, reason=str(error))
        return None

    def close(self, linger_s: float = 1.0) -> None:
        """Close, giving unsent messages ``linger_s`` to leave. Harmless the second time."""
        self._router.close(_milliseconds(linger_s))
        self._context.term()
        if self._gate is not None:
            self._gate.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Channel:
    """A worker's side.

    A connection that broke is not mended: what either side knew about the other is lost with it.

    Args:
        invitation: from the coordinator's ``ChannelServer``.
        name: this process's address; unique among living processes.
    """

    def __init__(self, invitation: Invitation, name: str) -> None:
        self.name = name
        self._context = zmq.Context()
        self._gone = False
        self._dealer = self._context.socket(zmq.DEALER)
        _configure(self._dealer)
        self._dealer.setsockopt(zmq.IDENTITY, name.encode())
        self._dealer.setsockopt(zmq.CURVE_SERVERKEY, invitation.server_key.encode())
        self._dealer.setsockopt(zmq.CURVE_PUBLICKEY, invitation.public_key.encode())
        self._dealer.setsockopt(zmq.CURVE_SECRETKEY, invitation.secret_key.encode())
        self._partings = self._dealer.get_monitor_socket(_PARTINGS)
        self._dealer.connect(invitation.address)

    def send(self, header: Mapping[str, Any], frames: Sequence[Frame] = ()) -> zmq.MessageTracker:
        """Send to the coordinator without waiting.

        Frames above 64 KiB are not copied: leave their memory as it is until the returned tracker is ``done``
        (``wait(timeout_s)`` waits for it).

        Raises:
            PeerGone: the coordinator vanished or refused the connection.
            ValueError: the header is larger than ``HEADER_LIMIT_BYTES``.
        """
        packed = pack(header)
        if self._partings.poll(0):
            self._part()
        return _send(self._dealer, packed, frames)

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The coordinator's next message, or None after ``timeout_s`` (None: wait for ever).

        Raises:
            PeerGone: the coordinator vanished or refused the connection; what it had sent has been received.
            ChannelFailed: the message is malformed.
        """
        poller = zmq.Poller()
        poller.register(self._dealer, zmq.POLLIN)
        poller.register(self._partings, zmq.POLLIN)
        ready = poller.poll(_milliseconds(timeout_s))
        if self._dealer.poll(0):
            try:
                return _message("", self._dealer.recv_multipart(copy=False))
            except ValueError as error:
                raise ChannelFailed(f"the coordinator's message makes no sense: {error}") from error
        if ready:
            self._part()
        return None

    def close(self, linger_s: float = 30.0) -> None:
        """Close, giving unsent messages ``linger_s`` to leave. Harmless the second time."""
        if self._dealer.closed:
            return
        self._dealer.disable_monitor()
        self._partings.close(0)
        self._dealer.close(0 if self._gone else _milliseconds(linger_s))
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _part(self) -> None:
        # The report stays unread, so that every later call raises as well.
        self._gone = True
        raise PeerGone("the coordinator is gone or refused the connection")


def _admit(gate: zmq.Socket[bytes], public_key: bytes) -> None:
    """Answer libzmq's questions who may connect, until the context ends: who has the run's client key."""
    with gate:
        while True:
            try:
                version, request, _domain, _peer, _identity, mechanism, *credentials = gate.recv_multipart()
            except zmq.ContextTerminated:
                return
            known = mechanism == b"CURVE" and hmac.compare_digest(credentials[0], public_key)
            status = (b"200", b"OK") if known else (b"400", b"unknown key")
            gate.send_multipart((version, request, *status, b"", b""))


def _configure(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    # The kernel's keep-alive notices a dead machine and, unlike ZeroMQ's heartbeats, lets a process pause.
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 5)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 6)


def _send(socket: zmq.Socket[bytes], header: bytes, frames: Sequence[Frame]) -> zmq.MessageTracker:
    socket.send(header, zmq.SNDMORE if frames else 0)
    last = len(frames) - 1
    return zmq.MessageTracker(
        *(
            socket.send(frame, 0 if number == last else zmq.SNDMORE, copy=False, track=True)
            for number, frame in enumerate(frames)
        )
    )


def _message(sender: str, parts: Sequence[zmq.Frame]) -> Message:
    """Decode; ValueError if it is not a header and frames."""
    if not parts:
        raise ValueError("no header")
    header = unpack(parts[0].buffer)
    if not isinstance(header, dict):
        raise ValueError("the header is not a mapping")
    frames = tuple(part.buffer for part in parts[1:])
    return Message(sender=sender, header=cast(dict[str, Any], header), frames=frames)


def _deadline_s(timeout_s: float | None) -> float:
    return math.inf if timeout_s is None else time.monotonic() + timeout_s


def _milliseconds(timeout_s: float | None) -> int | None:
    if timeout_s is None or timeout_s == math.inf:
        return None
    return max(0, math.ceil(timeout_s * 1000))
