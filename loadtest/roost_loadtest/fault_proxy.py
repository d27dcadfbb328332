"""A TCP proxy between router and replica that breaks streams where it is told.

Kills by the thousand without the seconds that a process needs to come back: what the router
sees is what it would see of a replica that dies, stalls or lies at exactly this event.

A client names its request in the header FAULT_ID, which routers pass on. `Plans` says what
befalls the legs of that request: the first leg meets the first kill, the leg that resumes it the
second, through whichever proxy they come. Bytes that meet no kill pass as they are.

Not here: who plans (fault_kills.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from enum import Enum

import httptools
import msgspec

FAULT_ID = "x-fault-id"

_BLOCK_END = b"\n\n"  # of an event; JSON and chunk framing have none
_LINGER_0 = struct.pack("ii", 1, 0)
_SETTLE_S = 0.002


class KillKind(Enum):
    """How a stream ends before its time."""

    RST = "rst"
    FIN = "fin"
    TORN = "torn"  # half an event, then RST
    EOF = "eof"  # the last chunk, as after a whole answer
    HANG = "hang"  # nothing more, the connection stays


class Kill(msgspec.Struct, frozen=True):
    """Break a leg after so many events; 0: after the head."""

    kind: KillKind
    after_events: int


class Leg(msgspec.Struct):
    """One attempt of a request as a proxy saw it. Times are time.monotonic()."""

    replica: int
    started_at: float
    first_event_at: float | None = None
    killed: Kill | None = None
    killed_at: float | None = None
    num_events: int = 0


class Plans:
    """What is to befall which request, and what did."""

    def __init__(self) -> None:
        self._kills: dict[str, list[Kill]] = {}
        self.legs: dict[str, list[Leg]] = {}

    def add(self, request_id: str, kills: list[Kill]) -> None:
        """Plan for the request with this id, a kill for each of its first legs."""
        self._kills[request_id] = kills

    def start_leg(self, request_id: str, replica: int) -> tuple[Leg, Kill | None]:
        """A leg of this request begins; the kill it meets."""
        legs = self.legs.setdefault(request_id, [])
        leg = Leg(replica, time.monotonic())
        legs.append(leg)
        kills = self._kills.get(request_id, [])
        return leg, kills[len(legs) - 1] if len(legs) <= len(kills) else None


class FaultProxy:
    """Listens for the router, in front of one replica."""

    def __init__(self, number: int, replica_port: int, plans: Plans) -> None:
        self._number = number
        self._replica_port = replica_port
        self._plans = plans
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    async def __aenter__(self) -> FaultProxy:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close everything."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """What the router is given."""
        return f"http://127.0.0.1:{self.port}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # a side went away, or the proxy closes; both sides are closed below
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replica_reader, replica_writer = await asyncio.open_connection(
            "127.0.0.1", self._replica_port
        )
        downstream = _Downstream(writer)
        requests = _Requests(self._number, self._plans, downstream)
        up = asyncio.ensure_future(_pump(reader, replica_writer, requests))
        down = asyncio.ensure_future(downstream.pump(replica_reader))
        try:
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            if down.done() and downstream.is_hanging:
                replica_writer.transport.abort()
                await up  # until the router gives up
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
            replica_writer.transport.abort()
            with contextlib.suppress(OSError):
                await replica_writer.wait_closed()


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, requests: _Requests
) -> None:
    """From the router to the replica, looking at the heads that pass."""
    while data := await reader.read(65536):
        requests.feed(data)
        with contextlib.suppress(OSError):  # a replica that hangs takes nothing any more
            writer.write(data)
            await writer.drain()


class _Requests:
    """Reads the requests of one connection for their ids."""

    def __init__(self, number: int, plans: Plans, downstream: _Downstream) -> None:
        self._number = number
        self._plans = plans
        self._downstream = downstream
        self._parser = httptools.HttpRequestParser(self)

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == FAULT_ID.encode():
            self._downstream.expect(*self._plans.start_leg(value.decode(), self._number))


class _Downstream:
    """From the replica to the router: counts events and strikes."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._leg: Leg | None = None
        self._kill: Kill | None = None
        self._last = b""  # the byte before, when an event's end is cut in two
        self.is_hanging = False

    def expect(self, leg: Leg, kill: Kill | None) -> None:
        """The next answer belongs to this leg."""
        self._leg, self._kill, self._last = leg, kill, b""

    async def pump(self, reader: asyncio.StreamReader) -> None:
        """Until the replica closes or a kill is done."""
        while data := await reader.read(65536):
            if self._leg is not None and (at := self._strike_at(self._leg, data)) is not None:
                await self._strike(data, at)
                return
            self._writer.write(data)
            await self._writer.drain()

    def _strike_at(self, leg: Leg, data: bytes) -> int | None:
        """Count events in `data`; where in it the kill comes, or None."""
        kill = self._kill
        if kill is not None and kill.after_events == 0 and leg.num_events == 0:
            return data.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in data else 0
        joined, shift = self._last + data, len(self._last)
        position = joined.find(_BLOCK_END)
        while position != -1:
            leg.num_events += 1
            leg.first_event_at = leg.first_event_at or time.monotonic()
            position += len(_BLOCK_END)
            if kill is not None and leg.num_events == kill.after_events:
                return position - shift + 2  # with the line end of its chunk
            position = joined.find(_BLOCK_END, position)
        # An end that was counted must not be found again.
        self._last = b"" if data.endswith(_BLOCK_END) else data[-1:]
        return None

    async def _strike(self, data: bytes, at: int) -> None:
        assert self._leg is not None
        assert self._kill is not None
        kind = self._kill.kind
        self._leg.killed, self._leg.killed_at = self._kill, time.monotonic()
        rest = data[at:]
        self._writer.write(data[:at])
        if kind is KillKind.TORN:
            next_event = rest.partition(_BLOCK_END)[0]
            self._writer.write(next_event[: len(next_event) // 2] or b"80\r\ndata: {")
        elif kind is KillKind.EOF:
            self._writer.write(b"0\r\n\r\n")
        await asyncio.sleep(_SETTLE_S)  # what was written must arrive before a reset
        if kind is KillKind.HANG:
            self.is_hanging = True
            return
        if kind is not KillKind.EOF:
            self._leg.killed_at = time.monotonic()
        sock: socket.socket = self._writer.get_extra_info("socket")
        if kind in {KillKind.RST, KillKind.TORN}:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
            self._writer.transport.abort()
        else:
            self._writer.close()
