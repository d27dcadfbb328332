"""Events that differ from the one before in their text only: known by the bytes around it. Pure.

    data: {"id":"c","object":"…","choices":[{"index":0,"delta":{"content":"word "}, … }]}\\n\\n
    └────────────────────────── before ───────────────────────────────────┘└ text ┘└ after ┘

A stream is mostly such events, and decoding each says nothing new but its text. A shape becomes
known only when the decoder, given another text between the same bytes, answers that other text:
so these bytes decide everything but the text, and the text stands between them as a whole JSON
string. Then any text is read the same way as long as it is plain: printable ASCII without `"` and
`\\`, which JSON writes as itself. Everything else is decoded.

Not here: what an event says (events.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

_PLAIN: Final = re.compile(rb"[ !#-\[\]-~]+")
#: Two that no server writes: equal bytes around both, and neither is a special case.
_PROBES: Final = (b"roost probe 1", b"#2")
#: Shapes tried in a row that were of no use: a stream whose events differ more is only decoded.
_MAX_TRIES: Final = 8

#: The one text of an event that says nothing else, else nothing.
ReadText = Callable[[bytes], str | None]


class KnownEvent:
    """The shape of one stream's events, once two in a row have shown it."""

    __slots__ = ("_after", "_around", "_before", "_num_tries", "_read")

    def __init__(self, read: ReadText) -> None:
        self._read = read
        self._before = b""  # nothing is known
        self._after = b""
        self._around = (b"", b"")  # of the last event, not tried yet
        self._num_tries = 0

    def text(self, event: bytes) -> bytes | None:
        """The text of `event`, whole and its blank line included; None if it is to be decoded."""
        before, after = self._before, self._after
        if not before or not event.startswith(before) or not event.endswith(after):
            return None
        found = _PLAIN.fullmatch(event, len(before), len(event) - len(after))
        if found is None:
            return None
        self._num_tries = 0
        return found[0]

    def learn(self, event: bytes, text: str) -> None:
        """`event` was decoded: it says `text` and nothing else. O(event)."""
        if self._num_tries >= _MAX_TRIES:
            return
        written = b'"%b"' % text.encode("utf-8", "surrogatepass")
        start = event.find(written) + 1
        if not start or _PLAIN.fullmatch(written, 1, len(written) - 1) is None:
            return
        around = before, after = event[:start], event[start + len(written) - 2 :]
        if around != self._around:
            self._around = around
            return
        self._num_tries += 1
        if all(self._read(before + probe + after) == probe.decode() for probe in _PROBES):
            self._before, self._after = before, after
