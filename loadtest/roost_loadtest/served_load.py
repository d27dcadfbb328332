"""The served workload of `roost bench engine`: requests that share a long prefix, closed loop.

Each client sends its next request when the last one has ended. Prompts are token ids, so every
server gets the same tokens: `shared_tokens` that all have in common, then `own_tokens`. A round
has ids of its own, so its first request finds nothing in a cache and the others find the prefix.

Not here: starting servers (peers.py).
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import aiohttp
import msgspec

from roost_loadtest.client import StreamError
from roost_loadtest.percentile import percentile

_LOWEST_ID, _HIGHEST_ID = 1000, 30_000


class ServedWorkload(msgspec.Struct, frozen=True):
    """What is sent."""

    requests: int = 64
    shared_tokens: int = 1024
    own_tokens: int = 64
    new_tokens: int = 64
    clients: int = 8


class ServedResult(msgspec.Struct, frozen=True):
    """What came of it."""

    seconds: float  # from the first request to the last token
    ttft_p50_s: float
    ttft_p95_s: float


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(_Event)


async def run_served(url: str, model: str, workload: ServedWorkload, seed: int) -> ServedResult:
    """Send it to the server at `url`; StreamError if any request does not give its tokens."""
    bodies = iter(_bodies(model, workload, seed))

    async def client(session: aiohttp.ClientSession) -> list[float]:
        return [await _complete(session, url, body, workload.new_tokens) for body in bodies]

    # A connection a request: llama-server closes kept ones under the next request's feet.
    connector = aiohttp.TCPConnector(force_close=True)
    timeout = aiohttp.ClientTimeout(total=1800)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        started = time.perf_counter()
        try:
            of_clients = await asyncio.gather(*(client(session) for _ in range(workload.clients)))
        except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError) as error:
            raise StreamError(f"{url}: {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - started
    ttfts = sorted(ttft_s for ttfts in of_clients for ttft_s in ttfts)
    return ServedResult(seconds, percentile(ttfts, 0.5), percentile(ttfts, 0.95))


def _bodies(model: str, workload: ServedWorkload, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(_LOWEST_ID, _HIGHEST_ID) for _ in range(count)]

    shared = tokens(workload.shared_tokens)
    return [
        {
            "model": model,
            "prompt": shared + tokens(workload.own_tokens),
            "max_tokens": workload.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(workload.requests)
    ]


async def _complete(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], new_tokens: int
) -> float:
    """Seconds to the first text of one streamed completion, read to its end."""
    started = time.perf_counter()
    ttft_s: float | None = None
    generated = 0
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise StreamError(f"{url}: status {answer.status}: {(await answer.text())[:300]}")
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            event = _decoder.decode(line[6:])
            if ttft_s is None and event.choices:
                ttft_s = time.perf_counter() - started
            if event.usage is not None:
                generated = int(event.usage["completion_tokens"])
    if ttft_s is None or generated != new_tokens:
        raise StreamError(f"{url}: {generated} tokens came, {new_tokens} were asked for")
    return ttft_s
