"""Follow a server-sent event stream as it passes, without holding it up. Pure.

The router relays bytes as they come; this observer sees the same bytes and keeps only what
the router must know: did the stream end properly (`data: [DONE]`), how many events came, and
the usage, when the client asked for it. Events are not decoded, except one that has a usage.

Cost: two substring searches a chunk; O(bytes), memory bounded by one event (MAX_EVENT_BYTES).
"""

from __future__ import annotations

import re

import msgspec

#: A longer event is passed on, but not read: precedent is h11's and aiohttp's line limits, scaled
#: to events that may carry logprobs.
MAX_EVENT_BYTES = 1 << 20

_USAGE = re.compile(rb'"usage":\s*\{')
_DONE = b"data: [DONE]"


class PromptDetails(msgspec.Struct, frozen=True):
    """`usage.prompt_tokens_details`."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """What a replica says a request has cost, in tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens taken from the KV cache; None when the replica does not tell."""
        details = self.prompt_tokens_details
        return None if details is None else details.cached_tokens


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
        self._tail = b""

    def feed(self, data: bytes) -> None:
        """Look at the next bytes of the stream, cut anywhere."""
        if self._tail:
            data = self._tail + data
        end = data.rfind(b"\n\n")
        if end < 0:
            end = data.rfind(b"\r\n\r\n")
        if end < 0:
            self._tail = data if len(data) <= MAX_EVENT_BYTES else b""
            return
        self._tail = data[end + 2 :].lstrip(b"\r\n")
        events = data[: end + 2]
        self.num_events += events.count(b"data:")
        if _DONE in events:
            self.is_done = True
        if _USAGE.search(events):
            self._read_usage(events)

    def _read_usage(self, events: bytes) -> None:
        for line in events.splitlines():
            if line.startswith(b"data:") and _USAGE.search(line):
                self.usage = read_usage(line[5:].strip()) or self.usage
