"""What changes a row of logits before a token is drawn from it, and what is told about the row.

In vLLM's order and with its meaning; `n` counts a token's occurrences in the output:

    1. logit_bias             logit += bias
    2. min_tokens             -inf for tokens that end the answer, until there are enough
    3. grammar                -inf for tokens that the grammar does not allow next
    4. repetition_penalty r   logit / r if positive else logit * r, for tokens of prompt or output
    5. frequency_penalty f    logit -= f * n
    6. presence_penalty p     logit -= p            if n > 0

Everything is a function of the request's tokens. Counts and the grammar's state are kept up to
date as tokens come, O(new tokens), but hold nothing that the tokens do not say: after a
preemption, or on another replica, they are what they would have been.

Log probabilities are those of the model: log-softmax of the logits before any of the above and
before temperature (vLLM's "raw_logprobs").

Not here: temperature, top-k, top-p, min-p, the draw (sampling.py); grammars (grammar.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from roost_engine.request import TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from roost_engine.grammar import GrammarState
    from roost_engine.request import SamplingParams

    Row = npt.NDArray[np.float32]


def row_rules(
    params: SamplingParams, end_ids: Iterable[int], grammar: GrammarState | None
) -> RowRules | None:
    """The rules of a request; None if its logits are sampled as they are.

    `end_ids`: the tokens that end the answer.
    """
    is_plain = (
        grammar is None
        and not params.logit_bias
        and params.min_tokens == 0
        and params.presence_penalty == params.frequency_penalty == 0.0
        and params.repetition_penalty == 1.0
    )
    return None if is_plain else RowRules(params, end_ids, grammar)


class RowRules:
    """The rules of one request, see the module's table. Engine thread only."""

    def __init__(
        self, params: SamplingParams, end_ids: Iterable[int], grammar: GrammarState | None
    ) -> None:
        self._params = params
        self._end_ids = _ids(end_ids)
        self._grammar = grammar
        self._bias_ids = _ids(params.logit_bias)
        self._bias = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self._prompt_ids: npt.NDArray[np.int64] | None = None  # known with the first row
        self._counts: dict[int, int] = {}  # of output tokens
        self._num_seen = 0  # output tokens in `_counts` and in the grammar's state
        self.failure: str | None = None

    def apply(self, row: Row, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Change the logits (vocab,) of the token after `token_ids`, in place.

        If the grammar cannot go on the row becomes NaN, and `failure` says why.
        """
        self._follow(token_ids, num_prompt_tokens)
        row[self._bias_ids] += self._bias
        if self._num_seen < self._params.min_tokens:
            row[self._end_ids] = -np.inf
        if self._grammar is not None:
            row[~self._grammar.allowed(row.size)] = -np.inf
            self.failure = self._grammar.failure
            if self.failure is not None:
                row[:] = np.nan
                return
        self._penalise(row, token_ids, num_prompt_tokens)

    def is_complete(self, token_ids: Sequence[int], num_prompt_tokens: int) -> bool:
        """Whether the grammar allows nothing after `token_ids`."""
        if self._grammar is None:
            return False
        self._follow(token_ids, num_prompt_tokens)
        return self._grammar.is_complete

    def _follow(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Take in the output tokens that came since the last call."""
        new = token_ids[num_prompt_tokens + self._num_seen :]
        self._num_seen += len(new)
        for token_id in new:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
        if self._grammar is not None:
            self._grammar.advance(new)

    def _penalise(self, row: Row, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        params = self._params
        output_ids = _ids(self._counts)
        if params.repetition_penalty != 1.0:
            if self._prompt_ids is None:
                self._prompt_ids = _ids(set(token_ids[:num_prompt_tokens]))
            seen = np.union1d(self._prompt_ids, output_ids)
            factor = np.float32(params.repetition_penalty)
            row[seen] = np.where(row[seen] > 0, row[seen] / factor, row[seen] * factor)
        if params.frequency_penalty != 0.0:
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            row[output_ids] -= np.float32(params.frequency_penalty) * counts
        if params.presence_penalty != 0.0:
            row[output_ids] -= np.float32(params.presence_penalty)


def token_logprobs(row: Row, token_id: int, num_top: int) -> TokenLogprobs:
    """Log probability of a token and of the `num_top` most likely ones, ties by id.

    row: (vocab,) as the model computed it, with a finite maximum.
    """
    shifted = row.astype(np.float64)
    shifted -= shifted.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    top: list[tuple[int, float]] = []
    if num_top > 0:
        edge = np.partition(logprobs, -num_top)[-num_top] if num_top < row.size else -np.inf
        candidates = np.flatnonzero(logprobs >= edge)
        order = np.argsort(-logprobs[candidates], kind="stable")[:num_top]
        top = [(int(index), float(logprobs[index])) for index in candidates[order]]
    return TokenLogprobs(float(logprobs[token_id]), top)


def _ids(values: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.array(list(values), dtype=np.int64)
