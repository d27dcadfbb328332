"""The store: Redis behind calls that end within their budget, whatever Redis does.

                 ┌── lost · stuck · not the primary any more ──┐
                 ▼                                             │
    down: calls fail at once                    up: calls go to the home, pipelined
          `_look` dials, 0.02 to 0.5 s apart           MOVED, ASK: followed within the call
                 └── a write of the probe key succeeded ──────►┘

The *home* is the node that takes our writes: the server, the primary that sentinels name, or the
cluster's node that has our slot. All keys of a router share one hash tag, so a call is of one node.

Invariants
- A call ends within its budget with a result or StoreError. Nothing is retried but what was surely
  not done: redirections, and a script that the server did not know.
- While the home owes a reply for longer than a call's budget, that call fails without being sent.
- `on_change` is told each change of `is_up` and, while down, each other cause.

Not here: a connection's own rules (connection.py), how one comes about (dial.py); what
is kept, under which keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final, Protocol

from roost_router.store.address import Mode, Node, StoreAddress
from roost_router.store.connection import Connection, Part, ServerError
from roost_router.store.dial import DIAL_S, Dialler
from roost_router.store.errors import StoreError, StoreFault
from roost_router.store.replies import FIELD, Entries, bytes_of, entries_of, expecting, redirection

#: The rights that a Redis user needs for what is sent here; scripts need those of their commands.
COMMANDS: Final = (
    "asking", "del", "evalsha", "get", "mget", "script|load", "select", "set", "xadd",
    "xrange", "xread", "xrevrange",
)  # fmt: skip

_START_S = 0.3  # that `start` waits for the first look
_RETRY_S = (0.02, 0.5)  # between two looks: at first, at most
_WATCH_S = 0.25
_WATCHES_A_SENTINEL = 4  # asked each second
_READ_SLACK_S = 1.0  # a blocking read may end later than asked: servers look ten times a second
_MAX_REDIRECTS = 5
_MAX_LINKS = 8
_MAX_SPARE_READERS = 4
# Whoever answers so cannot serve us now; another may, or the same one later.
_NOT_HOME = frozenset({"CLUSTERDOWN", "LOADING", "MASTERDOWN", "NOAUTH", "READONLY"})
# Whoever answers a write so is home, and can be read.
_FULL = frozenset({"MISCONF", "NOREPLICAS", "OOM"})


class Script(Protocol):
    """Lua that runs inside Redis."""

    @property
    def source(self) -> str:
        """Its text."""

    @property
    def sha(self) -> str:
        """Hexadecimal SHA-1 of the text."""


class Store:
    """See the module. Used from one event loop only."""

    def __init__(
        self,
        address: StoreAddress,
        on_change: Callable[[bool, str], None],
        *,
        probe_key: bytes = b"roost:probe",
    ) -> None:
        """`probe_key`: written with a second's life to see whether writes are taken.

        It has the hash tag of all other keys. Raises AddressError for unusable certificates.
        """
        self.num_foreign = 0  # entries of streams that were not written by `append`
        self._address = address
        self._dialler = Dialler(address)
        self._on_change = on_change
        self._probe_key = probe_key
        self._rng = Random()
        self._home = address.nodes[0]
        self._named_by: Node | None = None  # the sentinel that named it
        self._is_up = False
        self._why = "not started"
        self._links: dict[Node, Connection] = {}
        self._dialling: dict[Node, asyncio.Task[Connection]] = {}
        self._readers: list[Connection] = []
        self._lost = asyncio.Event()
        self._looked = asyncio.Event()  # the first look is over
        self._looking: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """Whether calls are sent at all."""
        return self._is_up

    @property
    def why_down(self) -> str:
        """Why calls fail at once; empty while they do not."""
        return self._why

    async def start(self) -> None:
        """Look for the home, from now on; returns when it is found, or soon after (0.3 s)."""
        self._looking = asyncio.create_task(self._look())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_S):
                await self._looked.wait()

    async def close(self) -> None:
        """End all connections; calls fail from now on. `on_change` is not told."""
        self._is_up, self._why = False, "closed"
        tasks = [task for task in (self._looking, *self._dialling.values()) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._close_links()

    async def append(self, key: bytes, blob: bytes, oldest: bytes, budget_s: float = 0.5) -> bytes:
        """Add an entry to a stream, which forgets about all before the id `oldest`; its id."""
        trim: tuple[Part, ...] = ("MINID", "~", oldest, "*")
        return bytes_of(await self._call(("XADD", key, *trim, FIELD, blob), budget_s))

    async def read_after(
        self, key: bytes, after: bytes, wait_s: float, max_entries: int
    ) -> Entries:
        """Entries of a stream after an id, as soon as there are any; none after `wait_s`.

        On a connection of its own; with `wait_s` 0 at once. An entry that `append` did not write is
        counted and has an empty blob, so that whoever reads on from the last id gets past it.
        """
        block = ("BLOCK", max(1, round(wait_s * 1000))) if wait_s > 0 else ()
        reply = await self._call(
            ("XREAD", "COUNT", max_entries, *block, "STREAMS", key, after),
            wait_s + _READ_SLACK_S,
            is_blocking=True,
        )
        if reply is None:
            return []
        with expecting():
            ((_, entries),) = reply
            return self._entries(entries)

    async def read_range(
        self, key: bytes, first: bytes, max_entries: int, budget_s: float = 0.5
    ) -> Entries:
        """Entries of a stream from the id `first` on, as `read_after` gives them."""
        reply = await self._call(("XRANGE", key, first, "+", "COUNT", max_entries), budget_s)
        with expecting():
            return self._entries(reply)

    async def last_id(self, key: bytes, budget_s: float = 0.5) -> bytes:
        """Id of a stream's newest entry; b"0-0" where there is none."""
        reply = await self._call(("XREVRANGE", key, "+", "-", "COUNT", 1), budget_s)
        with expecting():
            return bytes_of(reply[0][0]) if reply else b"0-0"

    async def get(self, key: bytes, budget_s: float = 0.5) -> bytes | None:
        """The value of a key."""
        reply = await self._call(("GET", key), budget_s)
        return None if reply is None else bytes_of(reply)

    async def get_many(self, keys: Sequence[bytes], budget_s: float = 0.5) -> list[bytes | None]:
        """The values of keys, in their order; None also where one is no string."""
        if not keys:
            return []
        reply = await self._call(("MGET", *keys), budget_s)
        with expecting():
            values = [None if value is None else bytes_of(value) for value in reply]
        if len(values) != len(keys):
            raise StoreError(StoreFault.NONSENSE, "another number of values than of keys")
        return values

    async def set(
        self,
        key: bytes,
        value: bytes,
        ttl_s: float | None,
        budget_s: float = 0.5,
        *,
        is_new: bool = False,
    ) -> None:
        """Give a key a value, for `ttl_s` seconds (1 ms at least) or for good.

        `is_new`: only where it has none.
        """
        life = () if ttl_s is None else ("PX", max(1, round(ttl_s * 1000)))
        condition = ("NX",) if is_new else ()
        await self._call(("SET", key, value, *life, *condition), budget_s)

    async def delete(self, keys: Sequence[bytes], budget_s: float = 0.5) -> int:
        """Remove keys, whatever they hold; how many there were."""
        if not keys:
            return 0
        reply = await self._call(("DEL", *keys), budget_s)
        with expecting():
            return int(reply)

    async def call(
        self,
        script: Script,
        keys: Sequence[bytes],
        args: Sequence[bytes | int],
        budget_s: float,
    ) -> Any:
        """Run a script by its SHA, sent once to servers that do not know it; its reply.

        A reply is an int, bytes, None, or a list of replies.
        """
        command = ("EVALSHA", script.sha, len(keys), *keys, *args)
        return await self._call(command, budget_s, script)

    async def _call(
        self,
        command: tuple[Part, ...],
        budget_s: float,
        script: Script | None = None,
        *,
        is_blocking: bool = False,
    ) -> Any:
        if not self._is_up:
            raise StoreError(StoreFault.DOWN, self._why)
        try:
            async with asyncio.timeout(budget_s):
                return await self._exchange(command, budget_s, script, is_blocking=is_blocking)
        except TimeoutError:
            message = f"{command[0]!s} has no reply after {budget_s:.3g} s"
            raise StoreError(StoreFault.LATE, message) from None
        except ServerError as refusal:
            if refusal.code in _NOT_HOME:
                self._lose(str(refusal))
            raise StoreError(StoreFault.REFUSED, str(refusal)) from None

    async def _exchange(
        self,
        command: tuple[Part, ...],
        budget_s: float,
        script: Script | None = None,
        *,
        is_blocking: bool = False,
    ) -> Any:
        """The reply of whichever node is the right one. Raises ServerError and StoreError."""
        node, is_asking = self._home, False
        for _ in range(_MAX_REDIRECTS):
            ask = self._ask_reader if is_blocking else self._ask_link
            try:
                return await ask(node, command, budget_s, is_asking=is_asking)
            except ServerError as refusal:
                match refusal.code:
                    case "MOVED":
                        node, is_asking = redirection(str(refusal), node), False
                        self._home = node
                    case "ASK":
                        node, is_asking = redirection(str(refusal), node), True
                    case "NOSCRIPT" if script is not None:
                        await self._ask_link(node, ("SCRIPT", "LOAD", script.source), budget_s)
                    case _:
                        raise
        raise StoreError(StoreFault.REFUSED, f"redirected {_MAX_REDIRECTS} times")

    async def _ask_link(
        self, node: Node, command: tuple[Part, ...], budget_s: float, *, is_asking: bool = False
    ) -> Any:
        link = self._links.get(node)
        if link is None:
            link = await self._link(node)
        return await _ask(link, command, budget_s, is_asking=is_asking)

    async def _ask_reader(
        self, node: Node, command: tuple[Part, ...], budget_s: float, *, is_asking: bool = False
    ) -> Any:
        """On a connection that no other call uses; closed unless it is clean afterwards."""
        spare = [reader for reader in self._readers if reader.node == node]
        reader = spare[0] if spare else await self._dialler.dial(node, self._on_lost)
        if spare:
            self._readers.remove(reader)
        try:
            return await _ask(reader, command, budget_s, is_asking=is_asking)
        finally:
            if reader.fault is None:
                if reader.is_idle() and self._is_up and len(self._readers) < _MAX_SPARE_READERS:
                    self._readers.append(reader)
                else:
                    reader.close()

    async def _link(self, node: Node) -> Connection:
        """The connection to a node. Dialled on behalf of all, so it outlives a caller's budget."""
        task = self._dialling.get(node)
        if task is None:
            task = self._dialling[node] = asyncio.create_task(
                self._dialler.dial(node, self._on_lost)
            )
            task.add_done_callback(lambda ended: self._dialled(node, ended))
        return await asyncio.shield(task)

    def _dialled(self, node: Node, task: asyncio.Task[Connection]) -> None:
        del self._dialling[node]
        if task.cancelled():
            return
        if error := task.exception():
            if node == self._home:
                self._lose(str(error))
            return
        self._links[node] = task.result()
        for other, link in list(self._links.items())[:-_MAX_LINKS]:
            if other != self._home and link.is_idle():
                link.close()

    def _on_lost(self, connection: Connection) -> None:
        if connection in self._readers:
            self._readers.remove(connection)
        if self._links.get(connection.node) is connection:
            del self._links[connection.node]
            if connection.node == self._home:
                self._lose(str(connection.fault))

    def _lose(self, why: str) -> None:
        """The home is no use any more: fail calls until it, or another one, is found."""
        self._lost.set()
        if self._is_up:
            self._tell(False, why)
        self._close_links()

    def _close_links(self) -> None:
        links = [*self._links.values(), *self._readers]
        self._links.clear()
        self._readers.clear()
        for link in links:
            link.close(why=self._why or "closed")

    def _tell(self, is_up: bool, why: str) -> None:
        changed = is_up != self._is_up or why != self._why
        self._is_up, self._why = is_up, why
        if changed:
            self._on_change(is_up, why)

    async def _look(self) -> None:
        first_s, most_s = _RETRY_S
        wait_s = first_s
        while True:
            self._lost.clear()
            why = await self._find()
            self._looked.set()
            if why is None:
                wait_s = first_s
                await self._watch()
            else:
                self._tell(False, why)
            # Also after a loss: a home that is lost at once each time is not dialled in a loop.
            await asyncio.sleep(wait_s * self._rng.uniform(0.5, 1.0))
            wait_s = min(most_s, wait_s * 2)

    async def _watch(self) -> None:
        """Until the home is lost. Looks twice: a loop that was held up has unread replies."""
        was_stuck = False
        for number in itertools.count(1):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_S):
                    await self._lost.wait()
            if self._lost.is_set():
                return
            home = self._links.get(self._home)
            is_stuck = home is not None and home.is_stuck()
            if is_stuck and was_stuck:
                self._lose(f"{self._home}: no reply")
            was_stuck = is_stuck
            if self._named_by is not None and number % _WATCHES_A_SENTINEL == 0:
                await self._check_primary(self._named_by)

    async def _check_primary(self, sentinel: Node) -> None:
        """Leave a home that is no primary any more: for ten seconds it does not know itself.

        Asks the sentinel that named it: another may be behind, and would be believed in turns.
        """
        with contextlib.suppress(StoreError):
            node = await self._dialler.ask_sentinel(sentinel)
            if node != self._home:
                self._lose(f"{self._home}: sentinels name {node} now")

    async def _find(self) -> str | None:
        """Make the node that takes writes the home; or why there is none."""
        why = []
        for candidate in self._address.nodes:
            try:
                if self._address.mode is Mode.SENTINEL:
                    self._home = await self._dialler.ask_sentinel(candidate)
                    self._named_by = candidate
                else:
                    self._home = candidate
                async with asyncio.timeout(DIAL_S):
                    await self._probe()
            except TimeoutError:
                why.append(f"{self._home}: no reply after {DIAL_S:.3g} s")
            except StoreError as error:
                why.append(str(error))
            else:
                if self._links.get(self._home) is not None:
                    self._tell(True, "")
                    return None
                why.append(f"{self._home}: lost at once")
            self._close_links()
        return "; ".join(dict.fromkeys(why))

    async def _probe(self) -> None:
        """Write to the home, whichever it turns out to be. Raises StoreError where it cannot be."""
        command = ("SET", self._probe_key, b"1", "PX", 1000)
        try:
            await self._exchange(command, DIAL_S)
        except ServerError as refusal:
            if refusal.code not in _FULL:
                raise StoreError(StoreFault.REFUSED, f"{self._home}: {refusal}") from None

    def _entries(self, reply: Any) -> Entries:
        entries, num_foreign = entries_of(reply)
        self.num_foreign += num_foreign
        return entries


async def _ask(
    link: Connection, command: tuple[Part, ...], budget_s: float, *, is_asking: bool
) -> Any:
    """The reply of a node. Raises ServerError and StoreError."""
    if is_asking:
        link.send(("ASKING",), budget_s)
    reply = await link.send(command, budget_s)
    if isinstance(reply, StoreError):
        raise StoreError(reply.fault, str(reply))
    if isinstance(reply, ServerError):
        raise reply
    return reply
