"""Follows one publisher of KV events over ZeroMQ: sockets around a Feed. Decides nothing.

    SUB      [topic, sequence, payload]                         live batches
    DEALER   [b"", sequence] -> [b"", topic?, sequence, payload]..., [b"", b""?, 2**64 - 1, b""]

Each question has a DEALER of its own: closing it is the only way not to hear the rest of an answer.
Sockets are read when they are readable, a few messages a turn, so that requests do not wait for
them. ZeroMQ reconnects by itself, ever less often.

Limits: MAX_PAYLOAD_BYTES a batch (ZeroMQ then drops the connection), MAX_QUEUED batches in memory
before ZeroMQ drops some, which the feed sees as a gap.

Importing this takes 50 ms: follow.py does when there is something to follow.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, Protocol

import zmq

from roost_router.kv.feed import (
    Apply,
    AskReplay,
    DropAll,
    Effect,
    Feed,
    LoadTold,
    TrustChanged,
)
from roost_router.kv.sink import KvSink
from roost_router.kv.source import KvSource, is_listening
from roost_router.kv.trust import Reason
from roost_wire.kv_dialects.dialect import KvDecodeError, LeftOut
from roost_wire.kv_events import KvEventBatch
from roost_wire.told_load import ToldLoad

_log = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES: Final = 64 << 20
MAX_QUEUED: Final = 10_000
_MAX_REPLAYED: Final = 100_000  # queued batches of an answer; vLLM drops what does not fit
_PER_TURN: Final = 8
_RECONNECT_MS: Final = 100
_MAX_RECONNECT_MS: Final = 5_000
_HEARTBEAT_MS: Final = 5_000  # of ZeroMQ itself: tells a connection that died without a word
_HEARTBEAT_TIMEOUT_MS: Final = 10_000
_END: Final = b"\xff" * 8


class Decoder(Protocol):
    """Of one dialect, for one stream."""

    left_out: Counter[LeftOut]

    def decode(self, payload: bytes, sequence: int) -> KvEventBatch:
        """KvDecodeError."""
        ...


class Subscriber:
    """One source followed. Used on the event loop only; to be closed."""

    def __init__(
        self,
        context: zmq.Context[Any],
        source: KvSource,
        decoder: Decoder,
        sink: KvSink,
        clock: Callable[[], float],
        *,
        on_load: Callable[[ToldLoad], None] = lambda _load: None,
    ) -> None:
        """Connect, or listen where the endpoint has a wildcard. zmq.ZMQError if it cannot.

        `on_load`: the replica told its load.
        """
        self.source = source
        self.feed = Feed(can_replay=source.replay_endpoint is not None)
        self.num_batches = 0
        self.num_undecodable = 0
        self._context = context
        self._decoder = decoder
        self._sink = sink
        self._clock = clock
        self._on_load = on_load
        self._loop = asyncio.get_running_loop()
        self._dealer: zmq.Socket[bytes] | None = None
        self._was_connected = False
        self._readers: dict[zmq.Socket[Any], Callable[[list[bytes]], None]] = {}
        self._sub = self._open(zmq.SUB, source.endpoint, MAX_QUEUED)
        self._sub.subscribe(source.topic)
        self._monitor = self._sub.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._read(self._sub, self._on_live)
        self._read(self._monitor, self._on_connected)
        self._carry_out(self.feed.start(clock()))

    @property
    def left_out(self) -> Counter[LeftOut]:
        """Events that were not told on."""
        return self._decoder.left_out

    @property
    def feeds(self) -> dict[int, Feed]:
        """By data-parallel rank: there is but one."""
        return {self.source.rank: self.feed}

    def tick(self) -> None:
        """Time has passed; to be called a few times a second."""
        self._carry_out(self.feed.tick(self._clock()))

    def restarted(self) -> None:
        """The replica is known to be a new process."""
        self._carry_out(self.feed.restarted(self._clock()))

    def close(self) -> None:
        """Stop at once."""
        self._stop_answer()
        self._unread(self._monitor)
        self._sub.disable_monitor()
        self._monitor.close(linger=0)
        self._unread(self._sub)
        self._sub.close(linger=0)

    # -- sockets -----------------------------------------------------------------------------

    def _open(self, kind: int, endpoint: str, max_queued: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.linger = 0
        socket.rcvhwm = max_queued
        socket.maxmsgsize = MAX_PAYLOAD_BYTES
        socket.ipv6 = "[" in endpoint
        socket.reconnect_ivl = _RECONNECT_MS
        socket.reconnect_ivl_max = _MAX_RECONNECT_MS
        socket.heartbeat_ivl = _HEARTBEAT_MS
        socket.heartbeat_timeout = _HEARTBEAT_TIMEOUT_MS
        try:
            if is_listening(endpoint):
                socket.bind(endpoint)
            else:
                socket.connect(endpoint)
        except zmq.ZMQError:
            socket.close()
            raise
        return socket

    def _read(self, socket: zmq.Socket[Any], on_message: Callable[[list[bytes]], None]) -> None:
        self._readers[socket] = on_message
        self._loop.add_reader(socket.fileno(), self._drain, socket)
        self._loop.call_soon(self._drain, socket)  # the descriptor tells of changes only

    def _unread(self, socket: zmq.Socket[Any]) -> None:
        del self._readers[socket]
        self._loop.remove_reader(socket.fileno())

    def _drain(self, socket: zmq.Socket[Any]) -> None:
        """Read a few messages. The descriptor does not tell again of what is left."""
        is_empty = False
        try:
            for _ in range(_PER_TURN):
                on_message = self._readers.get(socket)
                if on_message is None:
                    return  # closed meanwhile
                try:
                    frames = socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    is_empty = True
                    return
                on_message(frames)
        finally:  # also when a message was more than the sink could take
            if not is_empty and socket in self._readers:
                self._loop.call_soon(self._drain, socket)

    # -- messages ----------------------------------------------------------------------------

    def _on_live(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != 8 or frames[1] == _END:
            _log.debug("%s sent %d frames that are no batch", self.source.endpoint, len(frames))
            return
        self._take(frames[1], frames[2], self.feed.receive)

    def _on_answer(self, frames: list[bytes]) -> None:
        if len(frames) not in (3, 4) or len(frames[-2]) != 8:
            _log.debug("%s answers with no batch", self.source.replay_endpoint)
        elif frames[-2] == _END:
            self._stop_answer()
            self._carry_out(self.feed.replay_ended(self._clock()))
        else:
            self._take(frames[-2], frames[-1], self.feed.replayed)

    def _take(
        self,
        sequence_frame: bytes,
        payload: bytes,
        feed: Callable[[KvEventBatch, float], list[Effect]],
    ) -> None:
        sequence = int.from_bytes(sequence_frame)
        self.num_batches += 1
        try:
            batch = self._decoder.decode(payload, sequence)
        except KvDecodeError as error:
            self.num_undecodable += 1
            _log.debug("batch %d of %s: %s", sequence, self.source.endpoint, error)
            self._carry_out(self.feed.undecodable(sequence, self._clock()))
        else:
            self._carry_out(feed(batch, self._clock()))

    def _on_connected(self, frames: list[bytes]) -> None:
        del frames
        if self._was_connected:
            self._carry_out(self.feed.reconnected(self._clock()))
        self._was_connected = True

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Apply(events):
                    self._sink.apply(events)
                case DropAll():
                    self._sink.drop_all()
                case AskReplay(start):
                    self._ask(start)
                case LoadTold(load):
                    self._on_load(load)
                case _:
                    self._tell_trust(effect)

    def _tell_trust(self, change: TrustChanged) -> None:
        if change.reason is Reason.DIGEST:  # nothing that networks do explains it
            _log.warning("%s: what it told does not add up", self.source.endpoint)
        self._sink.trust_changed(change.trust, change.reason)

    def _ask(self, start: int) -> None:
        self._stop_answer()
        assert self.source.replay_endpoint is not None
        self._dealer = self._open(zmq.DEALER, self.source.replay_endpoint, _MAX_REPLAYED)
        self._dealer.send_multipart([b"", start.to_bytes(8)], zmq.NOBLOCK)
        self._read(self._dealer, self._on_answer)

    def _stop_answer(self) -> None:
        dealer, self._dealer = self._dealer, None
        if dealer is not None:
            self._unread(dealer)
            dealer.close(linger=0)
