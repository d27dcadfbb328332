"""Streams on a real model whose answers are known: what every fault test of engines asks for.

Each prompt is asked for in every way that a resumed stream could get wrong: greedy, seeded, with
penalties, with a stop string, in a grammar. The reference is what an engine says undisturbed;
all engines must agree on it, or nothing could be compared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from roost_loadtest.fault_answer import Expected, Verdict
from roost_loadtest.fault_client import Client, Outcome, at_once
from roost_loadtest.peers import PeerError

_SUBJECTS = (
    "a lighthouse keeper", "the price of salt", "bees in winter", "a slow train",
    "the first telescope", "rain on a tin roof", "old maps", "a chess match by letter",
    "bread without yeast", "the sound of snow", "a clock that runs backwards", "tides and the moon",
)  # fmt: skip
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "count": {"type": "integer"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
VARIANTS = ("greedy", "seeded", "penalties", "stop", "schema")


class Job(msgspec.Struct, frozen=True):
    """A request and its undisturbed answer."""

    variant: str
    body: dict[str, Any]
    expected: Expected
    num_events: int  # of the undisturbed stream, role, finish, usage and [DONE] among them


async def make_jobs(
    ports: Sequence[int],
    model: str,
    *,
    prompts: int,
    tokens: int,
    seed: int,
    variants: Sequence[str] = VARIANTS,
) -> list[Job]:
    """Ask the engines at `ports` themselves; a job for each prompt and variant.

    PeerError if an engine fails or two of them disagree.
    """
    rng = random.Random(seed)
    bodies = []
    for number in range(prompts):
        base = _body(model, number, tokens)
        bodies += [(variant, _vary(base, variant, rng)) for variant in variants]
    calls = [partial(_job, ports, variant, body) for variant, body in bodies]
    return await at_once(calls, 4)


async def _job(ports: Sequence[int], variant: str, body: dict[str, Any]) -> Job:
    if variant == "stop":
        body = body | {"stop": [_stop_string((await _whole(ports[0], body)).text)]}
    outcomes = [await _whole(port, body) for port in ports]
    first = outcomes[0]
    for other in outcomes[1:]:
        if (other.text, other.completion_tokens) != (first.text, first.completion_tokens):
            raise PeerError(f"engines disagree ({variant}): {first.text!r}, {other.text!r}")
    expected = Expected(
        text=first.text,
        finish_reason=first.finish_reason or "",
        completion_tokens=first.completion_tokens,
        prompt_tokens=first.prompt_tokens,
    )
    return Job(variant, body, expected, first.num_events)


async def _whole(port: int, body: dict[str, Any]) -> Outcome:
    outcome = await Client(port).ask(body)
    if outcome.verdict is not Verdict.OK:
        raise PeerError(f"an undisturbed engine answered {outcome.status}: {outcome.detail}")
    return outcome


def _stop_string(text: str) -> str:
    """Some characters from the last third, so that most of the stream comes before them."""
    start = len(text) * 2 // 3
    return text[start : start + 6] or "never"


def _body(model: str, number: int, tokens: int) -> dict[str, Any]:
    subject = _SUBJECTS[number % len(_SUBJECTS)]
    return {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell story {number} about {subject}."}],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
    }


def _vary(base: dict[str, Any], variant: str, rng: random.Random) -> dict[str, Any]:
    sampled = {"temperature": 0.8, "seed": rng.getrandbits(31)}
    if variant == "seeded":
        return base | sampled
    if variant == "penalties":
        penalties = {"frequency_penalty": 0.6, "presence_penalty": 0.4, "min_tokens": 4}
        return base | sampled | penalties | {"top_p": 0.95}
    if variant == "schema":
        form = {"name": "item", "schema": _SCHEMA, "strict": True}
        wanted = {"response_format": {"type": "json_schema", "json_schema": form}}
        return base | sampled | wanted
    return base
