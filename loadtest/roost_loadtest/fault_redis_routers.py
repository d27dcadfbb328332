"""Routers that share, of which one dies, or one is started cold.

    kills   SIGKILL for one of two routers at random times, and a new start. Clients ask the other
            one again, as a load balancer does. What was in flight in the dead one is lost with its
            connections; nothing else may be
    cold    a third router joins two that have worked for a while: how soon does it hit as they do?
            And without Redis, for comparison

Not here: the conversations (fault_redis_load.py), faults of Redis itself (fault_redis.py).
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random

import msgspec

from roost_loadtest.fault_redis import BACK_WITHIN, Scene, open_scene
from roost_loadtest.fault_redis_load import Figures, Load, Turn, figures
from roost_loadtest.redis_servers import RedisServer

_RETRIES = 4
_WINDOW_S = 1.0
_WINDOWS = 4


class RouterFaultConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What is played. Seconds."""

    kills: int = 20
    colds: int = 12
    clients: int = 32
    replicas: int = 4
    warm_s: float = 5.0
    redis_version: str = "8.2"
    seed: int = 1


class KillsReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `run_kills` found."""

    kills: int
    all: Figures  # failed: turns that nobody answered
    in_flight: int  # attempts that ended with a router that was killed
    refused: int  # attempts at a router that was dead
    lost_elsewhere: list[str]  # attempts that failed at a living one


class ColdReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `run_cold` found, over all its starts."""

    is_sharing: bool
    start_s: list[float]  # from the start of the process until it was ready
    cold_hits: list[float]  # second by second since then
    peer_hits: list[float]

    @property
    def even_s(self) -> float | None:
        """The end of the first second in which it hit as its peers do; None: never."""
        for number, (cold, peers) in enumerate(zip(self.cold_hits, self.peer_hits, strict=True)):
            if cold >= peers - BACK_WITHIN:
                return (number + 1) * _WINDOW_S
        return None


@asynccontextmanager
async def _played(
    config: RouterFaultConfig, *, has_redis: bool
) -> AsyncIterator[tuple[Scene, Load]]:
    """Two warm routers under load, which ends with the block."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = None
        if has_redis:
            url = stack.enter_context(RedisServer(config.redis_version)).url
        scene = await stack.enter_async_context(open_scene(folder, url, config.replicas))
        load = Load(scene.ports, config.clients, config.seed, retries=_RETRIES)
        try:
            await asyncio.sleep(config.warm_s)
            yield scene, load
        finally:
            await load.stop()


async def run_kills(config: RouterFaultConfig, progress: Callable[[str], None]) -> KillsReport:
    """PeerError if a router does not start again."""
    rng = Random(config.seed)
    dead: list[tuple[int, float, float]] = []  # router, from, to
    async with _played(config, has_redis=True) as (scene, load):
        for number in range(config.kills):
            await asyncio.sleep(rng.uniform(0.5, 2.0))
            victim = rng.randrange(len(scene.routers))
            died_at = time.monotonic()
            await scene.routers[victim].kill()
            await asyncio.sleep(rng.uniform(0.0, 1.0))
            await scene.routers[victim].start()
            dead.append((victim, died_at, time.monotonic()))
            progress(f"kill {number + 1} of {config.kills}")
        await asyncio.sleep(config.warm_s)
    in_flight = refused = 0
    elsewhere = []
    for turn in load.turns:
        for router, sent_at, ended_at, how in turn.lost:
            if not any(r == router and a <= ended_at and sent_at <= b for r, a, b in dead):
                elsewhere.append(how)
            elif how.startswith("refused"):
                refused += 1
            else:
                in_flight += 1
    return KillsReport(
        kills=len(dead),
        all=figures(load.turns),
        in_flight=in_flight,
        refused=refused,
        lost_elsewhere=elsewhere,
    )


async def run_cold(
    config: RouterFaultConfig, progress: Callable[[str], None], *, has_redis: bool
) -> ColdReport:
    """PeerError if a router does not start."""
    start_s = []
    windows: list[tuple[list[Turn], list[Turn]]] = [([], []) for _ in range(_WINDOWS)]
    async with _played(config, has_redis=has_redis) as (scene, load):
        for number in range(config.colds):
            cold = scene.another_router()
            try:
                start_s.append(await cold.start())
                await cold.until_up()
                ready_at = time.monotonic()
                load.ports.append(cold.port)
                await asyncio.sleep(_WINDOWS * _WINDOW_S)
                load.ports.pop()
                await asyncio.sleep(_WINDOW_S)  # its last turns end
            finally:
                await cold.stop()
            for turn in load.turns:
                window = int((turn.sent_at - ready_at) // _WINDOW_S)
                if 0 <= window < _WINDOWS:
                    windows[window][turn.router == 2].append(turn)
            progress(f"cold start {number + 1} of {config.colds}")
    return ColdReport(
        is_sharing=has_redis,
        start_s=start_s,
        peer_hits=[figures(peers).hit for peers, _ in windows],
        cold_hits=[figures(cold).hit for _, cold in windows],
    )
