"""Answers that a mock computes from the prompt, and how two kinds of engines resume them. Pure.

    vllm    the plain OpenAI API of vLLM, with `continue_final_message`: an assistant's message
            at the end is continued
    roost   our engine's, with token ids in comments and `roost_resume` (roost_wire/resume.py);
            some tokens wait for the next one, as half characters do, and of some the last
            character waits, as what may begin a stop string does

Invariant: what was shown before a cut after any event, and what a resumed request shows, are
together the whole answer.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import xxhash

from roost_loadtest.fault_answer import Expected
from roost_wire import resume

MODEL = "mock"
Dialect = Literal["vllm", "roost"]

_WORDS = ("tide", "ember", "quill", "moss", "lantern", "orbit", "thistle", "harbour", "flint")
_ACCENTED = ("café", "über", "naïve", "señor", "fjörd")
_SEED = 1234567


def words(prompt: str, count: int) -> list[tuple[int, str]]:
    """The answer to `prompt`: token ids and their texts. Deterministic, O(count)."""
    tokens = []
    for position in range(count):
        number = xxhash.xxh3_64_intdigest(prompt.encode(), seed=position)
        family = _ACCENTED if number % 4 == 0 else _WORDS
        token_id = number % 30_000
        tokens.append((token_id, f" {family[number // 7 % len(family)]}{token_id % 100}"))
    return tokens


def expected(prompt: str, count: int, *, exact_usage: bool) -> Expected:
    """What a client of any replica must get for `prompt` and `max_tokens` = count."""
    return Expected(
        text="".join(text for _, text in words(prompt, count)),
        finish_reason="length",
        completion_tokens=count if exact_usage else None,
        prompt_tokens=_num_prompt_tokens(prompt) if exact_usage else None,
    )


def request_body(prompt: str, count: int) -> dict[str, Any]:
    """A chat request for `count` tokens."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": count,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _num_prompt_tokens(prompt: str) -> int:
    return 8 + len(prompt) // 4


class RefusedError(Exception):
    """A request that this engine would answer with 400."""


class Work:
    """What is left to generate for one request."""

    def __init__(
        self, answer_id: str, body: dict[str, Any], dialect: Dialect, *, reports: bool
    ) -> None:
        """`reports`: with token ids. RefusedError for a body that this engine would refuse."""
        messages = body["messages"]
        self.prompt = next(m["content"] for m in messages if m["role"] == "user")
        self.id = answer_id
        self.seed = _SEED
        self.has_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self.reports = reports
        self.writes_role = True
        # sglang's router writes the newer name.
        limit, shown = body.get("max_tokens") or body["max_completion_tokens"], 0
        self.prompt_tokens = _num_prompt_tokens(self.prompt)
        self.counted = 0  # tokens that usage counts, though they are not generated here
        self.is_resumed = False
        if dialect == "vllm" and body.get("continue_final_message"):
            if body.get("add_generation_prompt", True):
                raise RefusedError("continue_final_message needs add_generation_prompt false")
            if messages[-1]["role"] != "assistant":
                raise RefusedError("the last message is not an assistant's")
            shown = _known(self.prompt, messages[-1]["content"])
            self.is_resumed, self.prompt_tokens = True, self.prompt_tokens + shown
            limit += shown
        if (given := body.get(resume.FIELD)) is not None:
            if dialect != "roost":
                raise RefusedError(f"unknown field {resume.FIELD}")
            known = msgspec.convert(given, resume.Resume)
            shown = len(known.token_ids)
            if known.token_ids != [token_id for token_id, _ in words(self.prompt, shown)]:
                raise RefusedError("these tokens are not the beginning of this answer")
            if shown and known.seed != self.seed:
                raise RefusedError("not the seed of this answer")
            self.is_resumed, self.writes_role, self.counted = True, not shown, shown
        tokens = words(self.prompt, limit)
        self.events = (
            _events_with_held_text(tokens, shown)
            if dialect == "roost"
            else [([token_id], text) for token_id, text in tokens[shown:]]
        )


def _events_with_held_text(
    tokens: list[tuple[int, str]], start: int
) -> list[tuple[list[int], str]]:
    """Events as (token ids, text) from token `start` on; the last token shows all."""

    def holds_its_tail(position: int) -> bool:
        return tokens[position][0] % 7 == 0 and position < len(tokens) - 1

    events: list[tuple[list[int], str]] = []
    ids: list[int] = []
    text = tokens[start - 1][1][-1] if start and holds_its_tail(start - 1) else ""
    for position in range(start, len(tokens)):
        ids.append(tokens[position][0])
        text += tokens[position][1]
        if ids[-1] % 5 == 0 and position < len(tokens) - 1:
            continue
        tail = text[-1] if holds_its_tail(position) else ""
        events.append((ids, text.removesuffix(tail)))
        ids, text = [], tail
    return events


def _known(prompt: str, text: str) -> int:
    """How many tokens of the answer `text` is; RefusedError if it is no beginning of it."""
    count, length = 0, 0
    while length < len(text):
        count += 1
        length += len(words(prompt, count)[-1][1])
    if "".join(piece for _, piece in words(prompt, count)) != text:
        raise RefusedError(f"this is not the beginning of the answer: {text!r}")
    return count
