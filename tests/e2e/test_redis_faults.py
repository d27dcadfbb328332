"""Redis fails, or a router dies, under load: no client loses anything, and sharing comes back."""

from __future__ import annotations

import pytest

from roost_loadtest.fault_redis import RedisFaultConfig, run_redis_faults
from roost_loadtest.fault_redis_routers import RouterFaultConfig, run_cold, run_kills
from roost_loadtest.fault_redis_stages import BlackHole, Flushed, Killed, Moved, Poisoned

LEAVES_ERRORS = {Killed.title, BlackHole.title, Poisoned.title}


def silent(_: str) -> None:
    """Tests show no progress."""


@pytest.mark.parametrize("kind", [Killed, BlackHole, Flushed, Moved, Poisoned])
async def test_no_fault_of_redis_loses_a_request_or_ends_the_sharing(kind):
    config = RedisFaultConfig(
        titles=(kind.title,), clients=8, warm_s=1.0, before_s=1.0, fault_s=2.0, window_s=1.0
    )

    [row] = await run_redis_faults(config, silent)

    assert row.failed == 0, row.examples
    assert min(row.before.requests, row.during.requests, row.after.requests) > 0
    assert row.sharing_s is not None
    assert row.store_errors or kind.title not in LEAVES_ERRORS  # it did befall the routers


async def test_a_router_that_is_killed_loses_only_what_it_was_answering():
    config = RouterFaultConfig(kills=2, clients=8, warm_s=1.0)

    report = await run_kills(config, silent)

    assert report.all.failed == 0
    assert report.lost_elsewhere == []
    assert report.in_flight + report.refused > 0  # or it was not noticed that it died


async def test_a_router_that_starts_cold_serves_at_once():
    report = await run_cold(
        RouterFaultConfig(colds=1, clients=8, warm_s=1.0), silent, has_redis=True
    )

    assert len(report.start_s) == 1
    assert all(hit > 0 for hit in report.cold_hits)
