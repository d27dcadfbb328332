"""The fault proxy strikes exactly where it is told and leaves everything else alone."""

from __future__ import annotations

import pytest

from roost_loadtest.fault_answer import Verdict
from roost_loadtest.fault_client import Client
from roost_loadtest.fault_proxy import FAULT_ID, FaultProxy, Kill, KillKind, Plans
from roost_loadtest.fault_replica import FaultyReplica
from roost_loadtest.fault_words import expected, request_body

COUNT = 10
PROMPT = "how deep is the harbour?"
WANTED = expected(PROMPT, COUNT, exact_usage=True)
VERDICTS = {
    KillKind.RST: Verdict.CUT,
    KillKind.FIN: Verdict.CUT,
    KillKind.TORN: Verdict.CUT,
    KillKind.EOF: Verdict.SILENT,
    KillKind.HANG: Verdict.HANG,
}


@pytest.fixture
async def replica():
    replica = await FaultyReplica("roost", first_s=0.001, pace_s=0.001).start()
    yield replica
    await replica.stop()


@pytest.mark.parametrize("kind", KillKind)
async def test_a_kill_comes_after_its_event_and_only_once(replica, kind):
    plans = Plans()
    async with FaultProxy(0, replica.port, plans) as proxy:
        for after in range(COUNT):
            plans.add(f"r{after}", [Kill(kind, after)])
            ask = {"headers": {FAULT_ID: f"r{after}"}, "patience_s": 0.2}

            first = await Client(proxy.port).ask(request_body(PROMPT, COUNT), WANTED, **ask)
            second = await Client(proxy.port).ask(request_body(PROMPT, COUNT), WANTED, **ask)

            assert first.verdict is VERDICTS[kind], (after, first.detail)
            assert first.num_events == after
            assert second.verdict is Verdict.OK
            legs = plans.legs[f"r{after}"]
            assert [leg.killed for leg in legs] == [Kill(kind, after), None]


async def test_requests_without_a_plan_pass_on_kept_connections(replica):
    async with FaultProxy(0, replica.port, Plans()) as proxy:
        client = Client(proxy.port)
        for number in range(5):
            headers = {FAULT_ID: f"k{number}"} if number % 2 else {}
            outcome = await client.ask(
                request_body(PROMPT, COUNT), WANTED, keep=True, headers=headers
            )
            assert outcome.verdict is Verdict.OK
        assert client.num_connections == 1
        await client.close()


async def test_a_position_beyond_the_answer_is_no_kill(replica):
    plans = Plans()
    plans.add("far", [Kill(KillKind.RST, 100)])
    async with FaultProxy(0, replica.port, plans) as proxy:
        outcome = await Client(proxy.port).ask(
            request_body(PROMPT, COUNT), WANTED, headers={FAULT_ID: "far"}
        )

    assert outcome.verdict is Verdict.OK
    assert plans.legs["far"][0].killed is None


async def test_a_client_that_leaves_reaches_the_replica_through_the_proxy(replica):
    async with FaultProxy(0, replica.port, Plans()) as proxy:
        await Client(proxy.port).ask(
            request_body(PROMPT, 10_000), leave=lambda answer: len(answer.arrivals) > 2
        )
        while not replica.aborted_at:
            await Client(proxy.port).ask(request_body(PROMPT, 1))
