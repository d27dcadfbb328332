"""Routers that share through Redis, while something befalls it: what do clients notice?

For each fault a fresh Redis, fresh routers and mock replicas; conversations whose turns come to
either router (fault_redis_load.py). Measured are the same time before the fault, while it lasts,
and windows after it until the hit rate is what it was. Mocks compute quickly (2 us a token), so
times to the first token are the router's more than theirs.

Beside the faults stand a router alone, two that share nothing, and two to which nothing happens:
what hit rate could be, what it would be without sharing, and how much all figures vary.

Not here: the faults (fault_redis_stages.py), routers that die (fault_redis_routers.py).
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import msgspec

from roost_loadtest.fault_engines import Router, body, running, sample_sum
from roost_loadtest.fault_redis_load import BLOCK_TOKENS, Figures, Load, Turn, figures
from roost_loadtest.fault_redis_stages import STAGES, Stage
from roost_loadtest.fleet_sim.model import StepTimes
from roost_loadtest.replay.mock_engines import MockConfig
from roost_loadtest.replay.run import start_mocks
from roost_router.store.secret import ClusterSecret

ALONE = "one router, no Redis"
UNSHARED = "two routers, no Redis"
TITLES = (ALONE, UNSHARED, *(stage.title for stage in STAGES))
#: A hit rate that is so near to what it was is what it was.
BACK_WITHIN = 0.02
_SECRET = b"the secret of a benchmark's routers"
_KV_TOKENS = 200_000
_TIMES = StepTimes(token_s=2e-6, pair_s=0.0, step_s=1e-3, context_s=0.0)
_AGAIN_S = 0.2
_LOOK_S = 0.1


class RedisFaultConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `roost bench redis-faults`. Seconds."""

    titles: tuple[str, ...] = TITLES
    clients: int = 32
    replicas: int = 4
    warm_s: float = 5.0
    before_s: float = 10.0
    fault_s: float = 10.0
    window_s: float = 5.0
    most_after_s: float = 60.0
    redis_version: str = "8.2"
    seed: int = 1


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A fault, and what clients had of it."""

    title: str
    before: Figures
    during: Figures
    after: Figures  # all that was measured then
    windows: list[float]  # hit rates of windows after the fault
    back_s: float | None  # the end of the first of them that is as before; None: none is
    sharing_s: float | None  # from the end of the fault until all routers heard each other again
    store_errors: float  # that the routers counted, and news they could not read
    examples: list[str]  # of failures

    @property
    def added_p99_ms(self) -> float:
        """The worse of during and after, less before."""
        return max(self.during.p99_ms, self.after.p99_ms) - self.before.p99_ms

    @property
    def failed(self) -> int:
        """Over all of it."""
        return self.before.failed + self.during.failed + self.after.failed


class Scene:
    """Mocks and routers of one row."""

    def __init__(
        self, urls: Sequence[str], routers: list[Router], folder: Path, redis_url: str | None
    ) -> None:
        self.urls = urls
        self.routers = routers
        self._folder = folder
        self._redis_url = redis_url

    def another_router(self) -> Router:
        """One more, that is not started yet."""
        return _router(self.urls, self._folder, self._redis_url)

    @property
    def ports(self) -> list[int]:
        """Of the routers."""
        return [router.port for router in self.routers]

    async def is_sharing(self) -> bool:
        """Whether each router tells, and hears all others."""
        pages = await self._metrics()
        return all(
            sample_sum(page, "roost_router_store_up") == 1
            and sample_sum(page, "roost_router_peers") == len(pages) - 1
            for page in pages
        )

    async def store_errors(self) -> float:
        """What all routers counted so far."""
        pages = await self._metrics()
        names = ("roost_router_store_errors_total", "roost_router_news_void_total")
        return sum(sample_sum(page, name) for page in pages for name in names)

    async def _metrics(self) -> list[str]:
        return [await body(f"{router.admin}/metrics") for router in self.routers]


def _key_prefix() -> bytes:
    """What keys of the routers begin with."""
    return ClusterSecret(_SECRET).prefix


def _router(urls: Sequence[str], folder: Path, redis_url: str | None) -> Router:
    """A router that is not started yet; it shares where there is a Redis."""
    options: list[str] = []
    if redis_url is not None:
        path = folder / "secret"
        path.write_bytes(_SECRET)
        options = ["--redis", redis_url, "--redis-secret-file", str(path)]
    return Router(urls, folder, options)


@asynccontextmanager
async def open_scene(
    folder: Path, redis_url: str | None, num_replicas: int, num_routers: int = 2
) -> AsyncIterator[Scene]:
    """Started, with all replicas up. PeerError or MocksError if something does not start."""
    config = MockConfig(times=_TIMES, kv_tokens=_KV_TOKENS, block_tokens=BLOCK_TOKENS)
    with ExitStack() as stack:
        mocks = await asyncio.to_thread(start_mocks, stack, config, num_replicas, folder)
        urls = [f"http://127.0.0.1:{port}" for port in mocks.ports]
        routers = [_router(urls, folder, redis_url) for _ in range(num_routers)]
        async with running(routers):
            for router in routers:
                await router.until_up()
            yield Scene(urls, routers, folder, redis_url)


async def run_redis_faults(config: RedisFaultConfig, progress: Callable[[str], None]) -> list[Row]:
    """Row by row. PeerError, MocksError, or RuntimeError where a Redis cannot be started."""
    rows = []
    by_title = {stage.title: stage for stage in STAGES}
    for title in config.titles:
        rows.append(await _row(title, by_title.get(title), config))
        last = rows[-1]
        progress(
            f"{title}: {last.failed} failed, hits {last.before.hit:.1%}, {last.during.hit:.1%}"
        )
    return rows


async def _row(title: str, kind: type[Stage] | None, config: RedisFaultConfig) -> Row:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stage: Stage | None = None
        if kind is not None:
            servers = stack.enter_context(ExitStack())
            stage = await asyncio.to_thread(
                kind, servers, config.redis_version, _key_prefix(), config.fault_s
            )
        url = None if stage is None else stage.url
        num_routers = 1 if title == ALONE else 2
        scene = await stack.enter_async_context(
            open_scene(folder, url, config.replicas, num_routers)
        )
        load = Load(scene.ports, config.clients, config.seed)
        try:
            return await _measure(title, stage, scene, load, config)
        finally:
            await load.stop()


async def _measure(
    title: str, stage: Stage | None, scene: Scene, load: Load, config: RedisFaultConfig
) -> Row:
    await asyncio.sleep(config.warm_s)
    errors = await scene.store_errors()
    began_at = time.monotonic()
    await asyncio.sleep(config.before_s)
    struck_at = time.monotonic()
    await _suffer(stage, config.fault_s)
    healed_at = time.monotonic()
    sharing = asyncio.create_task(_sharing_s(stage, scene, healed_at, config.most_after_s))
    before = figures(_between(load.turns, began_at, struck_at))
    windows: list[float] = []
    back_s = None
    while back_s is None or len(windows) < 2:  # enough turns for the times of after
        start, end = (healed_at + (len(windows) + n) * config.window_s for n in (0, 1))
        if end - healed_at > config.most_after_s:
            break
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        windows.append(figures(_between(load.turns, start, end)).hit)
        if back_s is None and windows[-1] >= before.hit - BACK_WITHIN:
            back_s = end - healed_at
    ended_at = time.monotonic()
    sharing_s = await sharing
    errors = await scene.store_errors() - errors
    await load.stop()
    turns = [turn for turn in load.turns if turn.sent_at < ended_at]
    return Row(
        title=title,
        before=before,
        during=figures(_between(turns, struck_at, healed_at)),
        after=figures(_between(turns, healed_at, ended_at)),
        windows=windows,
        back_s=back_s,
        sharing_s=sharing_s,
        store_errors=errors,
        examples=[how for turn in turns for *_, how in turn.lost][:3],
    )


async def _suffer(stage: Stage | None, fault_s: float) -> None:
    """The fault, from its beginning until it is healed."""
    if stage is None:
        await asyncio.sleep(fault_s)
        return
    until = time.monotonic() + fault_s
    await asyncio.to_thread(stage.strike)
    while time.monotonic() < until:
        await asyncio.to_thread(stage.again)
        await asyncio.sleep(min(_AGAIN_S, max(0.0, until - time.monotonic())))
    await asyncio.to_thread(stage.heal)


async def _sharing_s(
    stage: Stage | None, scene: Scene, healed_at: float, most_s: float
) -> float | None:
    """Seconds until all share again, or None; 0 where nothing is shared."""
    if stage is None:
        return 0.0
    while (passed_s := time.monotonic() - healed_at) < most_s:
        if await scene.is_sharing():
            return passed_s
        await asyncio.sleep(_LOOK_S)
    return None


def _between(turns: Sequence[Turn], start: float, end: float) -> list[Turn]:
    return [turn for turn in turns if start <= turn.sent_at < end]
