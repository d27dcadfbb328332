"""Composition root of the router: build everything, run, stop. Holds no choices of its own.

One process, or one worker of several: then its sockets are inherited, and a pipe tells its
supervisor what it does (supervisor.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from random import Random, SystemRandom
from typing import TYPE_CHECKING

from roost_router.admin import AdminService
from roost_router.compiled import is_compiled
from roost_router.config import ConfigError, RouterConfig
from roost_router.discovery.follow import Discovery
from roost_router.discovery.sources import make_sources
from roost_router.fleet.fleet import Fleet
from roost_router.http.service import DataService
from roost_router.index.prefix_index import PrefixIndex
from roost_router.index.token_knowledge import TokenKnowledge
from roost_router.kv.follow import KvFollower
from roost_router.kv.probe import probe
from roost_router.kv.source import KvSource
from roost_router.listening import BACKLOG, REPLACED, bind, inherited
from roost_router.metrics import RouterMetrics
from roost_router.placement import Placer
from roost_router.policy.registry import PolicyError, make_policy
from roost_router.policy.shadow import Shadow
from roost_router.poll import Poller
from roost_router.shared.journal import Journal
from roost_router.shared.stamps import Stamps
from roost_router.start_page import StartPage, start_page
from roost_router.tokens.drift import DriftChange
from roost_router.tokens.prompts import PromptTokens
from roost_router.tokens.service import TokenizerStartError
from roost_router.told_residency import ToldResidency

if TYPE_CHECKING:
    from roost_router.discovery.source import Source
    from roost_router.store.link import Link
    from roost_router.store.published_keys import KeyFollower
    from roost_router.store.sharing import Cluster
    from roost_router.store.spending import Spending

#: A start waits so long for what other routers know.
_CATCH_UP_S = 1.0
#: Of the memory for what KV events tell: for the text that it stands for.
_BINDING_SHARE = 0.25
_log = logging.getLogger(__name__)


def build_placer(config: RouterConfig, rng: Random) -> Placer:
    """The router's brain, without any I/O."""
    index = PrefixIndex()
    try:
        make_policy(config.policy)
        if config.shadow is not None:
            make_policy(config.shadow)
    except PolicyError as error:
        raise ConfigError(str(error)) from None
    fleet, make = Fleet(index, config.replicas), partial(make_policy, config.policy)
    return Placer(index, fleet, make, rng, _told_residency(config), journal=_journal(config))


def _journal(config: RouterConfig) -> Journal | None:
    """Notes what other routers should know, if there is a way to tell them."""
    if config.redis is None:
        return None
    router = SystemRandom().getrandbits(62)
    unix_at_zero = time.time() - time.monotonic()  # noqa: TID251 - an order among machines
    return Journal(router, Stamps(router, unix_at_zero))


def _told_residency(config: RouterConfig) -> ToldResidency | None:
    """What KV events tell; None where no tokenizer is given, without which they mean nothing."""
    if not config.tokenizers:
        return None
    num_bytes = config.kv_index_mb << 20
    binding_bytes = int(num_bytes * _BINDING_SHARE)
    knowledge = TokenKnowledge(num_bytes - binding_bytes, binding_bytes)
    return ToldResidency(knowledge, dict(config.tokenizers), _log_drift)


def _log_drift(change: DriftChange) -> None:
    _log.log(logging.WARNING if change.is_drifting else logging.INFO, "%s", change)


class Router:
    """One router process: data plane, admin plane, poller."""

    def __init__(self, config: RouterConfig, placer: Placer) -> None:
        self._config = config
        self.placer = placer
        metrics = RouterMetrics(_shadow(config.shadow))
        metrics.watch(placer)
        self.service = DataService(config, placer, metrics, time.monotonic, Random())
        self._admin = AdminService(self.service, self.service.access, config)
        self._cluster = self._open_cluster()
        self.discovery = Discovery(placer.fleet, self._make_sources(), time.monotonic)
        self.service.discovery = self.discovery
        metrics.watch_discovery(self.discovery.status, time.monotonic)
        self._discovering: asyncio.Task[None] | None = None
        self.poller: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._tokens, self._follower = self._kv_parts()
        self.link = self._make_link()
        self._keys = self._follow_keys()
        self._spending = self._tell_spending()
        self._telling: asyncio.Task[None] | None = None
        self.address = self.admin_address = ("", 0)

    async def start(self) -> None:
        """Listen, ask the replicas, accept. Raises ConfigError when a port cannot be bound.

        Clients that come before the replicas were asked wait: they would be told that there is
        none.
        """
        config = self._config
        with contextlib.ExitStack() as undo:
            data = undo.enter_context(_listener(config.host, config.port, config.listen_fd))
            admin = undo.enter_context(
                _listener(config.admin_host, config.admin_port, config.admin_listen_fd)
            )
            # A socket that another process opened may be one that other machines reach.
            config.check_hosts(data.getsockname()[0], admin.getsockname()[0])
            await self._begin_following()
            if self._cluster is not None:
                await self._cluster.store.start()
            data.listen(BACKLOG)
            await self._admin.listen(admin)
            self._discovering = asyncio.create_task(self.discovery.run())
            await self.discovery.until_told()
            await self._begin_polling()
            if self.link is not None:
                await self.link.start(_CATCH_UP_S)
            if self._keys is not None:
                await self._keys.start(_CATCH_UP_S)
            if self._spending is not None:
                await self._spending.tell()
                self._telling = asyncio.create_task(self._spending.run())
            await self.service.listen(data)
            self.address = data.getsockname()[:2]
            self.admin_address = admin.getsockname()[:2]
            undo.pop_all()

    def start_page(self, sources: Mapping[str, list[KvSource] | None]) -> StartPage:
        """What is known of the replicas by now. `sources`: of KV events, by replica."""
        page = self._admin.fleet_page()
        return start_page(page, sources, follows_events=self._follower is not None)

    async def _begin_polling(self) -> None:
        config = self._config
        poller = Poller(
            self.placer.fleet,
            config.poll_interval_s,
            config.poll_timeout_s,
            self.service.access.replica_authorization,
        )
        self.poller = asyncio.create_task(poller.run())
        asked = asyncio.create_task(poller.until_asked())
        await asyncio.wait({asked, self.poller}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()

    def _open_cluster(self) -> Cluster | None:
        """The store that routers share."""
        if self._config.redis is None:
            return None
        try:
            from roost_router.store.sharing import cluster_of  # noqa: PLC0415 - an extra's
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"--redis needs more packages ({error.name}): pip install 'roost[redis]'"
            ) from None
        return cluster_of(self._config)

    def _make_link(self) -> Link | None:
        """What tells other routers, and hears them."""
        if self._cluster is None:
            return None
        from roost_router.store.sharing import make_link  # noqa: PLC0415 - an extra's

        link = make_link(self._cluster, self.placer, time.monotonic)
        self.service.metrics.watch_store(link)
        return link

    def _follow_keys(self) -> KeyFollower | None:
        """What tells the keys that are published."""
        if self._cluster is None or not self._config.api_keys_redis:
            return None
        from roost_router.store.published_keys import KeyFollower, PublishedKeys  # noqa: PLC0415

        return KeyFollower(PublishedKeys(*self._cluster), self.service.access.published)

    def _tell_spending(self) -> Spending | None:
        """What tells others how much of their limits clients have spent here."""
        if self._cluster is None or self.link is None or not self._config.asks_for_keys:
            return None
        from roost_router.store.spending import Spending  # noqa: PLC0415 - an extra's

        return Spending(self.link, self._cluster.secret, self.service.access.quotas, time.monotonic)

    def _make_sources(self) -> list[Source]:
        """Where replicas are found."""
        sources = make_sources(self._config, Random())
        if self._cluster is not None and self._config.replicas_redis:
            from roost_router.discovery.registry import RegistrySource  # noqa: PLC0415
            from roost_router.store.members import Members  # noqa: PLC0415

            sources.append(RegistrySource(Members(*self._cluster), time.monotonic))
        return sources

    def _kv_parts(self) -> tuple[PromptTokens | None, KvFollower | None]:
        """What follows KV events and tokenises prompts."""
        config, placer, told = self._config, self.placer, self.placer.told
        if told is None:
            return None, None
        authorization = self.service.access.replica_authorization
        tokens = PromptTokens(
            dict(config.tokenizers),
            told,
            placer.fleet.is_adapter,
            num_workers=config.tokenizer_workers,
        )
        follower = KvFollower(
            placer.fleet,
            told.sink,
            authorization,
            time.monotonic,
            lambda name, is_asked: told.report_reuse(name, is_asked=is_asked),
            on_load=placer.fleet.load_told,
        )
        self.service.metrics.watch_kv(told, tokens, follower)
        return tokens, follower

    async def _begin_following(self) -> None:
        if self._tokens is None or self._follower is None:
            return
        try:
            await self._tokens.start()
        except TokenizerStartError as error:
            raise ConfigError(f"--tokenizer: {error}") from None
        self.service.tokens, self.service.follower = self._tokens, self._follower
        self._following = asyncio.create_task(self._follower.run())

    def reload(self) -> None:
        """Read keys again, and ask all sources of replicas at once."""
        self.service.access.reload()
        self.discovery.hurry()

    async def stop(self, *, replaced: bool = False) -> None:
        """Drain: readiness first, then streams finish, then everything closes.

        `replaced`: a successor accepts on the same sockets and answers for this router.
        """
        config, service = self._config, self.service
        service.is_draining = True
        if not replaced:
            await asyncio.sleep(config.drain_delay_s)
        service.stop_accepting()
        if config.status_fd is not None:
            os.close(config.status_fd)
        if replaced:
            await self._admin.close()
        await service.drain(config.drain_s)
        if self._spending is not None:
            await self._spending.tell()
        if self.link is not None:
            await self.link.close()
        for task in (self._discovering, self.poller, self._following, self._telling):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self._tokens is not None:
            await self._tokens.stop()
        if self._keys is not None:
            await self._keys.close()
        if self._cluster is not None:
            await self._cluster.store.close()
        await self._admin.close()


async def run_router(
    config: RouterConfig, on_start: Callable[[StartPage], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises ConfigError.

    `on_start`: told what was found of the replicas, once they were asked.
    """
    router = Router(config, build_placer(config, Random()))
    await router.start()
    stop = _StopSignals(config)
    host, port = router.address
    admin_host, admin_port = router.admin_address
    _log.info("routing on http://%s:%d, admin on http://%s:%d", host, port, admin_host, admin_port)
    if not is_compiled():
        _log.info("the data path is interpreted, not compiled: it costs more CPU")
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, router.reload)
    if config.status_fd is not None:
        os.write(config.status_fd, b"1")
    telling = None
    if on_start is not None:
        telling = asyncio.create_task(_tell(router, on_start))
    try:
        await stop.wait(router.poller)
        _log.info("draining %d requests", router.service.num_exchanges)
    finally:
        if telling is not None:
            telling.cancel()
        await router.stop(replaced=stop.is_replaced)


async def _tell(router: Router, on_start: Callable[[StartPage], None]) -> None:
    authorization = router.service.access.replica_authorization()
    sources = await probe(router.placer.fleet.replicas, authorization)
    on_start(router.start_page(sources))


def _shadow(policy: str | None) -> Shadow | None:
    return None if policy is None else Shadow(policy, partial(make_policy, policy), Random())


class _StopSignals:
    """Why a router is to stop: SIGTERM, SIGINT, its lifeline's end, or a successor."""

    def __init__(self, config: RouterConfig) -> None:
        self.is_replaced = False
        self._event = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._event.set)
        if config.status_fd is not None:
            loop.add_signal_handler(REPLACED, self._replaced)
        self._lifeline_fd = config.lifeline_fd
        if self._lifeline_fd is not None:  # nothing is ever written: readable means closed
            loop.add_reader(self._lifeline_fd, self._orphaned)

    async def wait(self, poller: asyncio.Task[None] | None) -> None:
        """Return when there is a reason to stop; raise if the poller breaks."""
        assert poller is not None
        waiting = asyncio.create_task(self._event.wait())
        await asyncio.wait({waiting, poller}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if poller.done():
            poller.result()

    def _replaced(self) -> None:
        self.is_replaced = True
        self._event.set()

    def _orphaned(self) -> None:
        assert self._lifeline_fd is not None
        asyncio.get_running_loop().remove_reader(self._lifeline_fd)
        self._event.set()


def _listener(host: str, port: int, fd: int | None) -> socket.socket:
    return bind(host, port) if fd is None else inherited(fd)
