"""A router that stops: what clients on kept connections see."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from random import Random

import aiohttp

from roost_router.app import Router, build_placer
from roost_router.config import RouterConfig

MODELS = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"
BODY = json.dumps({"model": "m", "messages": [], "stream": True}).encode()
STREAM = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%b" % (
    len(BODY),
    BODY,
)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def answer_of(reader: asyncio.StreamReader) -> bytes:
    """One answer with a Content-Length."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head + await reader.readexactly(length)


async def test_a_kept_connection_is_served_during_a_drain_and_told_that_it_ends(
    start_router, replicas
):
    router = await start_router(*replicas)
    reader, writer = await asyncio.open_connection(*router.address)
    writer.write(MODELS)
    before = await answer_of(reader)
    stopping = asyncio.create_task(router.stop())
    await until(lambda: router.service.is_draining)

    writer.write(MODELS)
    after = await reader.read()
    await stopping

    assert b"connection: close" not in before
    assert after.startswith(b"HTTP/1.1 200 OK")
    assert b"connection: close" in after
    writer.close()


async def test_a_client_that_pipelines_into_a_drain_gets_its_first_answer_whole(
    start_router, replicas
):
    """Closing with requests of its unread would reset the connection, and the answer with it."""
    router = await start_router(*replicas)
    reader, writer = await asyncio.open_connection(*router.address)
    writer.write(MODELS)
    await answer_of(reader)
    stopping = asyncio.create_task(router.stop())
    await until(lambda: router.service.is_draining)

    writer.write(MODELS)
    for _ in range(20):
        writer.write(MODELS)
        await asyncio.sleep(0)
    after = await reader.read()
    writer.close()
    await stopping

    assert after.count(b"HTTP/1.1 200 OK") == 1
    assert after.endswith(b"]}")


async def test_a_connection_that_stays_quiet_is_closed(start_router, replicas):
    router = await start_router(*replicas, drain_s=60.0)
    reader, writer = await asyncio.open_connection(*router.address)
    writer.write(MODELS)
    await answer_of(reader)

    async with asyncio.timeout(30):
        await router.stop()
        assert await reader.read() == b""

    writer.close()


async def test_a_stream_that_began_before_is_not_closed_before_its_client_was_told(
    start_router, replicas
):
    """Its head said that the connection stays, so the next request may be on its way."""
    router = await start_router(replicas[0])
    replicas[0].fault = "hang"
    reader, writer = await asyncio.open_connection(*router.address)
    writer.write(STREAM)
    head = await reader.readuntil(b"\r\n\r\n")
    stopping = asyncio.create_task(router.stop())
    await until(lambda: router.service.is_draining)
    replicas[0].gate.set()
    rest = await reader.readuntil(b"\r\n0\r\n\r\n")
    assert b"[DONE]" in rest

    writer.write(MODELS)
    after = await reader.read()
    await stopping

    assert b"connection: close" not in head
    assert after.startswith(b"HTTP/1.1 200 OK")
    assert b"connection: close" in after
    writer.close()


async def test_a_stream_that_does_not_end_in_time_is_cut_with_a_reason(start_router, replicas):
    router = await start_router(replicas[0], drain_s=0.1)
    replicas[0].fault = "hang"
    reader, writer = await asyncio.open_connection(*router.address)
    writer.write(STREAM)
    await reader.readuntil(b" two")

    await router.stop()
    rest = await reader.read()

    assert b"the router was stopped" in rest
    assert b'"upstream_lost"' in rest
    assert b"[DONE]" not in rest
    assert not rest.endswith(b"0\r\n\r\n")
    writer.close()


async def test_an_answer_that_has_not_begun_in_time_is_an_error(start_router, replicas):
    router = await start_router(replicas[0], drain_s=0.1)
    replicas[0].fault = "slow"
    reader, writer = await asyncio.open_connection(*router.address)
    writer.write(STREAM)
    await until(lambda: router.service.num_exchanges == 1)

    await router.stop()
    answer = await reader.read()

    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"the router was stopped" in answer
    writer.close()


async def test_readiness_goes_first_and_clients_are_still_let_in(start_router, replicas):
    """A load balancer needs time to see it."""
    router = await start_router(*replicas, drain_delay_s=1.0)
    admin = "http://{}:{}/ready".format(*router.admin_address)
    stopping = asyncio.create_task(router.stop())
    await until(lambda: router.service.is_draining)

    async with aiohttp.ClientSession() as session:
        async with session.get(admin) as answer:
            assert answer.status == 503
    reader, writer = await asyncio.open_connection(*router.address)
    writer.write(MODELS)
    after = await reader.read()
    await stopping

    assert after.startswith(b"HTTP/1.1 200 OK")
    assert b"connection: close" in after
    writer.close()


async def test_clients_that_come_before_the_replicas_were_asked_wait(replicas):
    """They would be told that there is no replica."""
    await replicas[1].stop()  # refuses, which is an answer as well
    config = RouterConfig(replicas=tuple(r.url for r in replicas), port=0, admin_port=0)
    router = Router(config, build_placer(config, Random(1)))
    await router.start()  # nobody waits for replicas to be up here

    reader, writer = await asyncio.open_connection(*router.address)
    writer.write(MODELS)
    answer = await answer_of(reader)
    writer.close()
    await router.stop()

    assert b'"id":"m"' in answer


async def test_a_replica_that_does_not_answer_holds_up_no_start(replicas):
    silent = socket.create_server(("127.0.0.1", 0))
    urls = (replicas[0].url, f"http://127.0.0.1:{silent.getsockname()[1]}")
    config = RouterConfig(replicas=urls, port=0, admin_port=0, poll_timeout_s=1000.0)
    router = Router(config, build_placer(config, Random(1)))

    async with asyncio.timeout(60):
        await router.start()

    assert [replica.is_up for replica in router.placer.fleet.replicas] == [True, False]
    await router.stop()
    silent.close()
