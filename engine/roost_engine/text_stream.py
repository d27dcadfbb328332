"""Text of one answer as it may be shown: cut at stop strings, never a character too much.

A stop string may arrive in pieces, across token boundaries. Text that could still turn out to
be the beginning of one is held back until it is decided:

    shown | held back              stop = "\\n\\nUser:"
    "...done." | "\\n\\nUs"        the next piece decides whether it is shown or was the stop

`push` returns what may be shown now. The answer ends at the stop string that is complete first
(of several that end together: the one that starts first); it is not shown unless that is asked
for, nor is anything after it. So the result does not depend on how the text is cut into pieces.
Cost: O(piece + longest stop string) for each stop.

Invariant: text shown is a prefix of the text received, free of stop strings, and all of it
once `flush` was called on a stream that met none.

Not here: tokens to text (tokenizer.py), telling the engine to stop (frontend.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class TextStream:
    """Assembles the pieces of one answer; `matched` is the stop string that was met."""

    def __init__(self, stop: Sequence[str] = (), *, shows_stop: bool = False) -> None:
        """`stop` strings are not empty (the API refuses empty ones)."""
        self._stop = tuple(stop)
        self._shows_stop = shows_stop
        self._held = ""
        self.matched: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self.matched is not None

    def push(self, piece: str) -> str:
        """Take the next piece; return what may be shown, "" after the end."""
        if self.stopped or not piece:
            return ""
        text = self._held + piece
        end, start, self.matched = self._first_stop(text)
        if self.stopped:
            self._held = ""
            return text[:end] if self._shows_stop else text[:start]
        keep = self._num_undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def push_unchecked(self, piece: str) -> str:
        """Take a piece in which stop strings do not count; only before any `push`."""
        assert not self._held
        return piece

    def flush(self) -> str:
        """End of the answer: what was held back was no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> tuple[int, int, str | None]:
        """End, start and text of the stop string that is complete first; None: there is none."""
        ends = [
            (start + len(stop), start, stop)
            for stop in self._stop
            if (start := text.find(stop)) >= 0
        ]
        return min(ends, default=(0, 0, None))

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
