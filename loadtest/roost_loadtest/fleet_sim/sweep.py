"""Simulate policies on traces at loads, one after the other: what `roost sim` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, TypeVar

import msgspec

from roost_loadtest.fleet_sim.cache import BlockCache
from roost_loadtest.fleet_sim.engine_replica import EngineReplica
from roost_loadtest.fleet_sim.events import FleetRun, TellsLoad
from roost_loadtest.fleet_sim.load import time_scale, work_s
from roost_loadtest.fleet_sim.model import StepTimes
from roost_loadtest.fleet_sim.replica import SimReplica
from roost_loadtest.fleet_sim.routers import LeastWaitRouter, RealRouters, Router
from roost_loadtest.fleet_sim.summary import Row, Slo, summarise
from roost_loadtest.fleet_sim.told import BlockNews, EventDelays, check_can_tell

if TYPE_CHECKING:
    from roost_loadtest.fleet_sim.replica import Replica
    from roost_loadtest.fleet_sim.trace import Trace
    from roost_router.policy.interface import Policy

_T = TypeVar("_T")

#: The row of the bound: least wait, one cache of the fleet's whole size shared by all.
BOUND = "shared-cache bound"


class FleetConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet and how its routers see it."""

    num_replicas: int = 8
    is_engine: bool = False  # its scheduler and block pool; else the closed form. Never the bound's
    # Of the replicas in turn, over and over:
    kv_tokens: tuple[int, ...] = (500_000,)
    speeds: tuple[float, ...] = (1.0,)  # 2: twice as fast as `times` say
    #: Routers begin with prefill speeds fitted wrong by these factors; none: without a fit.
    misfits: tuple[float, ...] = ()
    times: StepTimes = StepTimes()
    num_routers: int = 1
    news_after_s: float | None = None  # what one does, others know so much later; None: never
    hears_after_s: float = 0.0  # what replicas tell reaches routers so much later
    poll_interval_s: float = 1.0  # between two load reports
    tells: TellsLoad = TellsLoad.REQUESTS
    delays: EventDelays | None = None  # of KV events; None: routers follow none
    seed: int = 0
    slo: Slo = Slo()

    def of_each(self, values: tuple[_T, ...]) -> list[_T]:
        """What each replica gets of `values`, in turn."""
        return list(islice(cycle(values), self.num_replicas))


def sweep(
    trace: Trace,
    config: FleetConfig,
    *,
    loads: tuple[float, ...],
    policies: dict[str, Callable[[], Policy]],
    bound: bool = True,
    on_progress: Callable[[str, float, int], None] | None = None,
) -> Iterator[Row]:
    """A row for each load and policy, then the bound's, as each is done.

    `on_progress` gets policy, load and requests done. Raises TooLargeError for a request that no
    replica could hold, NoEventsError for a trace of which KV events cannot tell.
    """
    if config.delays is not None and not config.is_engine:
        check_can_tell(trace)
    work = work_s(trace, config.times, min(config.of_each(config.kv_tokens)))
    speed = sum(config.of_each(config.speeds))
    makers: dict[str, Callable[[], Policy] | None] = dict(policies)
    if bound:
        makers[BOUND] = None
    for load in loads:
        scale = time_scale(trace, work, speed, load)
        for name, make_policy in makers.items():
            progress = None
            if on_progress is not None:
                progress = _bind(on_progress, name, load)
            replicas, router = _fleet(trace, config, make_policy)
            jobs = FleetRun(
                trace,
                replicas,
                router,
                time_scale=scale,
                hears_after_s=config.hears_after_s,
                poll_interval_s=config.poll_interval_s,
                tells=config.tells,
                delays=config.delays if make_policy is not None else None,
                news_after_s=config.news_after_s if config.num_routers > 1 else None,
                shares_cache=make_policy is None,
                on_progress=progress,
            ).run()
            yield summarise(
                jobs, replicas, trace=trace.name, load=load, policy=name, slo=config.slo
            )


def _bind(
    on_progress: Callable[[str, float, int], None], name: str, load: float
) -> Callable[[int], None]:
    return lambda num_done: on_progress(name, load, num_done)


def _fleet(
    trace: Trace, config: FleetConfig, make_policy: Callable[[], Policy] | None
) -> tuple[Sequence[Replica], Router]:
    block_tokens, kv_tokens = trace.block_tokens, config.of_each(config.kv_tokens)
    times = [config.times.at_speed(speed) for speed in config.of_each(config.speeds)]
    if make_policy is None:
        shared = BlockCache(sum(tokens // block_tokens for tokens in kv_tokens))
        sharing = [SimReplica(each, shared, block_tokens) for each in times]
        return sharing, LeastWaitRouter(sharing, config.seed)
    make = _engine_replica if config.is_engine else _model_replica
    tells = config.delays is not None
    replicas = [
        make(each, tokens, block_tokens, tells)
        for each, tokens in zip(times, kv_tokens, strict=True)
    ]
    misfits = config.of_each(config.misfits)
    return replicas, RealRouters(
        make_policy,
        num_routers=config.num_routers,
        reports=[replica.report() for replica in replicas],
        block_tokens=block_tokens,
        seed=config.seed,
        tells_tokens=config.is_engine,
        delays=config.delays,
        tell_each_other=config.news_after_s is not None,
        first_fits=[wrong / each.token_s for wrong, each in zip(misfits, times, strict=False)],
    )


def _model_replica(times: StepTimes, kv_tokens: int, block_tokens: int, tells: bool) -> Replica:
    news = BlockNews(block_tokens) if tells else None
    cache = BlockCache(kv_tokens // block_tokens, news.removed if news is not None else None)
    return SimReplica(times, cache, block_tokens, news)


def _engine_replica(times: StepTimes, kv_tokens: int, block_tokens: int, tells: bool) -> Replica:
    return EngineReplica(times, kv_tokens, block_tokens, tells=tells)
