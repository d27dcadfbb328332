"""Clients that go away at any moment, by any way, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Replica, served_replica
from tiny_models import save_talking

from roost_wire.resume import FIELD, RESUMABLE

#: Clients of the test, and how many of them are there at a time.
NUM_CLIENTS, AT_A_TIME = 400, 40


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    folder = save_talking(tmp_path_factory.mktemp("tiny"))
    with served_replica(2048, str(folder)) as served:
        yield served


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
#: What makes requests different on their way through the engine.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"stream": True},
    {"stream": True, "stop": ["zz", "ab"]},
    {"stream": True, "logprobs": 2},
    {"stream": True, "n": 3},
    {"n": 2},
    {"guided_json": SCHEMA, "stream": True},
    {"stream": True, FIELD: {"token_ids": [50, 51, 52, 53], "seed": 4}},
    {"stream": True, "logprobs": 0, "stop": ["UV"], FIELD: {"token_ids": [53, 54], "seed": 4}},
]


def request_bytes(rng: random.Random) -> bytes:
    """A request that takes from nearly nothing to a quarter of the cache."""
    fields = {"model": "smol", "prompt": "a b " * rng.choice([1, 10, 100])}
    fields |= {"max_tokens": rng.choice([8, 50, 300]), "temperature": 1.0}
    body = json.dumps(fields | rng.choice(VARIANTS)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{RESUMABLE}: 1\r\n"
    head += rng.choice(["", "x-request-timeout-s: 0.05\r\n"])
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def come_and_go(port: int, rng: random.Random) -> None:
    """A client that leaves: before its request is whole, at once, later, or after some events."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = request_bytes(rng)
    how = rng.choice(["part", "at once", "later", "after bytes", "never"])
    writer.write(sent[: rng.randrange(len(sent))] if how == "part" else sent)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
        if how == "later":
            await asyncio.sleep(rng.random() * 0.2)
        elif how == "after bytes":
            await reader.read(rng.randrange(1, 3000))
        elif how == "never":
            writer.write_eof()
            await reader.read()
    if rng.random() < 0.5:  # with a reset
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def crowd(port: int, rng: random.Random, count: int) -> None:
    gate = asyncio.Semaphore(AT_A_TIME)

    async def one(own: random.Random) -> None:
        async with gate:
            await come_and_go(port, own)

    await asyncio.gather(*(one(random.Random(rng.random())) for _ in range(count)))


def num_descriptors() -> int:
    """Open files and sockets of this process, which is replica and clients."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def test_clients_that_go_away_leave_nothing(
    replica: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(20)
    asyncio.run(crowd(replica.port, rng, 20))  # what is made once
    replica.until_idle()
    num_tasks, num_open = replica.num_tasks(), num_descriptors()

    asyncio.run(crowd(replica.port, rng, NUM_CLIENTS))

    replica.until_idle()
    replica.until(lambda: replica.num_tasks() <= num_tasks)
    replica.until(lambda: num_descriptors() <= num_open)
    core = replica.frontend.core
    core.scheduler.check()
    assert core.num_in_flight == core.num_waiting == core.scheduler.num_running == 0
    assert replica.complete("a", max_tokens=3).usage.completion_tokens == 3
    assert not caplog.records, "a client that leaves is nothing to log"


@pytest.fixture(scope="module")
def slow_replica() -> Iterator[Replica]:
    """With the real model, whose prefills last long enough to be interrupted."""
    with served_replica() as served:
        yield served


async def ask_and_leave(replica: Replica, rng: random.Random) -> None:
    """A client with a long prompt of its own that leaves while it is computed."""
    _, writer = await asyncio.open_connection("127.0.0.1", replica.port)
    fields = {"prompt": " ".join(str(rng.random()) for _ in range(40)), "max_tokens": 50}
    body = json.dumps({"model": "smol"} | fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await asyncio.sleep(rng.random() * 0.3)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.mark.model
def test_who_stays_gets_the_same_answers_while_long_prefills_are_interrupted(
    slow_replica: Replica,
) -> None:
    replica, rng = slow_replica, random.Random(21)
    asked: list[dict[str, Any]] = [
        {"prompt": "Once upon a time", "max_tokens": 20},
        {"prompt": "I am. You are. " * 20, "max_tokens": 20, "temperature": 1.0, "seed": 5},
    ]
    expected = [replica.complete(**fields).choices[0].text for fields in asked]
    counters = replica.frontend.core.scheduler.counters
    is_over = threading.Event()

    async def others() -> None:
        while not is_over.is_set():
            await asyncio.gather(*(ask_and_leave(replica, rng) for _ in range(2)))

    leaving = threading.Thread(target=asyncio.run, args=(others(),))
    leaving.start()
    try:
        while counters.interrupted_steps < 4:
            for fields, text in zip(asked, expected, strict=True):
                assert replica.complete(**fields).choices[0].text == text
    finally:
        is_over.set()
        leaving.join()

    replica.until_idle()
    replica.frontend.core.scheduler.check()
