"""Drift: whether our count of a prompt's tokens is still the replica's. Pure.

Tokenizer and template come from the operator, and a replica may have others: another revision, a
system prompt of its own, a flag that changes the template. Then what is bound is wrong, and
nothing would say so. But replicas report `prompt_tokens`, and two different texts or tokenizers
hardly ever agree on it time after time.

A few prompts may differ for good reasons (an engine's own way with tools, say), so drift is real
when at least a quarter of the last 32 differ, and over when less than an eighth do. Judged after 8.

Not here: what follows from it (the placer goes by text alone), reporting it (metrics, log).
"""

from __future__ import annotations

from typing import Final, NamedTuple

_WINDOW: Final = 32
_LEAST: Final = 8
#: Pairs of model and replica that are remembered; the oldest is forgotten for one more.
_MAX_PAIRS: Final = 16_384


class DriftChange(NamedTuple):
    """A model on a replica began to drift, or ceased to."""

    model: str
    replica: str
    is_drifting: bool
    num_differing: int  # of
    num_compared: int  # the last ones
    expected_tokens: int  # as we counted the last prompt that differed
    reported_tokens: int  # as the replica did

    def __str__(self) -> str:
        if not self.is_drifting:
            return f"{self.replica} counts the tokens of {self.model} as we do again"
        return (
            f"{self.replica} counts the tokens of {self.model} differently: {self.num_differing} "
            f"of the last {self.num_compared} prompts, the last {self.reported_tokens} instead of "
            f"{self.expected_tokens}. Give --tokenizer the replica's own tokenizer and template"
        )


class _Pair:
    """The last comparisons of one model on one replica, newest in the lowest bit."""

    __slots__ = ("differing", "is_drifting", "last", "num_compared")

    def __init__(self) -> None:
        self.differing = 0
        self.num_compared = 0
        self.is_drifting = False
        self.last = (0, 0)


class DriftWatch:
    """Compares counts of tokens, by model and replica."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, str], _Pair] = {}

    def is_drifting(self, model: str, replica: str) -> bool:
        """Whether what is bound for `model` must not be trusted on `replica`."""
        pair = self._pairs.get((model, replica))
        return pair is not None and pair.is_drifting

    def drifting(self) -> list[tuple[str, str]]:
        """Models and replicas of which that is so. O(pairs)."""
        return [of for of, pair in self._pairs.items() if pair.is_drifting]

    def compare(
        self, model: str, replica: str, expected_tokens: int, reported_tokens: int
    ) -> DriftChange | None:
        """Note one prompt, counted by us and by the replica; a change if it makes one. O(1)."""
        pair = self._pairs.get((model, replica))
        if pair is None:
            if len(self._pairs) >= _MAX_PAIRS:
                del self._pairs[next(iter(self._pairs))]
            pair = self._pairs[model, replica] = _Pair()
        differs = expected_tokens != reported_tokens
        if differs:
            pair.last = (expected_tokens, reported_tokens)
        pair.differing = (pair.differing << 1 | differs) & ((1 << _WINDOW) - 1)
        pair.num_compared = min(_WINDOW, pair.num_compared + 1)
        if pair.num_compared < _LEAST:
            return None
        num_differing, limit = pair.differing.bit_count(), 8 if pair.is_drifting else 4
        is_drifting = limit * num_differing >= pair.num_compared
        if is_drifting == pair.is_drifting:
            return None
        pair.is_drifting = is_drifting
        return DriftChange(
            model, replica, is_drifting, num_differing, pair.num_compared, *pair.last
        )

    def forget(self, replica: str) -> None:
        """The replica started anew, maybe with another model revision. O(pairs)."""
        for pair in [pair for pair in self._pairs if pair[1] == replica]:
            del self._pairs[pair]
