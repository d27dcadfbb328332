"""Mock engines over real sockets: vLLM's words, a real cache, events that tell it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator

import msgspec
import pytest
import zmq
from processes import until

from roost_loadtest.fleet_sim.cache import BlockCache
from roost_loadtest.local_processes import free_port
from roost_loadtest.replay.answer import Answer, Usage
from roost_loadtest.replay.mock_engines import MockConfig, Stats, serving
from roost_loadtest.replay.mock_kv_events import KvPublisher, ToldCache
from roost_loadtest.replay.prompts import as_request, chat_body
from roost_wire.load_report import LoadReport, parse_load_report

BLOCK = 64
#: So fast that no test waits; more than any clock jitter still costs nothing.
SPEED_UP = 1000.0


@pytest.fixture
async def mock() -> AsyncIterator[int]:
    """The port of a mock engine with room for 100 blocks."""
    port = free_port()
    async with serving(MockConfig(ports=[port], speed_up=SPEED_UP, kv_tokens=100 * BLOCK)):
        yield port
    await asyncio.sleep(0.01)  # the last connections close in the next turns


async def exchange(port: int, request: bytes, end: bytes) -> tuple[bytes, bytes]:
    """Head and body of the answer, which ends with `end`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await asyncio.wait_for(reader.readuntil(end), 10)
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head, body


async def get(port: int, path: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    body = await reader.readexactly(length)
    writer.close()
    await writer.wait_closed()
    return body


async def ask(port: int, prompt: str, max_tokens: int = 5) -> tuple[Answer, bytes]:
    body = (
        await exchange(port, as_request(chat_body("mock", prompt, max_tokens)), b"\n0\r\n\r\n")
    )[1]
    answer = Answer()
    answer.feed(body, 1.0)
    return answer, body


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 300])
async def test_a_stream_has_an_event_a_token_and_ends_as_vllms(mock: int, max_tokens: int):
    answer, body = await ask(mock, "x" * 1000, max_tokens)

    assert answer.is_whole
    assert answer.usage == Usage(prompt=250, cached=0, output=max_tokens)
    assert body.count(b'"content":" a"') == max_tokens
    assert body.count(b'"role":"assistant"') == body.count(b'"finish_reason":"length"') == 1


async def test_what_was_asked_before_is_cached_in_whole_blocks(mock: int):
    prompt = "".join(f"{number:08d}" for number in range(200))  # 400 tokens: 6 blocks and a part

    first, _ = await ask(mock, prompt)
    again, _ = await ask(mock, prompt)
    longer, _ = await ask(mock, prompt[: 4 * BLOCK * 3] + "other" * 100)

    assert [answer.usage.cached for answer in (first, again, longer)] == [0, 6 * BLOCK, 3 * BLOCK]


async def test_an_answer_may_be_whole_at_once(mock: int):
    fields = json.loads(chat_body("mock", "x" * 400, 3)) | {"stream": False}

    head, body = await exchange(mock, as_request(json.dumps(fields).encode()), b"}}}")

    assert f"content-length: {len(body)}".encode() in head
    answer = json.loads(body)
    assert answer["choices"][0]["message"]["content"] == " a a a"
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize(
    ("tokens", "status"), [(100 * BLOCK - 5, b"200 OK"), (100 * BLOCK, b"400")]
)
async def test_what_can_never_fit_is_refused(mock: int, tokens: int, status: bytes):
    request = as_request(chat_body("mock", "x" * (4 * tokens), 5))

    head, _ = await exchange(mock, request, b"\r\n\r\n")

    assert status in head.splitlines()[0]


async def test_nonsense_is_refused_and_the_next_is_answered(mock: int):
    head, body = await exchange(mock, as_request(b"{"), b"}}")

    assert b"400" in head
    assert "message" in json.loads(body)["error"]
    assert (await ask(mock, "x"))[0].is_whole


async def test_other_paths_are_not_there(mock: int):
    """vllm-router asks for /tokenize where there is no render."""
    request = as_request(b'{"prompt":"x"}').replace(b"/v1/chat/completions", b"/tokenize")

    head, _ = await exchange(mock, request, b"}}")

    assert b"404" in head


async def test_pages_say_what_routers_read(mock: int):
    answer, _ = await ask(mock, "x" * 1000)
    report = parse_load_report((await get(mock, "/metrics")).decode())
    stats = msgspec.json.decode(await get(mock, "/stats"), type=Stats)

    assert answer.is_whole
    assert report == LoadReport(
        num_running=0, num_waiting=0, kv_usage=0.0, kv_capacity_tokens=100 * BLOCK
    )
    assert json.loads(await get(mock, "/v1/models"))["data"][0]["id"] == "mock"
    assert json.loads(await get(mock, "/health")) == {}
    assert (stats.requests, stats.computed_tokens) == (1, 250)


async def test_render_gives_a_token_for_four_bytes(mock: int):
    request = as_request(chat_body("mock", "abcdefghi", 1)).replace(
        b"/completions", b"/completions/render"
    )

    _, body = await exchange(mock, request, b"}")

    tokens = json.loads(body)["token_ids"]
    assert tokens[:2] == [int.from_bytes(b"abcd", "little"), int.from_bytes(b"efgh", "little")]
    assert len(tokens) == 3


async def test_a_greeting_in_http2_closes_one_connection_only(mock: int):
    reader, writer = await asyncio.open_connection("127.0.0.1", mock)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")

    assert await reader.read() == b""
    writer.close()
    assert (await ask(mock, "x"))[0].is_whole


def heard(listener: zmq.Socket[bytes], publisher: KvPublisher) -> bool:
    """Whether the listener is connected: it hears an empty batch."""
    publisher.publish([])
    return listener.poll(10) > 0


def test_events_replayed_are_what_is_resident():
    """Chains of a tree, taken and freed at random in a cache too small for them."""
    port, rng = free_port(), random.Random(1)
    with zmq.Context() as context, context.socket(zmq.SUB) as listener:
        cache = ToldCache(12, 4, KvPublisher(context, port))
        listener.setsockopt(zmq.RCVTIMEO, 5000)
        listener.subscribe(b"")
        listener.connect(f"tcp://127.0.0.1:{port}")
        until(lambda: heard(listener, cache.publisher))
        held: list[list[int]] = []
        for _ in range(200):
            if held and (len(held) == 3 or rng.random() < 0.5):
                cache.free(held.pop(0), 0)
            names = [rng.randrange(3) + 10 * depth for depth in range(1, rng.randrange(2, 5))]
            prompt = b"".join(b"%016d" % name for name in names)
            cache.expect(names, prompt)
            if cache.take(names, 0) is not None:
                held.append(names)
        cache.publisher.publish([{"type": "AllBlocksCleared"}])  # the last
        resident: dict[int, list[int]] = {}
        while True:
            topic, _, payload = listener.recv_multipart()
            if (events := msgspec.msgpack.decode(payload)[1]) == []:
                continue  # asked whether anybody hears
            assert topic == b""
            for event in events:
                if event["type"] == "BlockStored":
                    for place, name in enumerate(event["block_hashes"]):
                        resident[name] = event["token_ids"][4 * place : 4 * place + 4]
                for name in event["block_hashes"] if event["type"] == "BlockRemoved" else ():
                    del resident[name]
            if events[0]["type"] == "AllBlocksCleared":
                break
        cache.publisher.close()

    assert set(resident) == {*cache._used, *cache._idle}
    for name, tokens in resident.items():
        assert b"".join(token.to_bytes(4, "little") for token in tokens) == b"%016d" % name


def test_blocks_that_several_wait_for_are_told_with_their_tokens_each_time():
    """The first is admitted, done and evicted before the second is."""
    told: list[dict[str, object]] = []
    with zmq.Context() as context:
        cache = ToldCache(2, 4, KvPublisher(context, free_port()))
        cache.publisher.publish = told.extend  # type: ignore[method-assign]
        for names, prompt in [([1], b"a" * 16), ([1], b"a" * 16), ([2, 3], b"b" * 32)]:
            cache.expect(names, prompt)
        for names in ([1], [2, 3], [1]):
            assert cache.take(names, 0) == 0
            cache.free(names, 0)
        cache.publisher.close()

    stored = [event for event in told if event["type"] == "BlockStored"]
    assert [event["block_hashes"] for event in stored] == [[1], [2, 3], [1]]
    assert stored[2]["token_ids"] == stored[0]["token_ids"] == [int.from_bytes(b"aaaa", "big")] * 4


def test_a_told_cache_decides_as_any_other():
    port = free_port()
    with zmq.Context() as context:
        told, plain = ToldCache(10, 4, KvPublisher(context, port)), BlockCache(10)
        for names in ([1, 2, 3], [1, 2, 4], [5, 6, 7, 8], [1, 2, 3]):
            told.expect(names, b"." * 16 * len(names))
            assert told.take(names, 1) == plain.take(names, 1)
            told.free(names, 1)
            plain.free(names, 1)
        told.publisher.close()
