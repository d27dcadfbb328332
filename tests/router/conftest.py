from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random

import pytest
import uvloop
from fake_replica import FakeReplica

from roost_router.app import Router, build_placer
from roost_router.config import RouterConfig

StartRouter = Callable[..., Awaitable[Router]]


def pytest_asyncio_loop_factories(config, item):
    """The router runs on uvloop; so do its tests."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def replicas() -> AsyncIterator[list[FakeReplica]]:
    """Two fake replicas of model "m"."""
    fakes = [await FakeReplica().start() for _ in range(2)]
    yield fakes
    for fake in fakes:
        fake.gate.set()
        await fake.stop()


@pytest.fixture
async def start_router() -> AsyncIterator[StartRouter]:
    """Start routers on free ports; returns when they know their replicas."""
    routers: list[Router] = []

    async def start(*fakes: FakeReplica, **options: object) -> Router:
        urls = tuple(fake.url for fake in fakes)
        defaults: dict[str, object] = {"port": 0, "admin_port": 0, "poll_interval_s": 0.05}
        config = RouterConfig(replicas=urls, **{**defaults, "drain_s": 2.0, **options})
        router = Router(config, build_placer(config, Random(1)))
        await router.start()
        routers.append(router)
        await until(lambda: all(r.is_up for r in router.placer.fleet.replicas))
        return router

    yield start
    for router in routers:
        await router.stop()


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for `condition`; fails the test when it does not come true."""
    import asyncio

    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
