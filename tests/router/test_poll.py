"""What is asked of replicas again and again, as llama.cpp answers it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from roost_router.fleet.fleet import Fleet
from roost_router.index.prefix_index import PrefixIndex
from roost_router.poll import Poller

METRICS = "llamacpp:requests_processing 3\nllamacpp:requests_deferred 1\n"
PROPS = '{"default_generation_settings":{"n_ctx":2048},"total_slots":8,"chat_template":"{{x}}"}'


class LlamaCpp:
    """Pages as llama-server writes them. `metrics_wait` for as long as a step takes."""

    def __init__(self) -> None:
        self.owner, self.props, self.metrics_wait = "llamacpp", PROPS, False
        self.num_asked = 0
        self.paths: set[str] = set()
        self.port = 0

    async def answer(self, request: web.Request) -> web.Response:
        self.paths.add(request.path)
        if request.path == "/v1/models":
            self.num_asked += 1
            model = {"id": "m", "object": "model", "owned_by": self.owner, "meta": {"n_ctx": 2048}}
            return web.json_response({"object": "list", "data": [model]})
        if request.path == "/metrics":
            while self.metrics_wait:
                await asyncio.sleep(0.01)
            return web.Response(text=METRICS)
        return web.Response(text=self.props)


@pytest.fixture
async def server() -> AsyncIterator[LlamaCpp]:
    found = LlamaCpp()
    app = web.Application()
    app.router.add_get("/{path:.*}", found.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.port = runner.addresses[0][1]
    yield found
    found.metrics_wait = False
    await runner.cleanup()


@pytest.fixture
async def fleet(server) -> AsyncIterator[Fleet]:
    fleet = Fleet(PrefixIndex(), [f"http://127.0.0.1:{server.port}"])
    poller = Poller(fleet, 0.02, 0.2, lambda: None)
    task = asyncio.create_task(poller.run())
    yield fleet
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def polled(server: LlamaCpp, times: int) -> None:
    """Return when so many polls have been begun and one less is over."""
    until = server.num_asked + times
    async with asyncio.timeout(10):
        while server.num_asked <= until:
            await asyncio.sleep(0.01)


async def test_llama_cpp_tells_its_load_and_its_slots(server, fleet):
    await polled(server, 2)

    (replica,) = fleet.replicas
    assert replica.is_up
    report = replica.report
    assert (report.num_running, report.num_waiting, report.max_running) == (3, 1, 8)
    assert replica.kept.is_by_slot


async def test_nobody_else_is_asked_for_props(server, fleet):
    server.owner = "vllm"
    await polled(server, 2)

    (replica,) = fleet.replicas
    assert replica.report.max_running is None
    assert "/props" not in server.paths
    assert not replica.kept.is_by_slot


@pytest.mark.parametrize("props", ["", "{", "[]", '{"total_slots":0}', '{"total_slots":65537}'])
async def test_props_that_say_nothing_are_no_failure(server, fleet, props):
    server.props = props
    await polled(server, 2)

    (replica,) = fleet.replicas
    assert replica.is_up
    assert (replica.report.num_running, replica.report.max_running) == (3, None)


async def test_a_page_that_waits_for_a_long_step_takes_nobody_down(server, fleet):
    await polled(server, 2)
    (replica,) = fleet.replicas
    before = replica.report
    server.metrics_wait = True
    await polled(server, 5)

    assert replica.is_up
    assert replica.num_failed_polls == 0
    assert replica.report == before
