"""How a connection to the store comes about: TLS, logging in, asking sentinels where to go.

Invariants: each takes at most DIAL_S; the password goes to servers, and to sentinels only where
they want one.

Not here: which of the servers is the right one (client.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Final

from roost_router.store.address import AddressError, Node, StoreAddress
from roost_router.store.connection import Connection, ServerError
from roost_router.store.errors import StoreError, StoreFault
from roost_router.store.replies import expecting

#: Seconds for a connection that can be used.
DIAL_S: Final = 1.0


class Dialler:
    """Makes connections as the options of an address say."""

    def __init__(self, address: StoreAddress) -> None:
        """Raises AddressError for unusable certificates."""
        self._address = address
        self._tls = _tls_context(address)

    async def dial(self, node: Node, on_lost: Callable[[Connection], None]) -> Connection:
        """Connect and log in. Raises StoreError (DOWN) that says what is wrong."""
        async with _at_most(node):
            connection = await Connection.dial(node, self._tls, on_lost)
            try:
                address = self._address
                await connection.log_in(address.user, address.password, address.db)
            except BaseException:
                connection.close()
                raise
            return connection

    async def ask_sentinel(self, sentinel: Node) -> Node:
        """Which node a sentinel takes for the primary. Raises StoreError.

        Sentinels are told the password only where they want one.
        """
        address = self._address
        command = ("SENTINEL", "get-master-addr-by-name", address.service)
        async with _at_most(sentinel):
            link = await Connection.dial(sentinel, self._tls, _ignore)
            try:
                reply = await link.send(command, DIAL_S)
                if isinstance(reply, ServerError) and reply.code == "NOAUTH":
                    await link.log_in(address.user, address.password, 0)
                    reply = await link.send(command, DIAL_S)
            finally:
                link.close()
        if reply is None:
            message = f"sentinel {sentinel} knows no service '{address.service}'"
            raise StoreError(StoreFault.DOWN, message)
        if isinstance(reply, Exception):
            raise StoreError(StoreFault.DOWN, f"sentinel {sentinel}: {reply}")
        with expecting():
            host, port = reply
            return Node(host.decode(), int(port))


@contextlib.asynccontextmanager
async def _at_most(node: Node) -> AsyncIterator[None]:
    """What follows takes at most DIAL_S. Raises StoreError (DOWN)."""
    try:
        async with asyncio.timeout(DIAL_S):
            yield
    except TimeoutError:
        message = f"{node}: no connection after {DIAL_S:.3g} s"
        raise StoreError(StoreFault.DOWN, message) from None


def _ignore(connection: Connection) -> None:
    """Whoever uses a connection for one question sees its loss in the answer."""


def _tls_context(address: StoreAddress) -> ssl.SSLContext | None:
    """What TLS connections check, and who they say they are. Raises AddressError."""
    if not address.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=address.ca_file or None)
        if address.cert_file:
            context.load_cert_chain(address.cert_file, address.key_file)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(filter(None, (address.ca_file, address.cert_file, address.key_file)))
        raise AddressError(f"{files}: no usable certificates: {error}") from None
    return context
