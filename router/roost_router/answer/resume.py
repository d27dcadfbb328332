"""Continue a broken stream on another replica: the body of the next leg, and its events. Pure.

Exact, where both replicas are our engine: the same body with the tokens emitted so far and their
seed (roost_wire/resume.py); the new leg continues as the lost one would have.

By text, on engines that continue the last message (vLLM, SGLang, llama.cpp), and on any that
continue a prompt: what was emitted becomes the start of the answer. Tokens may be cut differently
there, sampling begins anew, and a stop string that spans the seam is missed. What cannot be
continued so is refused rather than spoiled: several choices, tool calls, forced formats (a grammar
would start over), log probabilities that count positions, echo.

The client must see one answer: events of later legs get the first leg's id, no second role, and
a usage over all legs.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from roost_router.answer.events import Emitted, data_of, split_events
from roost_router.answer.usage import Usage
from roost_wire.resume import Resume, with_resume

#: What `owned_by` in /v1/models says of servers that we know how to continue on.
EXACT_DIALECT: Final = "roost"
TEXT_DIALECTS: Final = frozenset({"roost", "vllm", "sglang", "llamacpp"})

#: Fields that make continuing by text wrong.
_UNFIT: Final = (
    *("tools", "functions", "response_format", "structured_outputs", "echo", "suffix"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "best_of"),
)
_LIMITS: Final = ("max_completion_tokens", "max_tokens")
_SAME: Final = ("id", "created", "model", "system_fingerprint")


class CannotResumeError(Exception):
    """The answer cannot be continued; the message says why."""


class Asked(msgspec.Struct, frozen=True):
    """What a body asked for, as far as resuming goes; read only when a leg is lost."""

    fields: dict[str, Any]

    @property
    def num_choices(self) -> int:
        """`n`."""
        n = self.fields.get("n")
        return n if isinstance(n, int) else 1

    @property
    def has_text_prompt(self) -> bool:
        """Whether `prompt` is one text: a completion, not a chat."""
        return isinstance(self.fields.get("prompt"), str) and "messages" not in self.fields

    @property
    def wants_usage(self) -> bool:
        """`stream_options.include_usage`."""
        options = self.fields.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    @property
    def max_tokens(self) -> int | None:
        """The limit of generated tokens, if the body sets one."""
        limits = [self.fields[name] for name in _LIMITS if self.fields.get(name) is not None]
        return limits[0] if limits and isinstance(limits[0], int) else None


def read_asked(body: bytes) -> Asked:
    """Decode a body that the router took; nothing is known of one that is odd. O(bytes)."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        fields = None
    return Asked(fields if isinstance(fields, dict) else {})


def exact_body(body: bytes, emitted: Emitted, seed: int) -> bytes:
    """The body that continues after the emitted tokens. CannotResumeError."""
    try:
        return with_resume(body, Resume(emitted.ids(), seed))
    except ValueError as error:
        raise CannotResumeError(str(error)) from None


def text_body(asked: Asked, emitted: Emitted) -> bytes:
    """The body that continues after the emitted text. CannotResumeError. O(bytes)."""
    fields = dict(asked.fields)
    unfit = [name for name in _UNFIT if fields.get(name) not in (None, False, [], {})]
    if unfit or fields.get("tool_choice") not in (None, "none", "auto"):
        raise CannotResumeError(f"'{(unfit or ['tool_choice'])[0]}' cannot be continued by text")
    if not (emitted.is_plain_text and emitted.is_understood and asked.num_choices == 1):
        raise CannotResumeError("only a single choice of plain text can be continued by text")
    text = emitted.text.decode("utf-8", "replace")
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [*fields["messages"], {"role": "assistant", "content": text}]
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    elif isinstance(fields.get("prompt"), str):
        fields["prompt"] += text
    else:
        raise CannotResumeError("a prompt of token ids cannot be continued by text")
    for name in _LIMITS:
        if isinstance(fields.get(name), int):
            fields[name] -= emitted.num_tokens
    if isinstance(fields.get("min_tokens"), int):
        fields["min_tokens"] = max(0, fields["min_tokens"] - emitted.num_tokens)
    return msgspec.json.encode(fields)


class Continuation:
    """Makes the events of a later leg continue the first one's."""

    def __init__(self, emitted: Emitted, *, is_exact: bool, cached_tokens: int | None) -> None:
        """`cached_tokens`: of the first leg; those of a later one count what was generated."""
        first = _first_chunk(emitted)
        self._same = {name: first[name] for name in _SAME if name in first}
        self._is_first = not emitted.first_chunk
        self._earlier_tokens = 0 if is_exact else emitted.num_tokens
        self._cached_tokens = cached_tokens

    def rewrite(self, events: bytes) -> bytes:
        """Whole events as the client gets them."""
        blocks = (self._rewrite(block) for block in split_events(events))
        return b"".join(block + b"\n\n" for block in blocks if block)

    def _rewrite(self, block: bytes) -> bytes:
        payload = data_of(block)
        if payload is None or payload == b"[DONE]":
            return block
        try:
            chunk = msgspec.json.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return block
        if not isinstance(chunk, dict):
            return block
        chunk |= self._same
        choices = chunk.get("choices")
        if isinstance(choices, list) and choices and not self._is_first:
            kept = [_keep(choice) for choice in choices]  # each loses its role
            if not any(kept):
                return b""
        if isinstance(chunk.get("usage"), dict):
            chunk["usage"] = self._usage(chunk["usage"])
        return b"data: " + msgspec.json.encode(chunk)

    def _usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        try:
            counted = msgspec.convert(usage, Usage)
        except msgspec.ValidationError:
            return usage
        prompt = max(0, counted.prompt_tokens - self._earlier_tokens)
        return usage_object(
            prompt, counted.completion_tokens + self._earlier_tokens, self._cached_tokens
        )


def closing_events(
    emitted: Emitted,
    asked: Asked,
    prompt_tokens: int | None,
    cached: int | None,
    *,
    is_counted: bool,
    finish_reason: str | None = None,
) -> bytes:
    """What a stream lacks after its last finish_reason: usage, if asked for and known, [DONE].

    `is_counted`: every token was reported. Else the usage is left out: chunks are no tokens where
    an engine puts several into one, and a wrong number would be billed.
    `finish_reason`: sent first, where generation had nothing left to do.
    """
    events, first = [], _first_chunk(emitted)
    base = {name: value for name, value in first.items() if name in (*_SAME, "object")}
    if finish_reason is not None:
        is_chat = base.get("object") != "text_completion"
        text: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
        choice = {"index": 0, **text, "finish_reason": finish_reason}
        events.append(msgspec.json.encode({**base, "choices": [choice]}))
    if asked.wants_usage and not emitted.has_usage and prompt_tokens is not None and is_counted:
        usage = usage_object(prompt_tokens, emitted.num_tokens, cached)
        events.append(msgspec.json.encode({**base, "choices": [], "usage": usage}))
    events.append(b"[DONE]")
    return b"".join(b"data: " + event + b"\n\n" for event in events)


def usage_object(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int | None
) -> dict[str, Any]:
    """OpenAI's `usage`."""
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if cached_tokens is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return usage


def _first_chunk(emitted: Emitted) -> dict[str, Any]:
    try:
        first = msgspec.json.decode(emitted.first_chunk)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return first if isinstance(first, dict) else {}


def _keep(choice: Any) -> bool:
    """Drop the role, which the client has; whether the choice still says anything."""
    if not isinstance(choice, dict):
        return True
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return bool(choice.get("text") or choice.get("finish_reason") or choice.get("logprobs"))
    delta.pop("role", None)
    says = any(value not in (None, "", [], {}) for value in delta.values())
    return says or choice.get("finish_reason") is not None or bool(choice.get("logprobs"))
