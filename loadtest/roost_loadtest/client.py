"""A streaming OpenAI client that measures what a user feels. Shared by the demo and benchmarks.

TTFT is the time from sending the request to the first piece of text. A stream that ends
without a finish reason and [DONE] is an error, whatever the status was.
"""

from __future__ import annotations

import time
from typing import Any

import aiohttp
import msgspec

from roost_router.answer.usage import Usage
from roost_wire import headers as names


class StreamError(Exception):
    """The request failed; the message says how."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One streamed completion."""

    replica: str | None  # None: the server does not tell
    ttft_s: float
    e2e_s: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    matched_tokens: int | None
    text: str


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None
    error: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(_Event)


async def stream_chat(
    session: aiohttp.ClientSession,
    base_url: str,
    model: str,
    messages: list[dict[str, str]],
    *,
    max_tokens: int,
) -> Measurement:
    """Stream one greedy chat completion from `base_url` (with /v1) and measure it.

    Raises StreamError for any answer that is not a whole stream.
    """
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.monotonic()
    ttft_s: float | None = None
    pieces: list[str] = []
    usage, finished, done = Usage(), False, False
    try:
        async with session.post(f"{base_url}/chat/completions", json=body) as answer:
            if answer.status != 200:
                raise StreamError(f"status {answer.status}: {(await answer.text())[:300]}")
            async for line in answer.content:
                if not line.startswith(b"data:"):
                    continue
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    done = True
                    continue
                event = _decoder.decode(payload)
                if event.error is not None:
                    raise StreamError(f"error event: {event.error.get('message')}")
                usage = event.usage or usage
                for choice in event.choices:
                    finished = finished or choice.finish_reason is not None
                    if choice.delta.content:
                        ttft_s = ttft_s or time.monotonic() - started
                        pieces.append(choice.delta.content)
            headers = answer.headers
    except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError) as error:
        raise StreamError(f"{type(error).__name__}: {error}") from error
    if not (finished and done):
        raise StreamError("the stream ended without a finish reason and [DONE]")
    e2e_s = time.monotonic() - started
    matched = headers.get(names.MATCHED_TOKENS)
    return Measurement(
        replica=headers.get(names.REPLICA),
        ttft_s=ttft_s if ttft_s is not None else e2e_s,
        e2e_s=e2e_s,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens or 0,
        completion_tokens=usage.completion_tokens,
        matched_tokens=int(matched) if matched else None,
        text="".join(pieces),
    )
