"""The addresses that a name has: a headless service, or any set of A and AAAA records.

Asked every LOOK_S with the system's resolver. Where a name has addresses of both families only IPv4
counts: they are the same replicas, each of which would count twice. Answers may be parts of what
there is (resolvers shorten long ones and rotate them), so that an address is gone only when it was
missing for LINGER_S. A name that does not exist tells of nobody; any other failure is one
(roster.py).

Not here: SRV records. The standard library cannot ask for them, nor a library of the router's.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from roost_router.discovery.roster import Told
from roost_router.discovery.source import Failed

LOOK_S: Final = 5.0
LINGER_S: Final = 15.0
#: Seconds after which a resolver that does not answer counts as failing; it is waited for.
_SLOW_S: Final = 10.0
_NOBODY: Final = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})
#: Family, kind, protocol, canonical name; address with port, and more for IPv6.
_Found = tuple[int, int, int, str, tuple[Any, ...]]


class DnsSource:
    """One name."""

    linger_s: Final = LINGER_S

    def __init__(
        self,
        url: str,
        look_s: float = LOOK_S,
        resolve: Callable[[str, int], Awaitable[Sequence[_Found]]] | None = None,
    ) -> None:
        """`url`: as a replica's, with the name in place of its address; config.py checks it.

        `resolve`: asks for a name and a port as socket.getaddrinfo does; None: the system.
        """
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.name: Final = f"DNS {parts.netloc}"
        self._host: Final = parts.hostname
        self._port: Final = parts.port or 80
        self._path: Final = parts.path
        self._look_s: Final = look_s
        self._resolve: Final = resolve or _resolve
        self._must_look = asyncio.Event()

    def hurry(self) -> None:
        """Ask now."""
        self._must_look.set()

    async def answers(self) -> AsyncGenerator[list[Told] | Failed, None]:
        """What each look says."""
        while True:
            asking = asyncio.ensure_future(self._ask())
            try:
                await asyncio.wait({asking}, timeout=_SLOW_S)
                if not asking.done():
                    yield Failed("the resolver does not answer")
                yield await asking
            finally:
                asking.cancel()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_s):
                    await self._must_look.wait()
            self._must_look.clear()

    async def _ask(self) -> list[Told] | Failed:
        try:
            found = await self._resolve(self._host, self._port)
        except socket.gaierror as error:
            return [] if error.errno in _NOBODY else Failed(error.strerror or str(error))
        except (OSError, UnicodeError) as error:
            return Failed(str(error))
        families = {family for family, *_ in found}
        counts = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
        addresses = {str(address[0]) for family, *_, address in found if family == counts}
        return [Told(self._url(address)) for address in sorted(addresses)]

    def _url(self, address: str) -> str:
        host = f"[{address}]" if ":" in address else address
        return f"http://{host}:{self._port}{self._path}"


async def _resolve(host: str, port: int) -> Sequence[_Found]:
    loop = asyncio.get_running_loop()
    return await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
