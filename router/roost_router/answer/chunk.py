"""A streamed completion chunk, as far as the router reads it. Pure.

Interpreted where the rest is compiled (decisions/0016): msgspec reads the fields' types, which the
compiler does not keep.
"""

from __future__ import annotations

from typing import Final

import msgspec

_EMPTY_RAW: Final = msgspec.Raw(b"")


class Delta(msgspec.Struct):
    """What a streamed chat chunk adds."""

    content: str | None = None
    tool_calls: msgspec.Raw = _EMPTY_RAW
    function_call: msgspec.Raw = _EMPTY_RAW
    reasoning: msgspec.Raw = _EMPTY_RAW
    reasoning_content: msgspec.Raw = _EMPTY_RAW
    refusal: msgspec.Raw = _EMPTY_RAW


class Choice(msgspec.Struct):
    """One of the answers that were asked for."""

    index: int = 0
    delta: Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    """One event of a stream; `text` of a choice is of /v1/completions."""

    choices: list[Choice] = []
    usage: msgspec.Raw = _EMPTY_RAW
    error: msgspec.Raw = _EMPTY_RAW


#: Raises msgspec.DecodeError, UnicodeDecodeError or RecursionError.
decode_chunk = msgspec.json.Decoder(Chunk).decode
