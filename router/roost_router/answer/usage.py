"""What a replica says a request has cost. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

_MAX_TOKENS = 1 << 31

TokenCount = Annotated[int, msgspec.Meta(ge=0, le=_MAX_TOKENS)]


class PromptDetails(msgspec.Struct, frozen=True):
    """`usage.prompt_tokens_details`."""

    cached_tokens: TokenCount | None = None


class Usage(msgspec.Struct, frozen=True):
    """OpenAI's `usage`, in tokens; counts that cannot be are refused."""

    prompt_tokens: TokenCount = 0
    completion_tokens: TokenCount = 0
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens taken from the KV cache; None when the replica does not tell."""
        details = self.prompt_tokens_details
        if details is None or details.cached_tokens is None:
            return None
        return details.cached_tokens if details.cached_tokens <= self.prompt_tokens else None


class _WithUsage(msgspec.Struct):
    usage: Usage | None = None


_answer_decoder = msgspec.json.Decoder(_WithUsage)
_usage_decoder = msgspec.json.Decoder(Usage)


def read_usage(body: bytes) -> Usage | None:
    """The usage of a whole (non-streamed) answer, or None."""
    try:
        return _answer_decoder.decode(body).usage
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def decode_usage(usage: bytes) -> Usage | None:
    """A usage object by itself; None for what cannot be one."""
    try:
        return _usage_decoder.decode(usage)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
