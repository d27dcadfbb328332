"""Requests that wait in the router, over real sockets: bound, cancelled, refused, never lost."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from roost_router.app import Router

PROMPT = "hello " * 2000


async def until(condition, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def body(text: str) -> dict[str, Any]:
    return {"model": "m", "stream": True, "messages": [{"role": "user", "content": text + PROMPT}]}


class Clients:
    """A router before one replica that has shown its speed, and answers when its gate opens."""

    def __init__(self, router: Router, replica: Any, session: aiohttp.ClientSession) -> None:
        self.router, self.replica, self._session = router, replica, session
        self.url = "http://{}:{}/v1/chat/completions".format(*router.address)
        for tokens in range(0, 40_000, 400):
            router.placer.fleet.replicas[0].speed.observe_ttft(tokens, tokens / 1000)
        replica.fault = "slow"

    def post(self, text: str, **headers: str) -> asyncio.Task[tuple[int, bytes, Any]]:
        return asyncio.create_task(self._post(text, headers))

    async def _post(self, text: str, headers: dict[str, str]) -> tuple[int, bytes, Any]:
        async with self._session.post(self.url, json=body(text), headers=headers) as answer:
            return answer.status, await answer.read(), answer.headers

    async def hold(self, *texts: str) -> list[asyncio.Task[tuple[int, bytes, Any]]]:
        """Make the replica busy, then have these wait for it."""
        busy = self.post("busy ")
        await until(lambda: len(self.replica.bodies) == 1)
        held = []
        for number, text in enumerate(texts, 1):
            held.append(self.post(text))
            await until(lambda n=number: self.num_held == n)
        return [busy, *held]

    async def metrics(self) -> bytes:
        url = "http://{}:{}/metrics".format(*self.router.admin_address)
        async with self._session.get(url) as answer:
            return await answer.read()

    @property
    def num_held(self) -> int:
        return self.router.service.dispatcher.num_held


@pytest.fixture
async def clients(start_router, replicas):
    router = await start_router(replicas[0], max_held=2, drain_s=0.2)
    async with aiohttp.ClientSession() as session:
        yield Clients(router, replicas[0], session)


async def test_a_held_request_goes_out_when_its_replica_can_start_it(clients):
    tasks = await clients.hold("first ", "second ")
    assert len(clients.replica.bodies) == 1
    assert b"roost_router_held_requests 2.0" in await clients.metrics()

    clients.replica.gate.set()
    answers = await asyncio.gather(*tasks)

    assert [status for status, _, _ in answers] == [200, 200, 200]
    assert all(text.endswith(b"data: [DONE]\n\n") for _, text, _ in answers)
    assert len(clients.replica.bodies) == 3
    assert clients.num_held == 0
    (replica,) = clients.router.placer.fleet.replicas
    assert (replica.queued_tokens, replica.num_in_flight, replica.num_decoding) == (0, 0, 0)


async def test_a_client_that_leaves_is_not_sent_out(clients):
    busy, held = await clients.hold("leaves ")
    held.cancel()
    await until(lambda: clients.num_held == 0)
    await until(lambda: clients.router.service.num_exchanges == 1)

    clients.replica.gate.set()
    assert (await busy)[0] == 200
    assert len(clients.replica.bodies) == 1


async def test_one_too_many_is_refused_and_told_when_to_come_back(clients):
    tasks = await clients.hold("first ", "second ")
    status, text, headers = await clients.post("third ")

    assert (status, headers["retry-after"]) == (503, "1")
    assert b'"too_many_held"' in text
    clients.replica.gate.set()
    assert [status for status, _, _ in await asyncio.gather(*tasks)] == [200, 200, 200]


async def test_the_time_that_a_client_gave_ends_the_wait(clients):
    await clients.hold()
    status, text, _ = await clients.post("late ", **{"x-request-timeout-s": "0.2"})

    assert status == 504
    assert b'"deadline_exceeded"' in text
    assert clients.num_held == 0
    assert len(clients.replica.bodies) == 1


async def test_a_replica_that_goes_leaves_nobody_waiting(clients):
    busy, held = await clients.hold("waits ")
    await clients.replica.stop()
    status, text, _ = await held

    assert status == 503
    assert b'"no_replica"' in text
    await asyncio.wait([busy])


async def test_a_router_that_stops_tells_those_it_holds(clients):
    _, held = await clients.hold("waits ")
    stopping = asyncio.create_task(clients.router.stop())
    status, text, _ = await held

    assert status == 503
    assert b'"router_stopped"' in text
    await stopping


async def test_a_receipt_shows_how_long_a_request_was_held(clients):
    _, held = await clients.hold("waits ")
    await asyncio.sleep(0.1)
    clients.replica.gate.set()
    _, _, headers = await held

    url = "http://{}:{}/explain/{}".format(*clients.router.admin_address, headers["x-request-id"])
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        (attempt,) = (await answer.json())["attempts"]
    assert attempt["at_s"] >= 0.1
