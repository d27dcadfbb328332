"""What is logged and shown: bounded, and never a key, a prompt or a raw head."""

from __future__ import annotations

import asyncio
import json
import logging

import aiohttp
import pytest
from desync_cases import ANY_ERROR, FAMILIES
from fake_replica import FakeReplica

KEY = "sk-canary-key-0123456789"
PROMPT = "canary prompt: the launch code is 0000"
CANARIES = ("canary", "launch code", KEY)


async def send(router, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*router.address)
    writer.write(data)
    try:
        async with asyncio.timeout(5):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def pages(router) -> str:
    text = ""
    async with aiohttp.ClientSession() as session:
        for path in ("/health", "/ready", "/metrics", "/fleet"):
            async with session.get("http://{}:{}{}".format(*router.admin_address, path)) as answer:
                assert answer.status < 500 or path == "/ready"
                text += await answer.text()
    return text


async def test_a_flood_of_malformed_requests_is_not_a_flood_of_lines(
    start_router, replicas, caplog
):
    router = await start_router(*replicas)
    hostile = [
        case.sent.replace(b"host: a", b"host: a\r\nx-canary: canary", 1)
        for family in FAMILIES.values()
        for case in family
        if case.statuses == (ANY_ERROR,)
    ]
    with caplog.at_level(logging.DEBUG):
        num_before = len(caplog.records)
        for start in range(0, 1000, 50):
            batch = [hostile[number % len(hostile)] for number in range(start, start + 50)]
            await asyncio.gather(*(send(router, data) for data in batch))
        lines = [record.getMessage() for record in caplog.records[num_before:]
                 if record.name.startswith("roost")]  # fmt: skip

    assert len(lines) <= 20, lines[:20]
    assert not any("canary" in line for line in lines)


@pytest.mark.parametrize("fault", [None, "rst", "cut", "eof", "text500", "gone"])
async def test_no_key_and_no_prompt_is_logged_or_shown(start_router, caplog, fault):
    """At the most talkative level, for requests that succeed and that fail in every way."""
    fake = await FakeReplica().start()
    router = await start_router(fake)
    fake.fault = fault
    if fault == "gone":
        await fake.stop()
    url = "http://{}:{}".format(*router.address)
    headers = {"authorization": f"Bearer {KEY}", "cookie": f"a={KEY}", "x-api-key": KEY}
    messages = [{"role": "user", "content": PROMPT}]
    bodies = [
        {"model": "m", "messages": messages},
        {"model": "m", "messages": messages, "stream": True},
        {"model": PROMPT, "messages": messages},
        {"model": "m", "messages": PROMPT},
        {"model": "m", "messages": messages, PROMPT: 1},
        PROMPT,
    ]
    with caplog.at_level(logging.DEBUG):
        async with aiohttp.ClientSession(headers=headers) as session:
            for body in bodies:
                for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
                    data = json.dumps(body)
                    try:
                        async with session.post(url + path, data=data) as answer:
                            await answer.read()
                    except aiohttp.ClientError:
                        assert fault in {"cut", "eof"}
            async with session.post(url + "/v1/completions", data=PROMPT.encode()) as answer:
                assert answer.status == 400
        shown = await pages(router)
    logged = "\n".join(
        f"{record.getMessage()} {record.exc_text or ''}"
        for record in caplog.records
        if not record.name.startswith(("aiohttp", "asyncio"))
    )

    for canary in CANARIES:
        assert canary not in logged
        assert canary not in shown
    await fake.stop()


async def test_a_flood_of_malformed_requests_to_the_admin_port_is_not_logged(
    start_router, replicas, caplog
):
    router = await start_router(*replicas)
    with caplog.at_level(logging.DEBUG):
        num_before = len(caplog.records)
        for _ in range(100):
            reader, writer = await asyncio.open_connection(*router.admin_address)
            writer.write(b"GET /ready HTTP/1.1\r\nhost: a\r\nx-canary : canary\r\n\r\n")
            async with asyncio.timeout(5):
                answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 400")
            assert b'"code":"invalid_request"' in answer
            writer.close()
        lines = [record.getMessage() for record in caplog.records[num_before:]]

    assert not any("canary" in line for line in lines)
    assert len(lines) <= 20


async def test_a_fleet_that_is_down_does_not_flood_the_log(start_router, replicas, caplog):
    router = await start_router(*replicas)
    for replica in replicas:
        replica.fault = "text500"
    url = "http://{}:{}/v1/completions".format(*router.address)
    with caplog.at_level(logging.INFO):
        async with aiohttp.ClientSession() as session:

            async def fail() -> None:
                async with session.post(url, json={"model": "m", "prompt": PROMPT}) as answer:
                    assert answer.status >= 500
                    await answer.read()

            for _ in range(10):
                await asyncio.gather(*(fail() for _ in range(30)))
        router.service._sweep.cancel()
        router.service._num_sweeps = 9
        router.service.watch()
        failed = [line for line in caplog.messages if "failed" in line]

    assert 10 <= len(failed) <= 40
    assert "more requests failed" in failed[-1]
