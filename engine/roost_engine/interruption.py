"""Interruption: whether the step under way is still worth its time when clients have left.

A client that goes away in the middle of a long prefill would otherwise have its slot, its blocks
and both its cores until the step is done: 512 tokens take half a second on two cores. A runner
that can be interrupted throws such a step away. Nothing of it counts: `num_computed` of those who
stay is what it was, so the next step holds the same tokens of theirs, and writes the same slots.

What the others lose is bounded:
    * only a step most of whose tokens nobody waits for any more is interrupted, so they lose less
      than what is saved, once;
    * never two steps running at their expense, so they get on at least every second step;
    * not for fewer than `LEAST_SAVED_TOKENS`: such a step is done in 50 ms anyway, which is the
      case of all steps that only decode.
A step that nobody waits for is interrupted always.

Not here: interrupting (native/threads.h), threads and locks (core.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from roost_engine.scheduler import Step

LEAST_SAVED_TOKENS: Final = 32


class StepInterruptedError(Exception):
    """Raised by a runner whose step was interrupted; nothing of the step is to be taken."""


class Interruption:
    """Follows one step after the other: `begin`, `leave` for each who leaves, `end`."""

    def __init__(self) -> None:
        self._step: Step | None = None  # under way
        self._num_left = 0  # of its tokens, whose requests have left
        self._is_ordered = False
        self._was_interrupted = False  # the step before

    def begin(self, step: Step) -> None:
        """A step is about to be computed."""
        self._step, self._num_left, self._is_ordered = step, 0, False

    def leave(self, request_id: str) -> bool:
        """A request's client has left; whether to interrupt now. True once a step, at most.

        O(requests of the step).
        """
        step = self._step
        if step is None:
            return False
        self._num_left += sum(
            len(chunk.token_ids)
            for request, chunk in zip(step.scheduled, step.chunks, strict=True)
            if request.id == request_id
        )
        if self._is_ordered or not self._is_worth_it(step.num_tokens - self._num_left):
            return False
        self._is_ordered = True
        return True

    def end(self, *, was_interrupted: bool) -> None:
        """The step is over; an interruption that came too late did not interrupt it."""
        self._step, self._was_interrupted = None, was_interrupted

    def _is_worth_it(self, num_staying: int) -> bool:
        if num_staying == 0:
            return True
        is_long = self._num_left >= LEAST_SAVED_TOKENS
        return is_long and self._num_left > num_staying and not self._was_interrupted
