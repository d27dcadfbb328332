"""Admission: the peak against a simulation step by step, and what is expected of requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_engine.admission import (
    DECAY_STEPS,
    INITIAL_FRACTION,
    LEAST_FRACTION,
    LOOKAHEAD_TOKENS,
    Demand,
    ExpectedOutput,
    future_peak_blocks,
)
from roost_engine.request import Request, SamplingParams


def stepped_peak(demands: list[Demand], block_size: int) -> int:
    """The slow twin: grow everybody by a token a step until the last one ends."""
    peak = 0
    for step in range(max((steps for steps, _, _ in demands), default=0)):
        held = 0
        for remaining_steps, num_tokens, own_blocks in demands:
            if step < remaining_steps:
                grown = -(-(num_tokens + step) // block_size) - -(-num_tokens // block_size)
                held += own_blocks + grown
        peak = max(peak, held)
    return peak


demands = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 12))


@given(demands=st.lists(demands, max_size=8), block_size=st.integers(1, 17))
def test_the_peak_is_that_of_a_simulation(demands: list[Demand], block_size: int) -> None:
    assert future_peak_blocks(demands, block_size) == stepped_peak(demands, block_size)


@pytest.mark.parametrize(
    ("remaining_steps", "num_tokens", "peak"),
    [
        (1, 16, 1),  # its last token is never computed
        (2, 16, 2),
        (17, 16, 2),
        (18, 16, 3),
        (16, 17, 2),
        (17, 17, 3),
    ],
)
def test_a_request_alone_needs_a_block_when_its_last_one_is_full(
    remaining_steps: int, num_tokens: int, peak: int
) -> None:
    held = -(-num_tokens // 16)

    assert future_peak_blocks([(remaining_steps, num_tokens, held)], 16) == peak


def test_who_ends_soon_makes_room_for_who_stays() -> None:
    long, short = (160, 16, 1), (16, 16, 1)

    assert future_peak_blocks([long], 16) == 11
    assert future_peak_blocks([long, short], 16) == 11, "the short one has ended by then"


def request_of(max_tokens: int, num_output: int = 0, *, ignore_eos: bool = False) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
    request = Request("a", [1], sampling, 0.0)
    request.token_ids += [2] * num_output
    return request


def test_a_fraction_of_what_is_left_is_expected() -> None:
    expected = ExpectedOutput(0.5, 0.1)

    assert expected.remaining_tokens(request_of(1000)) == 500
    assert expected.remaining_tokens(request_of(1000, 600)) == 200
    assert expected.remaining_tokens(request_of(1000, 990)) == 10
    assert expected.remaining_tokens(request_of(1000, 970)) == LOOKAHEAD_TOKENS
    assert expected.remaining_tokens(request_of(1000, 1000)) == 1


def test_who_ignores_the_end_of_sequence_is_expected_to_use_it_all() -> None:
    assert ExpectedOutput(0.5, 0.1).remaining_tokens(request_of(1000, ignore_eos=True)) == 1000


def test_the_fraction_decays_to_its_least_and_no_further() -> None:
    expected = ExpectedOutput()
    for _ in range(DECAY_STEPS // 2):
        expected.note_step()
    assert expected.fraction == pytest.approx((INITIAL_FRACTION + LEAST_FRACTION) / 2)

    for _ in range(DECAY_STEPS):
        expected.note_step()

    assert expected.fraction == LEAST_FRACTION


def test_a_preemption_raises_the_fraction_to_what_was_seen() -> None:
    expected = ExpectedOutput(0.5, 0.1)
    expected.fraction = 0.1

    expected.note_preemption([request_of(100, 40), request_of(300, 60)])

    assert expected.fraction == (40 + 60 + 2 * LOOKAHEAD_TOKENS) / 400


@pytest.mark.parametrize(("num_output", "fraction"), [(0, 0.5), (100, 1.0)])
def test_a_preemption_neither_lowers_the_fraction_nor_exceeds_1(
    num_output: int, fraction: float
) -> None:
    expected = ExpectedOutput(0.5, 0.1)

    expected.note_preemption([request_of(100, num_output)])

    assert expected.fraction == fraction
