"""Penalties, biases and bans against a slow twin, and log probabilities against the formula."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_engine.logits import RowRules, row_rules, token_logprobs
from roost_engine.request import SamplingParams

VOCAB = 12
LOGITS = np.linspace(-3, 3, VOCAB, dtype=np.float32)


def params(**options: object) -> SamplingParams:
    return SamplingParams(max_tokens=100, **options)  # type: ignore[arg-type]


def applied(
    sampling: SamplingParams, prompt: Sequence[int], output: Sequence[int], end_ids: Sequence[int]
) -> np.ndarray:
    row = LOGITS.copy()
    RowRules(sampling, end_ids, None).apply(row, [*prompt, *output], len(prompt))
    return row


def expected(
    sampling: SamplingParams, prompt: Sequence[int], output: Sequence[int], end_ids: Sequence[int]
) -> np.ndarray:
    """Slow twin: vLLM's definitions, token by token."""
    row = LOGITS.astype(np.float64)
    for token in range(VOCAB):
        row[token] += sampling.logit_bias.get(token, 0.0)
        if token in end_ids and len(output) < sampling.min_tokens:
            row[token] = -np.inf
        if token in prompt or token in output:
            factor = sampling.repetition_penalty
            row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
        row[token] -= sampling.frequency_penalty * list(output).count(token)
        row[token] -= sampling.presence_penalty * (token in output)
    return row


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=20)
penalty = st.floats(-2, 2, width=32)


@given(
    prompt=tokens,
    output=tokens,
    end_ids=st.sets(st.integers(0, VOCAB - 1), max_size=3),
    presence=penalty,
    frequency=penalty,
    repetition=st.floats(0.125, 4, width=32),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=4),
    min_tokens=st.integers(0, 20),
)
def test_rules_equal_the_slow_twin(
    prompt: list[int],
    output: list[int],
    end_ids: set[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
    min_tokens: int,
) -> None:
    sampling = params(
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=bias,
        min_tokens=min_tokens,
    )

    row = applied(sampling, prompt, output, sorted(end_ids))

    wanted = expected(sampling, prompt, output, sorted(end_ids))
    np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-4)


def test_rules_that_followed_an_answer_say_what_fresh_ones_say() -> None:
    """Preempted, continued elsewhere, or asked twice: only the tokens count."""
    sampling = params(frequency_penalty=0.5, presence_penalty=1.0, repetition_penalty=1.3)
    followed = RowRules(sampling, [], None)
    token_ids = [1, 2, 3]
    for step in range(8):
        row, again = LOGITS.copy(), LOGITS.copy()
        followed.apply(row, token_ids, 3)
        followed.apply(again, token_ids, 3)

        fresh = applied(sampling, token_ids[:3], token_ids[3:], [])
        assert row.tolist() == again.tolist() == fresh.tolist()
        token_ids.append(step % 5)


def test_a_continued_answer_counts_its_earlier_output() -> None:
    """The mark between prompt and output decides, not where the request started."""
    sampling = params(frequency_penalty=1.0, min_tokens=4)

    continued = applied(sampling, [1, 2], [5, 5, 6], [0])
    as_prompt = applied(sampling, [1, 2, 5, 5, 6], [], [0])

    assert continued[5] == LOGITS[5] - 2
    assert as_prompt[5] == LOGITS[5]


@pytest.mark.parametrize(("num_output", "is_banned"), [(0, True), (2, True), (3, False)])
def test_min_tokens_at_its_edge(num_output: int, is_banned: bool) -> None:
    row = applied(params(min_tokens=3), [1], [4] * num_output, [7, 9])

    assert np.isinf(row[[7, 9]]).all() == is_banned
    assert np.isfinite(np.delete(row, [7, 9])).all()


@pytest.mark.parametrize(
    ("options", "is_plain"),
    [
        ({}, True),
        ({"temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "logprobs": 3}, True),
        ({"stop_token_ids": frozenset({1})}, True),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"logit_bias": {1: 0.5}}, False),
        ({"min_tokens": 1}, False),
    ],
    ids=str,
)
def test_only_rows_that_need_rules_have_them(options: dict[str, object], is_plain: bool) -> None:
    assert (row_rules(params(**options), [0], None) is None) == is_plain


def test_log_probabilities_are_those_of_the_softmax() -> None:
    probabilities = np.array([0.4, 0.05, 0.3, 0.15, 0.1])
    row = (np.log(probabilities) + 3).astype(np.float32)

    told = token_logprobs(row, 1, 3)

    assert told.logprob == pytest.approx(np.log(0.05), abs=1e-6)
    assert [token for token, _ in told.top] == [0, 2, 3]
    assert [logprob for _, logprob in told.top] == pytest.approx(np.log([0.4, 0.3, 0.15]), abs=1e-6)


@pytest.mark.parametrize(("num_top", "top"), [(0, []), (1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])])
def test_ties_among_the_most_likely_go_to_the_lower_ids(num_top: int, top: list[int]) -> None:
    told = token_logprobs(np.zeros(4, dtype=np.float32), 3, num_top)

    assert [token for token, _ in told.top] == top
    assert told.logprob == pytest.approx(np.log(0.25))


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    row = np.array([0.0, -np.inf], dtype=np.float32)

    assert token_logprobs(row, 0, 20).top == [(0, 0.0), (1, -np.inf)]
