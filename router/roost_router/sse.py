"""Follow a server-sent event stream as it passes, without holding it up. Pure.

The router relays bytes as they come; this observer sees the same bytes and keeps only what
the router must know: did the stream end properly (`data: [DONE]`), how many events came, and
the usage, when the client asked for it. OpenAI's events are one `data:` line each, their JSON
holds no raw line break, so lines are all that must be told apart; nothing is decoded, except
a line that has a usage.

Cost: a few substring searches for each chunk, O(bytes) however the stream is cut; memory is
bounded by one line (MAX_LINE_BYTES).
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

#: A longer line is passed on, but not read; it may carry logprobs, hence more than a text needs.
MAX_LINE_BYTES = 1 << 20

_MAX_TOKENS = 1 << 31
_USAGE = re.compile(rb'"usage":\s*\{')
_DONE = re.compile(rb"^data: ?\[DONE\]\s*$", re.MULTILINE)

TokenCount = Annotated[int, msgspec.Meta(ge=0, le=_MAX_TOKENS)]


class PromptDetails(msgspec.Struct, frozen=True):
    """`usage.prompt_tokens_details`."""

    cached_tokens: TokenCount | None = None


class Usage(msgspec.Struct, frozen=True):
    """What a replica says a request has cost, in tokens; counts that cannot be are refused."""

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


_decoder = msgspec.json.Decoder(_WithUsage)


def read_usage(body: bytes) -> Usage | None:
    """The usage of a whole (non-streamed) answer, or None."""
    try:
        return _decoder.decode(body).usage
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class SseObserver:
    """Watches one stream."""

    def __init__(self) -> None:
        self.num_events = 0
        self.is_done = False
        self.usage: Usage | None = None
        self._line: list[bytes] = []  # pieces of a line whose end has not come
        self._line_bytes = 0

    @property
    def is_inside_line(self) -> bool:
        """Whether the stream stands in the middle of a line: what follows would be part of it."""
        return bool(self._line)

    def feed(self, data: bytes) -> None:
        """Look at the next bytes of the stream, cut anywhere."""
        end = data.rfind(b"\n") + 1
        if end:
            self._read(b"".join((*self._line, data[:end])))
            self._line.clear()
            self._line_bytes = 0
            data = data[end:]
        self._line_bytes += len(data)
        if self._line_bytes > MAX_LINE_BYTES:
            self._line = [b":"]  # reads as a comment, whatever else comes of it
        elif data:
            self._line.append(data)

    def end(self) -> None:
        """The stream is over: a last line may lack its line break."""
        self.feed(b"\n")

    def _read(self, lines: bytes) -> None:
        self.num_events += lines.count(b"\ndata:") + lines.startswith(b"data:")
        if b"[DONE]" in lines and _DONE.search(lines):
            self.is_done = True
        if _USAGE.search(lines):
            for line in lines.splitlines():
                if line.startswith(b"data:") and _USAGE.search(line):
                    self.usage = read_usage(line[5:].strip()) or self.usage
