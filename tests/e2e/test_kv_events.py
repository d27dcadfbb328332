"""A real engine publishes its KV events; what the router makes of them is what the engine has."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request

import pytest
from processes import Process, get, make_client, metric, start_engine

from roost_router.fleet.fleet import Fleet
from roost_router.fleet.replica import Replica
from roost_router.index.prefix_index import PrefixIndex
from roost_router.index.token_index import TokenIndex
from roost_router.kv.follow import KvFollower
from roost_router.kv.source import Dialect
from roost_router.kv.token_sink import TokenSink
from roost_router.kv.trust import Trust
from roost_wire.load_report import LoadReport
from roost_wire.token_chain import block_hashes

ANY = "tcp://127.0.0.1:*"
PROMPT = "The mill by the river grinds what the farmers of the valley bring. " * 12


@pytest.fixture
def engine():
    engine = start_engine(
        "--kv-events-endpoint", ANY, "--kv-events-replay-endpoint", ANY, "--kv-tokens", "8192"
    )
    yield engine
    assert engine.stop() == 0


def tokens_of(engine: Process, prompt: str) -> list[int]:
    body = json.dumps({"prompt": prompt}).encode()
    request = urllib.request.Request(f"{engine.url}/tokenize", body)
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())["tokens"]


async def test_the_router_knows_what_a_real_engine_has_cached(engine):
    (told,) = json.loads(get(f"{engine.url}/kv_event_sources"))
    assert told["block_size"] == 16
    assert told["endpoint"].startswith("tcp://127.0.0.1:")
    index = TokenIndex(1 << 24)
    sinks: list[TokenSink] = []

    def make_sink(_replica: Replica, _rank: int) -> TokenSink:
        sinks.append(TokenSink(index, lambda: None, hashes_are_chain=True))
        return sinks[-1]

    fleet = Fleet(PrefixIndex(), (engine.url,))
    (replica,) = fleet.replicas
    fleet.answered(replica, ["m"], LoadReport(), "roost")
    client = make_client(engine.url)
    model = client.models.list().data[0].id
    await asyncio.to_thread(client.completions.create, model=model, prompt=PROMPT, max_tokens=4)
    follower = KvFollower(fleet, make_sink, lambda: None, time.monotonic)
    running = asyncio.ensure_future(follower.run())
    chain = block_hashes(await asyncio.to_thread(tokens_of, engine, PROMPT), 16)

    async def until_held() -> None:
        async with asyncio.timeout(20):
            while not sinks or index.lookup(chain, 1 << sinks[0].holder) != [
                (len(chain), 1 << sinks[0].holder)
            ]:
                await asyncio.sleep(0.02)

    await until_held()
    assert len(chain) > 8
    assert sinks[0].trust is Trust.EXACT
    other = PROMPT.replace("mill", "smith")
    await asyncio.to_thread(client.completions.create, model=model, prompt=other, max_tokens=4)
    chain = block_hashes(await asyncio.to_thread(tokens_of, engine, other), 16)
    await until_held()

    (status,) = follower.status()
    assert (status.dialect, status.trust) == (Dialect.VLLM, Trust.EXACT)
    assert status.left_out == {}
    assert metric(engine, "vllm:num_requests_running") == 0
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    client.close()


def test_a_replay_endpoint_alone_is_refused_with_what_to_do():
    engine = Process("serve", "smollm2", "--kv-events-replay-endpoint", ANY)

    engine.until_line("--kv-events-endpoint tells: give both")
    assert engine.popen.wait(30) == 1
    assert engine.stop() == 1


def test_an_endpoint_that_is_taken_is_told_before_the_model_is_loaded(engine):
    (told,) = json.loads(get(f"{engine.url}/kv_event_sources"))
    port = told["endpoint"].rpartition(":")[2]
    second = Process("serve", "smollm2", "--port", "0", "--kv-events-endpoint", f"tcp://*:{port}")

    second.until_line(f"cannot publish KV events on tcp://.:{port}")
    assert second.popen.wait(30) == 1
    assert second.stop() == 1
