"""What a simulated model says: a pure function of prompt, seed and position.

So the undisturbed answer is known to everybody, whichever replica gives it and however often it
is interrupted. The vocabulary is made of what hurts readers of streams: quotes, line breaks,
characters of several bytes and of several tokens, text that looks like the protocol around it.

    token i     id = xxh3(prompt, seed, i); text = VOCABULARY[id]
    held back   every so often a token's text comes only with the next one (half a character, the
                beginning of a stop string): its id is known before its text
    the end     after a length drawn from prompt and seed ("stop"), or max_tokens ("length")
"""

from __future__ import annotations

from functools import lru_cache

import msgspec
from xxhash import xxh3_64_intdigest

_VOCABULARY = (
    *(
        f" {word}"
        for word in [
            "the",
            "of",
            "and",
            "to",
            "in",
            "is",
            "it",
            "you",
            "that",
            "was",
            "for",
            "on",
            "are",
            "with",
            "as",
            "they",
        ]
    ),
    *("\n", "\n\n", "\r\n", '"', "\\", "{", "}", "[", "]", ":", ",", "\t", "\u2028", "\x7f", "/"),
    *("é", "中", "🙂", "ß", "𝄞", "\u00a0", "\ufeff"),
    *("data: ", "data: [DONE]\n\n", "[DONE]", ": roost 1 2\n", "event: error", "<|im_end|>"),
    *('"finish_reason":"stop"', '"finish_reason": null', '{"error":{"code":1}}', '"id":"x"'),
    *('"usage":{"prompt_tokens":1}', '"role":"assistant"', '"content":"', '"delta":{}', "\\u00e9"),
)
_MAX_ID = 50_000
_MAX_TOKENS = 40
#: One answer in so many is empty, one token long, or long.
_SPECIAL = 12


class Answer(msgspec.Struct, frozen=True):
    """The whole answer to one prompt with one seed."""

    token_ids: tuple[int, ...]
    visible: tuple[str, ...]  # text shown after i tokens; one longer than token_ids
    finish_reason: str

    @property
    def text(self) -> str:
        """All of it."""
        return self.visible[-1]


@lru_cache(maxsize=4096)
def answer(prompt: bytes, seed: int, max_tokens: int | None, *, holds_back: bool) -> Answer:
    """What the model says. `holds_back`: some text comes later than its token."""
    key = xxh3_64_intdigest(prompt, seed=seed & (2**64 - 1))
    length = 1 + key % _MAX_TOKENS
    if key % _SPECIAL == 0:
        length = (1, 1, 2, 4 * _MAX_TOKENS)[key // _SPECIAL % 4]
    finish_reason = "stop"
    if max_tokens is not None and max_tokens <= length:
        length, finish_reason = max_tokens, "length"
    token_ids, visible, text, shown = [], [""], "", ""
    for position in range(length):
        token_id = xxh3_64_intdigest(position.to_bytes(4, "big"), seed=key) % _MAX_ID
        token_ids.append(token_id)
        text += _VOCABULARY[token_id % len(_VOCABULARY)]
        if not (holds_back and token_id % 7 == 0 and position < length - 1):
            shown = text
        visible.append(shown)
    return Answer(tuple(token_ids), tuple(visible), finish_reason)


def num_prompt_tokens(prompt: bytes) -> int:
    """How many tokens every simulated replica counts in a prompt."""
    return 1 + len(prompt) // 4


def position_of(text: str, whole: Answer) -> int | None:
    """After how many tokens `text` is what was shown; None if it never is."""
    for num_tokens, shown in enumerate(whole.visible):
        if shown == text:
            return num_tokens
    return None
