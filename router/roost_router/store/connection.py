"""One connection to a Redis server: commands out, replies back in their order.

Commands are written at once, without waiting for the replies of others (pipelining), so one
connection serves all that a router asks. Parser and writer are hiredis, as redis-py's are; what
redis-py puts around them is left out (docs/decisions/0023).

Invariants
- Replies belong to commands by their order alone. A command whose caller has left keeps its place,
  and its reply is dropped when it comes: no reply ever reaches another's caller.
- Nothing is sent twice.
- What is kept is bounded: a server that sends more than MAX_REPLY_BYTES of one reply, or what is no
  reply, is cut off; to one that does not read, no more than MAX_UNSENT_BYTES are kept.

Not here: which server, and how long a caller waits (client.py).
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, Final, cast

import hiredis

from roost_router.store.address import Node
from roost_router.store.errors import StoreError, StoreFault

#: What one reply may have: a read of many entries is megabytes.
MAX_REPLY_BYTES: Final = 64 << 20
#: What may wait to be sent.
MAX_UNSENT_BYTES: Final = 16 << 20
#: Who has not answered for so long, or for the budget of a call where that is longer, is stuck.
STUCK_S: Final = 1.0

Part = bytes | str | int
_NO_REPLY: Final = object()
_MAX_TEXT = 200
_IN_SCRIPT = re.compile(r"ERR Error running script .*@user_script:\s?\d+: -([A-Z]+) ")


class ServerError(Exception):
    """A server's reply is an error; `code` is its first word.

    Of an error inside a script, Redis 6 tells the code in the midst of its own words.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text[:_MAX_TEXT])
        inner = _IN_SCRIPT.match(text)
        self.code = inner[1] if inner else text.partition(" ")[0]


class Connection(asyncio.Protocol):
    """See the module. Used from the event loop only."""

    def __init__(self, node: Node, on_lost: Callable[[Connection], None]) -> None:
        self.node = node
        self.fault: StoreError | None = None  # why it is of no use any more
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(replyError=ServerError, notEnoughData=_NO_REPLY)
        self._open_bytes = 0  # received since the last whole reply
        # Of each command on its way: its reply, when it was sent, when its server is stuck.
        self._waiting: deque[tuple[asyncio.Future[Any], float, float]] = deque()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def dial(
        cls, node: Node, tls: ssl.SSLContext | None, on_lost: Callable[[Connection], None]
    ) -> Connection:
        """Connect. Raises StoreError (DOWN) that says what is wrong; ends when cancelled."""
        loop = asyncio.get_running_loop()
        connection = cls(node, on_lost)
        try:
            if node.port:
                name = node.host if tls else None
                await loop.create_connection(
                    lambda: connection, node.host, node.port, ssl=tls, server_hostname=name
                )
            else:
                await loop.create_unix_connection(lambda: connection, node.host)
        except OSError as error:  # ssl.SSLError is one, too
            message = error.strerror or str(error)
            raise StoreError(StoreFault.DOWN, f"{node}: {message}") from None
        return connection

    async def log_in(self, user: str, password: str, db: int) -> None:
        """Say who we are and which database is meant. Raises StoreError (DOWN)."""
        commands: list[tuple[Part, ...]] = [("AUTH", user, password)] if password else []
        commands += [("SELECT", db)] if db else []
        for reply in [self.send(command, STUCK_S) for command in commands]:
            if isinstance(answer := await reply, Exception):
                raise StoreError(StoreFault.DOWN, f"{self.node}: {answer}")

    def send(self, command: tuple[Part, ...], budget_s: float) -> asyncio.Future[Any]:
        """Write a command; a future of its reply: a ServerError or StoreError where it fails.

        Raises StoreError, with nothing sent, when the connection is lost (DOWN) or the server does
        not read (LATE), or has owed a reply for longer than `budget_s` (LATE).
        """
        if self.fault is not None:
            raise StoreError(self.fault.fault, str(self.fault))
        assert self._transport is not None
        now = self._loop.time()
        if self._waiting and now - self._waiting[0][1] > budget_s:
            raise StoreError(StoreFault.LATE, f"{self.node} has not answered others yet")
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            raise StoreError(StoreFault.LATE, f"{self.node} does not read what is sent")
        reply: asyncio.Future[Any] = self._loop.create_future()
        self._waiting.append((reply, now, now + max(STUCK_S, budget_s)))
        self._transport.write(hiredis.pack_command(cast("tuple[str | int | bytes]", command)))
        return reply

    def is_stuck(self) -> bool:
        """Whether the server has owed a reply for longer than any server takes."""
        return bool(self._waiting) and self._loop.time() > self._waiting[0][2]

    def is_idle(self) -> bool:
        """Whether no reply is owed."""
        return not self._waiting

    def close(self, fault: StoreFault = StoreFault.DOWN, why: str = "closed") -> None:
        """End it at once; whoever waits gets StoreError."""
        if self.fault is not None:
            return
        self.fault = StoreError(fault, f"{self.node}: {why}")
        if self._transport is not None:
            self._transport.abort()
        for reply, _, _ in self._waiting:
            if not reply.done():
                reply.set_result(self.fault)
        self._waiting.clear()
        self._on_lost(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)
        if self.fault is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.close(why=str(exc) if exc else "the server closed the connection")

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._open_bytes += len(data)
        try:
            self._reader.feed(data)
            while self.fault is None and (reply := self._reader.gets()) is not _NO_REPLY:
                self._open_bytes = 0
                self._answer(reply)
        except hiredis.HiredisError as error:
            self.close(StoreFault.NONSENSE, f"the server does not speak Redis: {error}")
        if self._open_bytes > MAX_REPLY_BYTES:
            self.close(StoreFault.NONSENSE, f"a reply of more than {MAX_REPLY_BYTES} bytes")

    def _answer(self, reply: Any) -> None:
        if not self._waiting:  # as "max number of clients reached" comes
            why = str(reply) if isinstance(reply, ServerError) else "a reply that nobody asked for"
            self.close(why=why)
            return
        waiting, _, _ = self._waiting.popleft()
        if not waiting.done():
            waiting.set_result(reply)
