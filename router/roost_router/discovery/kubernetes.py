"""The endpoints of a service of Kubernetes: listed, then watched. Decides nothing.

As a pod does it: the API server's address is in the environment (config.py), its certificate's
authority and the pod's token in a folder. The token is read anew for each request, for it is
replaced about every hour. It needs the verbs list and watch on endpointslices in the service's
namespace.

    list ──► watch ──► watch … (the server ends each after WATCH_S)
     ▲         │ 410, an event that cannot be read, a connection that breaks
     └─ wait ◄─┘ 0 for the first 410, else 0.5 s, 1 s … 30 s, drawn

What answers mean is endpoint_slices.py's.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator
from pathlib import Path
from random import Random
from typing import Final

from roost_router.discovery.endpoint_slices import (
    EndpointSlices,
    ExpiredError,
    ServiceName,
    SliceError,
)
from roost_router.discovery.roster import Told
from roost_router.discovery.source import Failed
from roost_router.http.lines import StatusError, get_lines
from roost_router.http.page import PageError, get_page
from roost_router.http.upstream import UpstreamPool

#: Where a pod finds its account.
ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: Seconds of a watch. A connection that died without a word is noticed after one of them.
WATCH_S: Final = 120.0
#: Seconds that the end of a watch may be late.
_SLACK_S: Final = 15.0
_TIMEOUT_S: Final = 10.0
FIRST_WAIT_S: Final = 0.5
MAX_WAIT_S: Final = 30.0
#: Watches that end sooner are not begun anew at once.
_MIN_WATCH_S: Final = 1.0
_GONE: Final = 410
#: Of what a server says: it goes into logs and tables.
_MAX_REASON_CHARS: Final = 300
_CURES: Final = {
    401: "the service account's token is not accepted",
    403: "the service account needs a role that may list and watch endpointslices",
    404: "there is no discovery.k8s.io/v1: Kubernetes 1.21 has it",
}


class KubernetesSource:
    """One service."""

    linger_s: Final = 0.0

    def __init__(
        self,
        service: ServiceName,
        api_url: str,
        rng: Random,
        account: Path = ACCOUNT,
        watch_s: float = WATCH_S,
    ) -> None:
        self.name: Final = f"Kubernetes {service}"
        self._service: Final = service
        self._api_url: Final = api_url
        self._rng: Final = rng
        self._account: Final = account
        self._watch_s: Final = watch_s
        self._must_list = asyncio.Event()
        self._wait_s = 0.0

    def hurry(self) -> None:
        """Do not wait before the next try."""
        self._must_list.set()

    async def answers(self) -> AsyncGenerator[list[Told] | Failed, None]:
        """The endpoints whenever they change."""
        while True:
            try:
                async with contextlib.aclosing(self._follow()) as views:
                    async for view in views:
                        yield view
            except ExpiredError:
                is_first = not self._wait_s
                self._wait_s = min(MAX_WAIT_S, 2.0 * self._wait_s or FIRST_WAIT_S)
                if is_first:
                    continue
            except (OSError, ValueError) as error:
                # ssl.SSLError and TimeoutError are OSErrors; PageError and SliceError ValueErrors.
                yield Failed(_told(error))
                self._wait_s = min(MAX_WAIT_S, 2.0 * self._wait_s or FIRST_WAIT_S)
            await self._pause()

    async def _pause(self) -> None:
        """Wait, drawn so that many routers do not come at once."""
        self._must_list.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s * self._rng.uniform(0.5, 1.0)):
                await self._must_list.wait()

    async def _follow(self) -> AsyncGenerator[list[Told], None]:
        """List, then watch until something is wrong."""
        slices = EndpointSlices(self._service.port)
        loop = asyncio.get_running_loop()
        with contextlib.closing(self._pool(loop)) as pool:
            path = self._service.path
            page = await get_page(pool, path.encode(), self._authorization(), _TIMEOUT_S)
            if page.status != 200:
                raise StatusError(page.status)
            slices.replace(page.body)
            yield slices.view()
            while True:
                began = loop.time()
                async with contextlib.aclosing(self._watch(pool, slices)) as events:
                    async for changed in events:
                        self._wait_s = 0.0
                        if changed:
                            yield slices.view()
                lived_s = loop.time() - began
                if lived_s >= _MIN_WATCH_S:
                    self._wait_s = 0.0
                await asyncio.sleep(max(0.0, _MIN_WATCH_S - lived_s))

    async def _watch(
        self, pool: UpstreamPool, slices: EndpointSlices
    ) -> AsyncGenerator[bool, None]:
        """One watch; for each event whether it changed a slice."""
        query = (
            f"&watch=1&allowWatchBookmarks=true&timeoutSeconds={max(1, round(self._watch_s))}"
            f"&resourceVersion={slices.resource_version}"
        )
        path = f"{self._service.path}{query}".encode()
        silence_s = self._watch_s + _SLACK_S
        try:
            async with contextlib.aclosing(
                get_lines(pool, path, self._authorization(), silence_s)
            ) as lines:
                async for line in lines:
                    yield slices.apply(line)
        except StatusError as error:
            if error.status == _GONE:
                raise ExpiredError("the resourceVersion is too old") from None
            raise

    def _pool(self, loop: asyncio.AbstractEventLoop) -> UpstreamPool:
        authority = self._account / "ca.crt"
        tls = None
        if self._api_url.startswith("https:") and authority.exists():
            tls = ssl.create_default_context(cafile=str(authority))
        return UpstreamPool(self._api_url, loop, _TIMEOUT_S, tls)

    def _authorization(self) -> str:
        try:
            token = (self._account / "token").read_text("ascii").strip()
        except OSError as error:
            raise SliceError(f"there is no service account's token: {error}") from None
        except UnicodeDecodeError:
            raise SliceError("the service account's token is no token") from None
        return f"Bearer {token}"


def _told(error: Exception) -> str:
    if isinstance(error, StatusError) and error.status in _CURES:
        return f"{error}: {_CURES[error.status]}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, PageError | SliceError):
        # Whoever answers is a replica to those who read answers.
        return str(error).replace("the replica", "the API server")[:_MAX_REASON_CHARS]
    return f"the API server cannot be reached: {error}"[:_MAX_REASON_CHARS]
