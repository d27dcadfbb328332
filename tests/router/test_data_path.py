"""The data path over real sockets, against fake replicas: bytes, failures, limits."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from fake_replica import FakeReplica

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello " * 300}]}


def base(router: Any) -> str:
    return "http://{}:{}".format(*router.address)


def admin(router: Any) -> str:
    return "http://{}:{}".format(*router.admin_address)


async def raw(router: Any, data: bytes) -> bytes:
    """Send bytes, read until the router closes."""
    reader, writer = await asyncio.open_connection(*router.address)
    writer.write(data)
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    return answer


async def test_bodies_pass_byte_identical(start_router, replicas):
    router = await start_router(*replicas)
    body = (
        b'{ "model":"m",\n "messages" : [{"role":"user","content":"h\\u00e9 \xc3\xa9"}], "x": 1e3}'
    )

    async with aiohttp.ClientSession() as session:
        async with session.post(base(router) + "/v1/chat/completions?a=1", data=body) as answer:
            assert answer.status == 200
            await answer.read()

    assert [body] == replicas[0].bodies + replicas[1].bodies
    assert replicas[0].targets + replicas[1].targets == ["/v1/chat/completions?a=1"]


async def test_an_answer_names_replica_matched_and_cached_tokens(start_router, replicas):
    router = await start_router(*replicas)
    replicas[0].cached_tokens = replicas[1].cached_tokens = 96

    async with aiohttp.ClientSession() as session:
        for _ in range(2):
            async with session.post(base(router) + "/v1/chat/completions", json=CHAT) as answer:
                headers = answer.headers
                await answer.read()

    assert headers["x-roost-replica"] in {"r0", "r1"}
    assert int(headers["x-roost-matched-tokens"]) > 80
    assert headers["x-roost-cached-tokens"] == "96"
    assert headers["x-request-id"].startswith("req-")


async def test_a_stream_is_relayed_and_ends_properly(start_router, replicas):
    router = await start_router(*replicas)

    async with aiohttp.ClientSession() as session:
        body = {**CHAT, "stream": True}
        async with session.post(base(router) + "/v1/chat/completions", json=body) as answer:
            text = (await answer.read()).decode()

    assert answer.headers["content-type"] == "text/event-stream"
    assert text.count("data: ") == 5
    assert text.endswith("data: [DONE]\n\n")


async def test_a_request_id_is_taken_over_or_made(start_router, replicas):
    router = await start_router(replicas[0])

    async with aiohttp.ClientSession() as session:
        for given, kept in (("abc-1", True), ("x" * 129, False), ("has space", False)):
            async with session.post(
                base(router) + "/v1/chat/completions", json=CHAT, headers={"x-request-id": given}
            ) as answer:
                assert (answer.headers["x-request-id"] == given) is kept
                assert replicas[0].headers[-1]["x-request-id"] == answer.headers["x-request-id"]


async def test_hop_by_hop_and_smuggling_headers_end_here(start_router, replicas):
    router = await start_router(replicas[0])
    body = json.dumps(CHAT).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nConnection: close, X-Secret\r\n"
        b"X-Secret: 1\r\nContent_Length: 3\r\nTE: trailers\r\nX-Roost-Replica: r9\r\n"
        b"Authorization: Bearer k\r\nContent-Length: %d\r\n\r\n" % len(body)
    )

    answer = await raw(router, head + body)

    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    seen = replicas[0].headers[0]
    assert not {"x-secret", "content_length", "te", "x-roost-replica"} & seen.keys()
    assert seen["authorization"] == "Bearer k"
    assert seen["host"] == f"127.0.0.1:{replicas[0].port}"


async def test_the_second_request_of_a_prefix_goes_to_the_same_replica(start_router, replicas):
    router = await start_router(*replicas)

    async with aiohttp.ClientSession() as session:
        for _ in range(6):
            async with session.post(base(router) + "/v1/chat/completions", json=CHAT) as answer:
                await answer.read()

    assert sorted(len(fake.bodies) for fake in replicas) == [0, 6]


async def test_unrelated_prompts_land_on_different_replicas(start_router, replicas):
    router = await start_router(*replicas)

    async with aiohttp.ClientSession() as session:
        for number in range(20):
            content = f"{number} " * 300
            body = {"model": "m", "messages": [{"role": "user", "content": content}]}
            async with session.post(base(router) + "/v1/chat/completions", json=body) as answer:
                await answer.read()

    assert min(len(fake.bodies) for fake in replicas) >= 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reset_before_the_first_byte_is_not_seen_by_the_client(
    start_router, replicas, stream
):
    router = await start_router(*replicas)
    replicas[0].fault = "rst"

    async with aiohttp.ClientSession() as session:
        for number in range(6):
            body = {"model": "m", "stream": stream, "messages": _user(f"{number} ")}
            async with session.post(base(router) + "/v1/chat/completions", json=body) as answer:
                assert answer.status == 200
                assert answer.headers["x-roost-replica"] == "r1"
                await answer.read()

    assert replicas[0].bodies


async def test_a_replica_killed_between_requests_costs_no_error(start_router, replicas):
    router = await start_router(*replicas, poll_interval_s=60)
    async with aiohttp.ClientSession() as session:
        for _ in range(2):
            async with session.post(base(router) + "/v1/chat/completions", json=CHAT) as answer:
                home = answer.headers["x-roost-replica"]
                await answer.read()
        await replicas[int(home[1])].stop()

        for _ in range(3):
            async with session.post(base(router) + "/v1/chat/completions", json=CHAT) as answer:
                assert answer.status == 200
                assert answer.headers["x-roost-replica"] != home
                await answer.read()


async def test_a_replica_that_comes_back_is_used_again(start_router, replicas):
    router = await start_router(replicas[0])
    await replicas[0].stop()
    async with aiohttp.ClientSession() as session:
        async with session.post(base(router) + "/v1/chat/completions", json=CHAT) as answer:
            assert answer.status == 503
            assert answer.headers["retry-after"] == "1"
            assert (await answer.json())["error"]["code"] == "no_replica"
        async with session.get(admin(router) + "/ready") as answer:
            assert answer.status == 503

        await replicas[0].start()
        async with asyncio.timeout(5):
            while not router.placer.fleet.is_ready:
                await asyncio.sleep(0.02)

        async with session.post(base(router) + "/v1/chat/completions", json=CHAT) as answer:
            assert answer.status == 200
            assert answer.headers["x-roost-matched-tokens"] == "0"


@pytest.mark.parametrize("fault", ["cut", "eof"])
async def test_a_cut_stream_is_never_passed_off_as_a_success(start_router, replicas, fault):
    router = await start_router(replicas[0])
    replicas[0].fault = fault

    async with aiohttp.ClientSession() as session:
        body = {**CHAT, "stream": True}
        async with session.post(base(router) + "/v1/chat/completions", json=body) as answer:
            text = b""
            with pytest.raises(aiohttp.ClientPayloadError):
                async for data in answer.content.iter_any():
                    text += data

    assert b"two" in text
    assert b"[DONE]" not in text
    assert json.loads(text.split(b"data: ")[-1])["error"]["code"] == "upstream_lost"


@pytest.mark.parametrize(("fault", "stream"), [("slow", False), ("slow", True), ("hang", True)])
async def test_a_client_that_leaves_stops_the_replica(start_router, replicas, fault, stream):
    router = await start_router(replicas[0])
    replicas[0].fault = fault

    async with aiohttp.ClientSession() as session:
        url, body = base(router) + "/v1/chat/completions", {**CHAT, "stream": stream}
        request = asyncio.create_task(session.post(url, json=body))
        async with asyncio.timeout(5):
            while not replicas[0].bodies:
                await asyncio.sleep(0.01)
        if fault == "hang":
            await (await request).content.readany()
            (await request).close()
        request.cancel()
        async with asyncio.timeout(5):
            while not replicas[0].num_aborted:
                await asyncio.sleep(0.01)

    assert router.service.num_exchanges == 0
    replica = router.placer.fleet.replicas[0]
    assert (replica.num_in_flight, replica.num_decoding, replica.queued_tokens) == (0, 0, 0)


async def test_a_plain_text_error_of_a_replica_becomes_an_openai_error(start_router, replicas):
    router = await start_router(replicas[0])
    replicas[0].fault = "text500"

    async with aiohttp.ClientSession() as session:
        async with session.post(base(router) + "/v1/chat/completions", json=CHAT) as answer:
            assert answer.status == 500
            error = (await answer.json())["error"]

    assert error["message"] == "it broke"
    assert error["type"] == "server_error"


GZIPPED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\n"
    b"Connection: close\r\nContent-Length: 1\r\n\r\nx"
)
BAD_REQUESTS = [
    ("POST", "/v1/chat/completions", b"{nonsense", 400, "invalid_json", None),
    ("POST", "/v1/chat/completions", b"\xff\xfe", 400, "invalid_json", None),
    ("POST", "/v1/chat/completions", b"", 400, "invalid_json", None),
    (
        "POST",
        "/v1/chat/completions",
        b'{"model":"m","messages":[],"x":' + b"[" * 100_000,
        400,
        "invalid_json",
        None,
    ),
    ("POST", "/v1/chat/completions", b"[]", 400, "invalid_request", None),
    ("POST", "/v1/chat/completions", b'{"messages":[]}', 400, "invalid_request", "model"),
    ("POST", "/v1/chat/completions", b'{"model":"m"}', 400, "invalid_request", "messages"),
    ("POST", "/v1/chat/completions", b'{"model":3,"messages":[]}', 400, "invalid_request", "model"),
    (
        "POST",
        "/v1/chat/completions",
        b'{"model":"x","messages":[]}',
        404,
        "model_not_found",
        "model",
    ),
    ("POST", "/v1/completions", b'{"model":"m","prompt":[-1]}', 400, "invalid_request", "prompt"),
    ("POST", "/v1/completions", b'{"model":"x","prompt":"a"}', 404, "model_not_found", "model"),
    ("GET", "/v1/chat/completions", b"", 405, "method_not_allowed", None),
    ("POST", "/v1/models", b"{}", 405, "method_not_allowed", None),
    ("GET", "/v1/models/nope", b"", 404, "model_not_found", "model"),
    ("POST", "/v1/images/generations", b"{}", 404, "not_found", None),
    ("POST", "/v1/embeddings", b'{"model":"m"}', 400, "invalid_request", "input"),
    ("GET", "/metrics", b"", 404, "not_found", None),
    ("POST", "/flush_cache", b"", 404, "not_found", None),
    ("GET", "/v1/models/../../metrics", b"", 404, "model_not_found", "model"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "code", "param"), BAD_REQUESTS)
async def test_bad_requests_get_openai_errors(
    start_router, replicas, method, path, body, status, code, param
):
    router = await start_router(replicas[0])
    head = f"{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"

    answer = await raw(router, f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    top, _, payload = answer.partition(b"\r\n\r\n")
    assert int(top.split()[1]) == status
    error = json.loads(payload)["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert set(error) == {"message", "type", "param", "code"}
    assert not replicas[0].bodies


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (
            b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
        ),
        (b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 33554433\r\n\r\n", 413),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /v1/models HTTP/1.1\r\n" + b"X: a\r\n" * 129 + b"\r\n", 431),
        (GZIPPED, 415),
        (b"GET /v1/models HTTP/1.1\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /v1/models HTTP/2.0\r\nHost: a\r\n\r\n", 400),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", 404),
    ],
)
async def test_malformed_http_is_answered_and_closed(start_router, replicas, data, status):
    router = await start_router(replicas[0])

    answer = await raw(router, data)

    assert int(answer.split()[1]) == status
    assert b'"error"' in answer


async def test_a_header_line_that_does_not_end_is_cut_off(start_router, replicas):
    router = await start_router(replicas[0])
    answer = await raw(router, b"GET /v1/models HTTP/1.1\r\nX: " + b"a" * 2_000_000)

    assert answer.startswith(b"HTTP/1.1 431 ")


async def test_an_upgrade_is_ignored_and_ends_the_connection(start_router, replicas):
    router = await start_router(replicas[0])
    body = json.dumps(CHAT).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    head += b"Host: a\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(body)

    answer = await raw(router, head + body + b"more")

    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert "upgrade" not in replicas[0].headers[0]


async def test_a_body_at_the_limit_passes_and_one_byte_more_does_not(start_router, replicas):
    router = await start_router(replicas[0], max_body_bytes=10_000)
    frame = b'{"model":"m","messages":[],"x":"%b"}'
    room = 10_000 - len(frame % b"")

    async with aiohttp.ClientSession() as session:
        for length, status in ((room, 200), (room + 1, 413)):
            async with session.post(
                base(router) + "/v1/chat/completions", data=frame % (b"a" * length)
            ) as answer:
                assert answer.status == status

        async def chunks():
            for _ in range(3):
                yield b"a" * 5_000

        async with session.post(base(router) + "/v1/chat/completions", data=chunks()) as answer:
            assert answer.status == 413


async def test_pipelined_requests_are_answered_in_order(start_router, replicas):
    router = await start_router(*replicas)
    one = json.dumps(CHAT).encode()
    post = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(one)
    get = b"GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"

    answer = await raw(router, post + one + post + one + get)

    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.rindex(b'"object":"list"') > answer.rindex(b"one two three")


async def test_http_1_0_gets_an_unchunked_stream_that_ends_with_the_connection(
    start_router, replicas
):
    router = await start_router(replicas[0])
    body = json.dumps({**CHAT, "stream": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body)

    answer = await raw(router, head + body)

    assert b"chunked" not in answer
    assert answer.endswith(b"data: [DONE]\n\n")


async def test_models_are_the_union_of_all_replicas(start_router):
    fakes = [await FakeReplica(model).start() for model in ("a", "b/c")]
    router = await start_router(*fakes)

    async with aiohttp.ClientSession() as session:
        async with session.get(base(router) + "/v1/models") as answer:
            assert [entry["id"] for entry in (await answer.json())["data"]] == ["a", "b/c"]
        async with session.get(base(router) + "/v1/models/b%2Fc") as answer:
            assert (await answer.json())["id"] == "b/c"

    for fake in fakes:
        await fake.stop()


async def test_a_drain_lets_streams_finish_and_refuses_new_connections(start_router, replicas):
    router = await start_router(replicas[0])
    replicas[0].fault = "hang"
    async with aiohttp.ClientSession() as session:
        body = {**CHAT, "stream": True}
        answer = await session.post(base(router) + "/v1/chat/completions", json=body)
        await answer.content.readany()
        stopping = asyncio.create_task(router.stop())
        await asyncio.sleep(0.05)
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(base(router) + "/v1/models")

        replicas[0].gate.set()
        rest = await answer.read()
        await stopping

    assert rest.endswith(b"data: [DONE]\n\n")


async def test_the_admin_port_tells_health_metrics_and_the_fleet(start_router, replicas):
    router = await start_router(*replicas)
    async with aiohttp.ClientSession() as session:
        async with session.post(base(router) + "/v1/chat/completions", json=CHAT) as answer:
            await answer.read()
        async with session.get(admin(router) + "/health") as answer:
            assert answer.status == 200
        async with session.get(admin(router) + "/ready") as answer:
            assert answer.status == 200
        async with session.get(admin(router) + "/metrics") as answer:
            page = await answer.text()
        async with session.get(admin(router) + "/fleet") as answer:
            listed = (await answer.json())["replicas"]

    assert 'roost_router_requests_total{model="m",outcome="ok",replica="r0"} 1.0' in page or (
        'roost_router_requests_total{model="m",outcome="ok",replica="r1"} 1.0' in page
    )
    assert [entry["kv_capacity_tokens"] for entry in listed] == [16384, 16384]
    assert sum(entry["resident_blocks"] for entry in listed) > 0


@pytest.mark.interpreted
async def test_a_large_non_streamed_answer_passes_whole(start_router, replicas, monkeypatch):
    monkeypatch.setattr("roost_router.answer.phases.MAX_HELD_BYTES", 10)
    router = await start_router(replicas[0])

    async with aiohttp.ClientSession() as session:
        async with session.post(base(router) + "/v1/chat/completions", json=CHAT) as answer:
            assert (await answer.json())["choices"][0]["message"]["content"] == "one two three"


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text * 300}]
