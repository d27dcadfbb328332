"""Answers that are odd, broken or hostile, byte by byte; and clients that do not read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from fake_replica import FakeReplica
from raw_replica import SSE_HEAD, RawReplica, chunk, whole

from roost_router.answer.phases import Answer
from roost_router.placement import Placer

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello " * 300}]}
OK = b'{"ok":true}'
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n"


@pytest.fixture
async def serve(start_router):
    """A router before one replica that answers by script."""
    replicas = []

    async def start(*script: list[bytes | None]) -> tuple[Any, RawReplica]:
        replicas.append(await RawReplica(*script).start())
        return await start_router(replicas[-1]), replicas[-1]

    yield start
    for replica in replicas:
        await replica.stop()


async def test_a_load_is_taken_off_the_head_and_counts_at_once(start_router):
    """Whole answers, also once their head is known by its bytes; streams; refusals."""
    told = b"x-roost-load: [7,2,512,2048,90]\r\n"
    stream = SSE_HEAD.replace(b"content-type", told + b"content-type")
    events = chunk(b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n')
    events += chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    busy = whole(b"{}", head=told).replace(b"200 OK", b"429 Too Many Requests")
    replica = await RawReplica(
        *[[whole(OK, head=told)]] * 4, [stream + events], [busy], [whole(OK)]
    ).start()
    router = await start_router(replica, poll_interval_s=3600.0)
    (seen,) = router.placer.fleet.replicas
    others = []
    async with aiohttp.ClientSession() as session:
        for number in range(7):
            seen.num_others = -1
            body = {**BODY, "stream": number == 4}
            async with session.post(url(router), json=body) as answer:
                assert (await answer.read()) is not None
                assert "x-roost-load" not in answer.headers
            others.append(seen.num_others)
    await replica.stop()

    # A stream is one of the requests that run; after the others' last byte they are not.
    assert others == [9, 9, 9, 9, 8, 9, -1]
    assert (seen.report.num_running, seen.report.num_waiting) == (7, 2)
    assert seen.report.kv_usage == 0.25


def url(router: Any) -> str:
    return "http://{}:{}/v1/chat/completions".format(*router.address)


async def post(router: Any, **fields: Any) -> tuple[int, bytes]:
    async with asyncio.timeout(5), aiohttp.ClientSession() as session:
        async with session.post(url(router), json={**BODY, **fields}) as answer:
            return answer.status, await answer.read()


async def post_until_cut(router: Any) -> bytes:
    text = b""
    async with asyncio.timeout(5), aiohttp.ClientSession() as session:
        async with session.post(url(router), json={**BODY, "stream": True}) as answer:
            with pytest.raises(aiohttp.ClientPayloadError):
                async for data in answer.content.iter_any():
                    text += data
    return text


def idle(router: Any) -> bool:
    replica = router.placer.fleet.replicas[0]
    return router.service.num_exchanges == 0 and replica.num_in_flight == 0


@pytest.mark.parametrize("together", [True, False])
async def test_an_interim_answer_is_passed_over(serve, together):
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    parts = [interim + whole(OK)] if together else [interim, whole(OK)]
    router, _ = await serve(parts)

    assert (200, OK) == await post(router)
    assert (200, OK) == await post(router)


async def test_switching_protocols_is_a_lost_replica(serve):
    router, _ = await serve(
        [b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"]
    )

    assert (await post(router))[0] == 502
    assert idle(router)


@pytest.mark.parametrize("excess", [whole(b'{"SMUGGLED":1}'), b"HTTP/1.1 200 OK\r\nx", b"junk"])
async def test_bytes_after_an_answer_reach_nobody(serve, excess):
    router, replica = await serve([whole(OK) + excess], [whole(b'{"second":2}')])
    body = json.dumps(BODY).encode()
    ask = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n" % len(body)

    reader, writer = await asyncio.open_connection(*router.address)
    writer.write(ask + b"\r\n" + body + ask + b"connection: close\r\n\r\n" + body)
    async with asyncio.timeout(5):
        answers = await reader.read()
    writer.close()

    assert answers.count(b"HTTP/1.1 200 OK") == 2
    assert answers.endswith(b'{"second":2}')
    assert b"SMUGGLED" not in answers
    assert replica.num_requests == 2


async def test_connections_to_a_replica_are_kept(serve):
    stream = [SSE_HEAD, chunk(EVENT % b"a" + LAST + b"data: [DONE]\n\n"), b"0\r\n\r\n"]
    router, replica = await serve([whole(OK)], stream, [whole(OK)])

    for number in range(4):
        assert (await post(router, stream=number == 1))[0] == 200

    assert replica.num_requests == 4
    assert replica.num_connections == 1


async def test_a_large_answer_is_computed_once(serve):
    large = b'{"text":"' + b"x" * 200_000 + b'"}'
    router, replica = await serve([whole(large)])

    for number in range(1, 4):
        assert (200, large) == await post(router)
        assert replica.num_requests == number


async def test_an_endless_head_is_a_lost_replica(serve):
    router, _ = await serve([b"HTTP/1.1 200 OK\r\nx: " + b"a" * 2_000_000])

    assert (await post(router))[0] == 502


async def test_an_answer_without_length_ends_with_the_connection(serve):
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n"
    router, replica = await serve([head + OK])
    replica._answer = close_after(replica._answer)

    assert (200, OK) == await post(router)


def close_after(answer):
    async def run(head, writer):
        keep = await answer(head, writer)
        return keep and not head.startswith(b"POST")

    return run


EVENT = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n'
LAST = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'


async def test_done_inside_content_is_not_the_end(serve):
    router, _ = await serve([SSE_HEAD, chunk(EVENT % b"say data: [DONE]"), b"0\r\n\r\n"])

    text = await post_until_cut(router)

    assert b"upstream_lost" in text


@pytest.mark.parametrize("end", [[None], [b"0\r\n\r\n"]])
async def test_a_stream_that_said_done_is_complete_however_it_closes(serve, end):
    router, _ = await serve([SSE_HEAD, chunk(EVENT % b"a" + LAST + b"data:[DONE]\n\n"), *end])

    status, text = await post(router, stream=True)

    assert status == 200
    assert text.endswith(b"data:[DONE]\n\n")
    assert idle(router)


async def test_the_error_of_a_cut_stream_is_an_event_of_its_own(serve):
    router, _ = await serve([SSE_HEAD, chunk(EVENT % b"a" + b'data: {"choices":[{"del'), None])

    text = await post_until_cut(router)

    last = text.strip().rsplit(b"\n", 1)[1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_lost"


USAGE = b'{"usage":{"prompt_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d}}}'


@pytest.mark.parametrize(
    ("prompt", "cached"), [(-5, 0), (100, -1), (100, -(10**5)), (10**12, 1), (5, 9)]
)
async def test_a_usage_that_cannot_be_true_harms_nobody(serve, prompt, cached):
    router, _ = await serve([whole(USAGE % (prompt, cached))])

    for _ in range(3):
        assert (await post(router))[0] == 200

    assert idle(router)
    assert router.placer.fleet.bytes_per_token("m") == 4.0


def broken(*_: object, **__: object) -> None:
    raise ZeroDivisionError


@pytest.mark.interpreted
@pytest.mark.parametrize("method", ["weigh", "first_byte", "finish"])
async def test_a_defect_of_ours_ends_its_request_and_no_other(serve, monkeypatch, method):
    router, _ = await serve([whole(OK)])
    with monkeypatch.context() as patch:
        patch.setattr(Placer, method, broken)
        status, body = await post(router)

    if method == "finish":  # the answer was on its way already
        assert (status, body) == (200, OK)
    else:
        assert status == 500
        assert json.loads(body)["error"]["type"] == "server_error"
    assert router.service.num_exchanges == 0
    assert (200, OK) == await post(router)


@pytest.mark.interpreted
async def test_a_defect_of_ours_in_mid_stream_cuts_it(serve, monkeypatch):
    router, _ = await serve([SSE_HEAD, chunk(EVENT % b"a"), b"0\r\n\r\n"])
    monkeypatch.setattr(Answer, "end", broken)

    await post_until_cut(router)

    assert idle(router)


async def test_the_first_event_counts_as_the_first_token_and_the_head_does_not(serve):
    gate = asyncio.Event()
    router, replica = await serve([SSE_HEAD, b"7\r\n: ping\n\r\n"], [whole(OK)])
    answer = replica._answer

    async def slow(head, writer):
        keep = await answer(head, writer)
        if head.startswith(b"POST"):
            await gate.wait()
            writer.write(chunk(EVENT % b"a" + LAST + b"data: [DONE]\n\n") + b"0\r\n\r\n")
        return keep

    replica._answer = slow
    asking = asyncio.create_task(post(router, stream=True))
    async with asyncio.timeout(5):
        while not replica.num_requests:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    state = router.placer.fleet.replicas[0]
    assert (state.num_decoding, state.queued_tokens > 0) == (0, True)
    assert state.speed.num_observed == 0

    gate.set()
    await asking
    assert state.speed.num_observed == 1


async def test_a_503_is_tried_elsewhere(start_router):
    busy = whole(b'{"error":{"message":"busy"}}').replace(b"200 OK", b"503 Busy")
    one, two = await RawReplica([busy]).start(), await RawReplica([whole(OK)]).start()
    router = await start_router(one, two)

    for number in range(4):
        body = [{"role": "user", "content": f"{number} " * 300}]
        assert (await post(router, messages=body)) == (200, OK)

    assert one.num_requests >= 1
    await two.stop()
    await one.stop()


async def test_compression_is_not_asked_for(serve):
    router, replica = await serve([whole(OK)])

    async with aiohttp.ClientSession() as session:
        headers = {"accept-encoding": "gzip"}
        async with session.post(url(router), json=BODY, headers=headers) as answer:
            await answer.read()

    assert b"accept-encoding" not in replica.heads[0].lower()


async def test_the_next_pipelined_request_waits_for_a_client_that_does_not_read(serve):
    router, replica = await serve([whole(b'{"x":"' + b"x" * 3_000_000 + b'"}')])
    body = json.dumps(BODY).encode()
    ask = POST % len(body)
    reader, writer = await asyncio.open_connection(*router.address, limit=1024)
    for _ in range(12):  # more than the kernel's buffers take
        writer.write(ask + body)
        await asyncio.sleep(0.05)
    stuck = replica.num_requests
    await asyncio.sleep(0.3)

    assert stuck == replica.num_requests < 12
    async with asyncio.timeout(10):
        while replica.num_requests < 12:
            await reader.read(1 << 20)
    writer.close()
    async with asyncio.timeout(5):
        while not idle(router):
            await asyncio.sleep(0.01)


async def test_too_many_waiting_bytes_end_the_connection(start_router):
    fake = await FakeReplica().start()
    fake.fault = "slow"
    router = await start_router(fake, max_body_bytes=10_000)
    body = json.dumps({**BODY, "x": "y" * 6_000}).encode()
    ask = POST % len(body)
    reader, writer = await asyncio.open_connection(*router.address)
    writer.write((ask + body) * 4)
    await asyncio.sleep(0.2)
    fake.gate.set()
    async with asyncio.timeout(5):
        answers = await reader.read()
    writer.close()

    assert 1 <= answers.count(b"HTTP/1.1 200 OK") < 4
    await fake.stop()


async def test_what_follows_a_valid_request_does_not_take_its_answer(serve):
    router, _ = await serve([whole(OK)])
    body = json.dumps(BODY).encode()
    ask = POST % len(body)
    for excess in (b"G@RBAGE\r\n\r\n", b"\x00"):
        reader, writer = await asyncio.open_connection(*router.address)
        writer.write(ask + body + excess)
        async with asyncio.timeout(5):
            assert (await reader.read()).endswith(OK)
        writer.close()


async def test_a_target_may_name_scheme_and_host(serve):
    router, _ = await serve([whole(OK)])

    reader, writer = await asyncio.open_connection(*router.address)
    writer.write(b"GET http://a/v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    async with asyncio.timeout(5):
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
    writer.close()


async def test_a_drain_waits_for_a_request_that_is_half_read(start_router):
    fake = await FakeReplica().start()
    router = await start_router(fake)
    body = json.dumps(BODY).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(
        body
    )
    reader, writer = await asyncio.open_connection(*router.address)
    writer.write(head + body[:100])
    await asyncio.sleep(0.05)

    stopping = asyncio.create_task(router.stop())
    await asyncio.sleep(0.05)
    writer.write(body[100:])
    async with asyncio.timeout(5):
        answer = await reader.read()
    await stopping

    assert answer.startswith(b"HTTP/1.1 200 OK")
    writer.close()
    await fake.stop()


PAGE = b'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1\n'


async def test_a_large_page_of_metrics_is_read_whole(serve):
    router, replica = await serve([whole(OK)])
    replica.metrics = b"# HELP x y\n" * 30_000 + PAGE

    async with asyncio.timeout(5):
        while router.placer.fleet.replicas[0].kv_capacity_tokens != 1600:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "models", [b"\xff", b"[" * 5000, b'{"data":[{"id":"\xff"}]}', b"x" * 9_000_000, b"{}"]
)
async def test_pages_of_nonsense_take_down_only_their_replica(serve, models):
    router, replica = await serve([whole(OK)])
    replica.models = models

    async with asyncio.timeout(10):
        while router.placer.fleet.is_ready:
            await asyncio.sleep(0.02)
    assert not router.poller.done()


async def test_a_redirect_is_not_followed(start_router):
    """A replica must not be able to point the router at other addresses."""
    replica = await RawReplica([whole(OK)]).start()
    router = await start_router(replica)
    replica._answer = redirect

    async with asyncio.timeout(5):
        while router.placer.fleet.is_ready:
            await asyncio.sleep(0.02)
    await replica.stop()


async def redirect(_head, writer):
    writer.write(
        b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n"
    )
    return True
