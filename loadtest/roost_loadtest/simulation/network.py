"""Hosts, connections and what goes wrong with them.

A connection is two `SimTransport`s. Bytes pass through three places, each with its limit:

    write() ─► user buffer ─► (window) ─► wire ─► inbox ─► data_received
               the process    the kernels, in flight and unread

so a reader that stops reading fills the window, then the writer's own buffer, which then pauses
the writer's protocol, as with asyncio. Arrivals keep their order within a direction, take a
drawn latency, and are handed over in drawn pieces.

Faults: a host's process can be *frozen* (its kernel still accepts and acknowledges), the host
*unreachable* (nothing passes, nothing is lost: TCP would send again), or *killed* (its kernel
closes all sockets). A side can close (FIN), or reset (RST). As in Linux, closing a socket with
unread bytes resets the connection, and a reset destroys what the other side has not read yet.

Not here: HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from random import Random
from typing import Any, Protocol, runtime_checkable

import msgspec

from roost_loadtest.simulation.loop import VirtualLoop

_FIN = b""  # end of a direction, among pieces of bytes that are never empty
#: What uvloop's and the kernel's limits are in the real world.
DEFAULT_HIGH_WATER_BYTES = 64 * 1024


@runtime_checkable
class Mortal(Protocol):
    """A protocol that wants to know when its host's process is killed."""

    def process_died(self) -> None:
        """Nothing of the process is left; do nothing more."""
        ...


class Conditions(msgspec.Struct, frozen=True):
    """How the network behaves in a run."""

    latency_s: float = 0.001  # typical, one way
    window_bytes: int = 64 * 1024  # in flight and unread, by direction
    slice_share: float = 0.2  # of reads that bring only a part of what has arrived
    #: Water marks are divided by this, so that small streams can fill them.
    buffer_scale: int = 1


class Host:
    """A machine with one process."""

    def __init__(self, name: str, loop: VirtualLoop) -> None:
        self.name = name
        self.is_frozen = False
        self.is_unreachable = False
        self.listener: Callable[[], asyncio.BaseProtocol] | None = None
        self.transports: dict[SimTransport, None] = {}
        self._loop = loop
        self._held: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def later(self, delay_s: float, call: Callable[..., None], *args: Any) -> None:
        """Let the host's process do something; a frozen one does it when it thaws."""
        self._loop.at(self._loop.time() + delay_s, self.do, call, *args)

    def do(self, call: Callable[..., None], *args: Any) -> None:
        """Let the process do something now, or when it thaws."""
        if self.is_frozen:
            self._held.append((call, args))
        else:
            call(*args)

    def freeze(self) -> None:
        """SIGSTOP."""
        self.is_frozen = True

    def thaw(self) -> None:
        """SIGCONT: all that was missed happens at once, in order."""
        if self.is_frozen:
            self.is_frozen = False
            held, self._held = self._held, []
            for call, args in held:
                self.do(call, *args)

    def disconnect(self) -> None:
        """Nothing passes any more."""
        self.is_unreachable = True

    def reconnect(self) -> None:
        """All that was held up on the way arrives."""
        self.is_unreachable = False
        for transport in list(self.transports):
            transport.retransmit()

    def kill(self) -> None:
        """SIGKILL: no listener, and the kernel closes every socket."""
        self.listener = None
        self.is_frozen = False
        self._held.clear()
        for transport in list(self.transports):
            transport.drop()


class Network:
    """Connects hosts; `loop.Connector` for the router's host."""

    def __init__(self, loop: VirtualLoop, rng: Random, conditions: Conditions) -> None:
        self.loop = loop
        self.rng = rng
        self.conditions = conditions
        self.router = Host("router", loop)
        self._by_name: dict[str, Host] = {"router": self.router}
        self.num_connections = 0
        self.most_buffered_bytes = 0  # in a write buffer of the router, beyond its high water
        loop.network = self

    def add_host(self, name: str) -> Host:
        """A new host, to be dialled by `name`."""
        host = self._by_name[name] = Host(name, self.loop)
        return host

    def latency_s(self) -> float:
        """One way, drawn."""
        return self.conditions.latency_s * (0.2 + 1.6 * self.rng.random())

    def listen(self, factory: Callable[[], asyncio.BaseProtocol]) -> asyncio.AbstractServer:
        """The router listens."""
        self.router.listener = factory
        return _Server(self.router)  # type: ignore[abstract]

    async def connect(
        self, factory: Callable[[], asyncio.BaseProtocol], host: str, port: int
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """The router dials `host`. Raises ConnectionRefusedError; waits if it is unreachable."""
        assert port
        answer: asyncio.Future[tuple[asyncio.Transport, asyncio.BaseProtocol]]
        answer = self.loop.create_future()

        def established(transport: SimTransport | None, protocol: asyncio.BaseProtocol) -> None:
            if transport is None:
                if not answer.done():
                    answer.set_exception(ConnectionRefusedError(111, "Connection refused"))
            elif answer.done():
                transport.abort()  # the caller gave up meanwhile
            else:
                answer.set_result((transport, protocol))

        self.dial(self.router, host, factory, established)
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                answer.result()[0].close()  # as asyncio's create_connection does
            raise

    def dial(
        self,
        source: Host,
        target: str,
        factory: Callable[[], asyncio.BaseProtocol],
        established: Callable[[SimTransport | None, asyncio.BaseProtocol], None] | None = None,
    ) -> None:
        """Connect `source` to the host called `target`; `established` hears of it."""
        self.loop.at(
            self.loop.time() + self.latency_s(),
            self._syn,
            source,
            self._by_name[target],
            factory,
            established,
        )

    def _syn(
        self,
        source: Host,
        target: Host,
        factory: Callable[[], asyncio.BaseProtocol],
        established: Callable[[SimTransport | None, asyncio.BaseProtocol], None] | None,
    ) -> None:
        if target.is_unreachable:  # sent again a second later, as TCP does
            self.loop.at(self.loop.time() + 1.0, self._syn, source, target, factory, established)
            return
        back_s = self.loop.time() + self.latency_s()
        if target.listener is None:
            if established is not None:
                self.loop.at(back_s, established, None, asyncio.Protocol())
            return
        self.num_connections += 1
        number = self.num_connections
        near = SimTransport(self, source, f"{source.name}>{target.name}#{number}")
        far = SimTransport(self, target, f"{target.name}<{source.name}#{number}")
        near.peer, far.peer = far, near
        # The kernel accepts; the process sees the connection when it runs.
        target.do(far.open, target.listener)
        self.loop.at(back_s, near.open, factory, established)


class _Server(asyncio.AbstractServer):
    """What create_server returns."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def close(self) -> None:
        """Stop accepting."""
        self.host.listener = None

    def is_serving(self) -> bool:
        """Whether connections are accepted."""
        return self.host.listener is not None

    async def wait_closed(self) -> None:
        """Nothing to wait for."""


class SimTransport(asyncio.Transport):
    """One side of a connection."""

    peer: SimTransport

    def __init__(self, network: Network, host: Host, name: str) -> None:
        super().__init__()
        self.name = name
        self._network = network
        self._loop = network.loop
        self.host = host
        self._protocol: asyncio.BaseProtocol | None = None
        self._latency_s = network.latency_s()
        # out
        self._user = bytearray()
        self._unread_by_peer = 0  # on the wire or in the peer's inbox
        self._eof_after_flush = False
        self._is_write_paused = False
        self.set_write_buffer_limits()
        # in
        self.wire: deque[bytes] = deque()  # on its way to this side
        self.wire_at = 0.0  # when its last piece arrives
        self.held_arrivals = 0
        self._inbox = bytearray()
        self._eof_arrived = False
        self._eof_told = False
        self._is_read_paused = False
        # life
        self._is_closing = False
        self._is_socket_closed = False  # the kernel's side is gone
        self._is_lost = False  # connection_lost was called or is about to be
        host.transports[self] = None

    def __repr__(self) -> str:
        return f"<SimTransport {self.name}>"

    # asyncio.Transport

    def is_closing(self) -> bool:
        """Whether close or abort was called, or the connection is gone."""
        return self._is_closing

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Who is told."""
        assert self._protocol is not None
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Change who is told."""
        self._protocol = protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """An address; there is no socket."""
        return (self.host.name, 1) if name in {"peername", "sockname"} else default

    def get_write_buffer_size(self) -> int:
        """Bytes that the kernel has not taken."""
        return len(self._user)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Low and high water."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Water marks, scaled down by the run's conditions."""
        high = DEFAULT_HIGH_WATER_BYTES if high is None else high
        low = high // 4 if low is None else low
        scale = self._network.conditions.buffer_scale
        self._high, self._low = high // scale, low // scale

    def pause_reading(self) -> None:
        """Bytes stay in the inbox."""
        self._is_read_paused = True

    def resume_reading(self) -> None:
        """Read on."""
        if self._is_read_paused and not self._is_closing:
            self._is_read_paused = False
            self._loop.at(self._loop.time(), self.host.do, self._read)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes; without effect after close, as asyncio's."""
        if self._is_closing or not data:
            return
        self._user += data
        self._push()
        if len(self._user) > self._high and not self._is_write_paused:
            self._is_write_paused = True
            self._tell("pause_writing")
        if self.host is self._network.router:
            excess = len(self._user) - self._high
            self._network.most_buffered_bytes = max(self._network.most_buffered_bytes, excess)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Take bytes."""
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        """Yes."""
        return True

    def write_eof(self) -> None:
        """Half-close."""
        self._eof_after_flush = True
        self._push()

    def close(self) -> None:
        """Stop reading, flush, then close."""
        if self._is_closing:
            return
        self._is_closing = True
        if not self._user:
            self._lose(None)

    def abort(self) -> None:
        """Close without flushing."""
        self._is_closing = True
        self._user.clear()
        self._lose(None)

    # only in a simulation

    def reset(self) -> None:
        """Close with an RST."""
        self._is_closing = True
        self._user.clear()
        self._inbox += b"."  # an unread byte is what makes the kernel send one
        self._lose(None)

    def drop(self) -> None:
        """The process died: the kernel closes the socket, nobody is told here."""
        self._is_closing = self._is_lost = True
        self._user.clear()
        self._close_socket()
        protocol, self._protocol = self._protocol, None
        if isinstance(protocol, Mortal):
            protocol.process_died()

    def retransmit(self) -> None:
        """The way is free again."""
        for side in (self, self.peer):
            held, side.held_arrivals = side.held_arrivals, 0
            for _ in range(held):
                self._loop.at(self._loop.time(), side.arrive)

    def open(
        self,
        factory: Callable[[], asyncio.BaseProtocol],
        established: Callable[[SimTransport | None, asyncio.BaseProtocol], None] | None = None,
    ) -> None:
        """The process sees the connection."""
        if self._is_socket_closed:
            return
        self._protocol = factory()
        self._protocol.connection_made(self)
        if established is not None:
            established(self, self._protocol)
        self._loop.at(self._loop.time(), self.host.do, self._read)

    # out

    def _push(self) -> None:
        """Hand as much to the kernel as the window has room for."""
        if self._is_socket_closed:
            return
        room = self._network.conditions.window_bytes - self._unread_by_peer
        if room > 0 and self._user:
            piece = bytes(self._user[:room])
            del self._user[:room]
            self._unread_by_peer += len(piece)
            self._send(piece)
        if self._user:
            return
        if self._is_closing:
            self._lose(None)
        elif self._eof_after_flush:
            self._eof_after_flush = False
            self._send(_FIN)

    def _send(self, piece: bytes) -> None:
        peer = self.peer
        jitter = 0.5 + self._network.rng.random()
        peer.wire_at = max(peer.wire_at, self._loop.time() + self._latency_s * jitter)
        peer.wire.append(piece)
        self._loop.at(peer.wire_at, peer.arrive)

    def was_read(self, num_bytes: int) -> None:
        """The peer's process read that much: a writer that waits hears of it a latency later."""
        self._unread_by_peer -= num_bytes
        if self._user or self._is_write_paused:
            self._loop.at(self._loop.time() + self._latency_s, self.host.do, self._window_opened)

    def _window_opened(self) -> None:
        if self._is_lost:
            return
        self._push()
        if self._is_write_paused and len(self._user) <= self._low and not self._is_lost:
            self._is_write_paused = False
            self._tell("resume_writing")

    # in

    def arrive(self) -> None:
        """The next piece from the wire reaches this host's kernel."""
        if self.host.is_unreachable or self.peer.host.is_unreachable:
            self.held_arrivals += 1
            return
        if not self.wire:  # a reset overtook it
            return
        piece = self.wire.popleft()
        if self._is_socket_closed:
            if piece:
                self._reset_peer()
            return
        if piece:
            self._inbox += piece
        else:
            self._eof_arrived = True
        self.host.do(self._read)

    def _read(self) -> None:
        """Hand what has arrived to the protocol, maybe not all at once."""
        protocol = self._protocol
        if self._is_closing or self._is_read_paused or protocol is None:
            return
        if self._inbox:
            num_bytes = len(self._inbox)
            rng, share = self._network.rng, self._network.conditions.slice_share
            if num_bytes > 1 and rng.random() < share:
                num_bytes = 1 + int(rng.random() * (num_bytes - 1))
            data = bytes(self._inbox[:num_bytes])
            del self._inbox[:num_bytes]
            self.peer.was_read(num_bytes)
            self._tell("data_received", data)
            if self._inbox or self._eof_arrived:
                self._loop.at(self._loop.time(), self.host.do, self._read)
        elif self._eof_arrived and not self._eof_told:
            self._eof_told = True
            if not self._tell("eof_received"):
                self.close()

    # life

    def _lose(self, error: Exception | None) -> None:
        """The connection ends for this side; its protocol hears of it in a later turn."""
        if self._is_lost:
            return
        self._is_closing = self._is_lost = True
        self._user.clear()
        self._close_socket()
        self._loop.call_soon(self.host.do, self._tell_lost, error)

    def _tell_lost(self, error: Exception | None) -> None:
        self._tell("connection_lost", error)

    def _tell(self, event: str, *args: Any) -> Any:
        """Call the protocol; what the router's raises ends the connection, as in asyncio."""
        protocol = self._protocol
        if protocol is None:
            return None
        call: Callable[..., Any] = getattr(protocol, event)
        if self.host is not self._network.router:
            return call(*args)
        try:
            return call(*args)
        except Exception as error:  # noqa: BLE001  asyncio's boundary
            self._loop.call_exception_handler({"message": f"{event} failed", "exception": error})
            self.abort()
            return None

    def _close_socket(self) -> None:
        if self._is_socket_closed:
            return
        self._is_socket_closed = True
        self.host.transports.pop(self, None)
        if self._inbox:
            self._reset_peer()
        else:
            self._send(_FIN)

    def _reset_peer(self) -> None:
        peer = self.peer
        self._loop.at(self._loop.time() + self._latency_s, peer.reset_arrives)

    def reset_arrives(self) -> None:
        """The peer's kernel knows nothing of this connection any more."""
        if self.host.is_unreachable or self.peer.host.is_unreachable:
            self._loop.at(self._loop.time() + 1.0, self.reset_arrives)
            return
        if self._is_socket_closed:
            return
        self.wire.clear()
        self._inbox.clear()
        self._is_socket_closed = True
        self.host.transports.pop(self, None)
        self.host.do(self._lose, ConnectionResetError(104, "Connection reset by peer"))
