"""Log probabilities as OpenAI shows them, in the two forms of its two endpoints.

A token is text, but not every token is: one that holds part of a character only is written
`\\xf0\\x9f` in a chat and `bytes:\\xf0\\x9f` in a completion, as OpenAI does. Special tokens are
shown by their names. Zero probability is told as -9999, vLLM's word for it: JSON has no infinity.

Not here: the numbers (logits.py), which tokens are shown (generation.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

_LEAST_LOGPROB: Final = -9999.0


class ShownToken(msgspec.Struct, frozen=True):
    """A token of an answer, with its log probability and those of its alternatives."""

    spelling: bytes
    logprob: float
    top: list[tuple[bytes, float]]  # most likely first
    text_offset: int  # characters of the answer before it


def chat_logprobs(tokens: Sequence[ShownToken]) -> dict[str, Any]:
    """`logprobs` of a chat's choice."""
    content = [
        _chat_token(token.spelling, token.logprob)
        | {"top_logprobs": [_chat_token(*alternative) for alternative in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[ShownToken]) -> dict[str, Any]:
    """`logprobs` of a text completion's choice; alternatives include the token itself."""
    return {
        "text_offset": [token.text_offset for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "tokens": [_spell(token.spelling, "bytes:") for token in tokens],
        "top_logprobs": [
            {
                _spell(spelling, "bytes:"): _finite(logprob)
                for spelling, logprob in [*token.top, (token.spelling, token.logprob)]
            }
            for token in tokens
        ],
    }


def _chat_token(spelling: bytes, logprob: float) -> dict[str, Any]:
    return {
        "token": _spell(spelling, ""),
        "logprob": _finite(logprob),
        "bytes": list(spelling),
    }


def _spell(spelling: bytes, prefix: str) -> str:
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in spelling)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
