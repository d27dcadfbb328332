"""Composition root of the router: build everything, run, stop. Holds no choices of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from random import Random

from aiohttp import web

from roost_router.access import Access
from roost_router.admin import make_admin_app
from roost_router.config import ConfigError, RouterConfig
from roost_router.fleet.fleet import Fleet
from roost_router.http.service import DataService
from roost_router.index.prefix_index import PrefixIndex
from roost_router.metrics import RouterMetrics
from roost_router.placement import Placer
from roost_router.policy.cost import CostPolicy
from roost_router.poll import Poller

_log = logging.getLogger(__name__)
#: aiohttp would log a traceback and the raw line of each malformed request.
_silent = logging.getLogger(f"{__name__}.admin_protocol")
_silent.disabled = True


def build_placer(config: RouterConfig, rng: Random) -> Placer:
    """The router's brain, without any I/O."""
    index = PrefixIndex()
    return Placer(index, Fleet(index, config.replicas), CostPolicy(), rng)


class Router:
    """One router process: data plane, admin plane, poller."""

    def __init__(self, config: RouterConfig, placer: Placer) -> None:
        self._config = config
        self.placer = placer
        self.access = Access(config)
        metrics = RouterMetrics()
        metrics.watch(placer)
        self.service = DataService(config, placer, metrics, time.monotonic, Random())
        self._admin = web.AppRunner(
            make_admin_app(self.service, self.access),
            access_log=None,
            logger=_silent,
            keepalive_timeout=75.0,
        )
        self.poller: asyncio.Task[None] | None = None
        self.address = self.admin_address = ("", 0)

    async def start(self) -> None:
        """Listen and begin to poll. Raises ConfigError when a port cannot be bound."""
        config = self._config
        with contextlib.ExitStack() as undo:
            data = undo.enter_context(bind(config.host, config.port))
            admin = undo.enter_context(bind(config.admin_host, config.admin_port))
            await self._admin.setup()
            await web.SockSite(self._admin, admin).start()
            await self.service.listen(data)
            self.address = data.getsockname()[:2]
            self.admin_address = admin.getsockname()[:2]
            undo.pop_all()
        poller = Poller(
            self.placer.fleet,
            config.poll_interval_s,
            config.poll_timeout_s,
            self.access.replica_authorization,
        )
        self.poller = asyncio.create_task(poller.run())

    async def stop(self) -> None:
        """Drain: readiness first, then streams finish, then everything closes."""
        await self.service.drain(self._config.drain_s)
        if self.poller is not None:
            self.poller.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.poller
        await self._admin.cleanup()


async def run_router(config: RouterConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises ConfigError."""
    router = Router(config, build_placer(config, Random()))
    await router.start()
    host, port = router.address
    admin_host, admin_port = router.admin_address
    _log.info("routing on http://%s:%d, admin on http://%s:%d", host, port, admin_host, admin_port)
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, router.access.reload)
    try:
        await _stop_requested(config.lifeline_fd, router.poller)
        _log.info("draining %d requests", router.service.num_exchanges)
    finally:
        await router.stop()


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises ConfigError with one line that says what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; stop what uses it or choose another port"
        ) from None
    return sock


async def _stop_requested(lifeline_fd: int | None, poller: asyncio.Task[None] | None) -> None:
    """Return on a stop signal or the end of the lifeline; raise if the poller breaks."""
    assert poller is not None
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if lifeline_fd is not None:
        loop.add_reader(lifeline_fd, stop.set)  # nothing is ever written: readable means closed
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait({waiting, poller}, return_when=asyncio.FIRST_COMPLETED)
    if lifeline_fd is not None:
        loop.remove_reader(lifeline_fd)
    waiting.cancel()
    if poller.done():
        poller.result()
