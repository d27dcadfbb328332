"""The first-light demonstration: a request comes home to the replica that remembers it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import cycle

import aiohttp

from roost_loadtest.client import Measurement, stream_chat
from roost_loadtest.prompts import conversation

_ROW = "  {:<44} {:>7} {:>8} {:>8} {:>9}  {}"


async def demonstrate(
    base_urls: Sequence[str], model: str, num_tokens: int = 2000
) -> list[Measurement]:
    """Send a long prompt cold, then warm, then another conversation; print what happened.

    `base_urls`: of routers, which are asked in turn. Returns the three measurements. Raises
    StreamError if one of them fails.
    """
    steps = (
        ("long prompt, first time", "library", "When does the archive open?"),
        ("same long prompt, another question", "library", "Where are my bags kept?"),
        ("another conversation, just as long", "observatory", "Whom do I ask?"),
    )
    _print(f"\nDemonstration: {num_tokens} tokens of shared prompt, three requests\n")
    _print(_ROW.format("request", "replica", "prompt", "cached", "TTFT", "").rstrip())
    measured: list[Measurement] = []
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for (title, name, question), base_url in zip(steps, cycle(base_urls), strict=False):
            messages = conversation(name, question, num_tokens)
            result = await stream_chat(session, base_url, model, messages, max_tokens=8)
            measured.append(result)
            _print(_row(title, result, measured[0]))
    return measured


def _row(title: str, result: Measurement, first: Measurement) -> str:
    note = ""
    if result is not first and result.replica == first.replica:
        note = f"{first.ttft_s / result.ttft_s:.0f} x sooner: it came home"
    elif result is not first:
        note = "placed on the other replica"
    return _ROW.format(
        title,
        result.replica or "-",
        result.prompt_tokens,
        result.cached_tokens,
        f"{result.ttft_s:.3f} s",
        note,
    ).rstrip()


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
