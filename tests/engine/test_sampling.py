"""Position-keyed sampling: the right distribution, and nothing but (logits, seed, position)."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from roost_engine.logits import RowRules
from roost_engine.request import SamplingParams
from roost_engine.sampling import _mix, _mix_int, allowed_ids, gumbel, sample, sample_row

if TYPE_CHECKING:
    from roost_engine.sampling import Row, RowEdit

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], dtype=np.float32))


def params(**options: float) -> SamplingParams:
    return SamplingParams(max_tokens=1, **options)  # type: ignore[arg-type]


def draw(count: int, logits: np.ndarray = LOGITS, **options: float) -> np.ndarray:
    """How often each token is drawn over `count` pairs of seed and position."""
    counts = np.zeros(logits.size)
    for index in range(count):
        chosen = params(**options, seed=index // 16)
        counts[sample_row(logits, chosen, position=index % 16)] += 1
    return counts


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    return float((((counts - expected) ** 2) / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_softmax(temperature: float) -> None:
    weights = np.exp(LOGITS.astype(np.float64) / temperature)

    counts = draw(8000, temperature=temperature)

    # 4 degrees of freedom: 18.5 is exceeded once in 1,000; the seeds are fixed.
    assert chi_square(counts, weights / weights.sum()) < 18.5


def test_tokens_of_a_nucleus_follow_its_renormalised_probabilities() -> None:
    counts = draw(6000, temperature=1.0, top_p=0.8)

    assert counts[3:].sum() == 0
    # 2 degrees of freedom
    assert chi_square(counts[:3], np.array([0.4, 0.3, 0.15]) / 0.85) < 13.8


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 3}, 3),
        ({"min_p": 0.3}, 3),  # 0.3 x 0.4 = 0.12
        ({"min_p": 0.24}, 4),
        ({"min_p": 0.26}, 3),
        ({"min_p": 1.0}, 1),
        ({"top_k": 4, "min_p": 0.3}, 3),
        ({"top_k": 4, "top_p": 0.8, "min_p": 0.24}, 3),
    ],
    ids=str,
)
def test_tokens_that_are_left_follow_their_renormalised_probabilities(
    options: dict[str, float], kept: int
) -> None:
    counts = draw(6000, temperature=1.0, **options)

    assert counts[kept:].sum() == 0
    probabilities = np.array([0.4, 0.3, 0.15, 0.1][:kept])
    # 3 degrees of freedom at most: 16.3 is exceeded once in 1,000; the seeds are fixed.
    assert chi_square(counts[:kept], probabilities / probabilities.sum()) < 16.3


def test_biased_logits_follow_their_own_softmax() -> None:
    """Rules and draw together: a bias of ln 3 makes a token three times as likely."""
    rules = RowRules(params(logit_bias={4: float(np.log(3))}), [], None)
    edit = partial(rules.apply, token_ids=[1], num_prompt_tokens=1)
    counts = np.zeros(5)
    for index in range(6000):
        [token] = sample(LOGITS[None], [params(seed=index)], [1], [edit])
        assert token is not None
        counts[token] += 1

    weights = np.array([0.4, 0.3, 0.15, 0.1, 0.15])
    assert chi_square(counts, weights / weights.sum()) < 18.5


def test_edited_and_plain_rows_keep_their_places() -> None:
    """Each row gives what it gives alone; the logits themselves are not changed."""
    logits = np.random.default_rng(0).normal(size=(5, 50)).astype(np.float32)
    before = logits.copy()
    chosen = [params(seed=row, temperature=row % 2) for row in range(5)]

    def only(token: int) -> RowEdit:
        def edit(row: Row) -> None:
            row[np.arange(row.size) != token] = -np.inf

        return edit

    edits: list[RowEdit | None] = [None, only(7), None, only(9), None]
    tokens = sample(logits, chosen, range(5), edits)

    assert tokens == [
        sample_row(logits[row], chosen[row], row) if edits[row] is None else {1: 7, 3: 9}[row]
        for row in range(5)
    ]
    assert np.array_equal(logits, before)
    assert sample(logits, chosen, range(5), [None] * 5) == sample(logits, chosen, range(5))


def test_a_spoilt_row_is_not_edited_into_a_token() -> None:
    def edit(row: Row) -> None:
        row[:] = 1.0

    spoilt = np.array([[np.nan, 1.0]], dtype=np.float32)

    assert sample(spoilt, [params()], [0], [edit]) == [None]


def test_an_array_and_a_tensor_are_one() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    chosen = [params(seed=row) for row in range(3)]

    assert sample(logits.numpy(), chosen, range(3)) == sample(logits, chosen, range(3))


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    uniform = np.zeros(4, dtype=np.float32)
    pairs = np.zeros((2, 16))
    for index in range(4000):
        here = sample_row(uniform, params(seed=index), position=5)
        pairs[0, 4 * here + sample_row(uniform, params(seed=index), position=6)] += 1
        pairs[1, 4 * here + sample_row(uniform, params(seed=index + 1), position=5)] += 1

    # 15 degrees of freedom
    assert chi_square(pairs[0], np.full(16, 1 / 16)) < 37.7
    assert chi_square(pairs[1], np.full(16, 1 / 16)) < 37.7


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 1000, generator=generator)
    chosen = [
        params(temperature=[0.0, 0.7, 1.3][row % 3], top_p=[1.0, 0.9][row % 2], seed=row)
        for row in range(9)
    ]
    positions = [row * 7 for row in range(9)]
    together = sample(logits, chosen, positions)

    alone = [sample(logits[row : row + 1], [chosen[row]], [positions[row]])[0] for row in range(9)]
    order = [4, 0, 8, 2, 1, 3, 7, 6, 5]
    shuffled = sample(
        logits[order], [chosen[row] for row in order], [positions[row] for row in order]
    )

    assert together == alone
    assert [together[row] for row in order] == shuffled


def test_temperature_zero_is_the_most_likely_token_and_ties_go_to_the_lower_id() -> None:
    assert sample_row(np.array([1, 5, 5, 2], dtype=np.float32), params(temperature=0), 3) == 1


@pytest.mark.parametrize("temperature", [1e-300, 1e-6])
def test_a_tiny_temperature_is_nearly_greedy_and_never_nan(temperature: float) -> None:
    logits = np.array([-1000.0, 3.0, 1000.0, 2.0], dtype=np.float32)

    assert sample_row(logits, params(temperature=temperature), 0) == 2


@pytest.mark.parametrize("spoilt", [[np.nan, 1, 2], [0, np.inf, 0], [-np.inf] * 3])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_p": 0.5}, {"top_k": 2}, {}], ids=str)
def test_a_row_that_is_no_numbers_gives_no_token_and_spoils_no_other(
    spoilt: list[float], options: dict[str, float]
) -> None:
    good = [0.0, -np.inf, 9.0]
    logits = torch.tensor([good, spoilt, good], dtype=torch.float32)

    first, none, last = sample(logits, [params(**options)] * 3, [4, 4, 4])

    assert none is None
    assert (
        first == last == sample_row(np.array(good, dtype=np.float32), params(**options), position=4)
    )


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    logits = np.array([0.0, -np.inf, 0.0, -np.inf], dtype=np.float32)

    assert draw(200, logits)[[1, 3]].sum() == 0


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [0, 1, 2, 3, 4]),
        (1, 1.0, [0]),
        (3, 1.0, [0, 1, 2]),
        (99, 1.0, [0, 1, 2, 3, 4]),
        (0, 1e-9, [0]),
        (0, 0.39, [0]),
        (0, 0.41, [0, 1]),
        (0, 0.69, [0, 1]),
        (0, 0.71, [0, 1, 2]),
        (0, 0.999999, [0, 1, 2, 3, 4]),
        (2, 0.5, [0]),  # of 0.4 and 0.3 the first is 57 %
        (2, 0.6, [0, 1]),
    ],
)
def test_what_top_k_and_top_p_keep(top_k: int, top_p: float, kept: list[int]) -> None:
    assert allowed_ids(LOGITS.astype(np.float64), top_k, top_p).tolist() == kept


def test_the_edge_of_min_p_is_kept() -> None:
    assert allowed_ids(np.log([1.0, 0.5, 0.25]), 0, 1.0, min_p=0.5).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(2, 1.0, [0, 1]), (0, 0.5, [0, 1]), (0, 0.51, [0, 1, 2]), (0, 1e-12, [0])],
)
def test_ties_at_the_edge_go_to_the_lower_ids(top_k: int, top_p: float, kept: list[int]) -> None:
    assert allowed_ids(np.zeros(4), top_k, top_p).tolist() == kept


def test_the_nucleus_equals_a_full_sort() -> None:
    """The slow twin sorts everything; ours sorts only what can be in the set."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        scaled = rng.normal(size=300) * rng.choice([0.01, 1.0, 8.0])
        top_p = float(rng.uniform(0.01, 0.999))
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        count = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1

        assert allowed_ids(scaled, 0, top_p).tolist() == sorted(order[:count].tolist())


def test_top_k_equals_a_full_sort() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        scaled = rng.integers(0, 20, size=60).astype(np.float64)  # many ties
        top_k = int(rng.integers(1, 60))
        order = np.argsort(-scaled, kind="stable")

        assert allowed_ids(scaled, top_k, 1.0).tolist() == sorted(order[:top_k].tolist())


def test_the_vector_hash_equals_its_slow_twin_and_splitmix64() -> None:
    states = [0, 1, 2**63, 2**64 - 1, 123456789]

    assert _mix(np.array(states, dtype=np.uint64)).tolist() == [_mix_int(s) for s in states]
    # First output of splitmix64 seeded with 0, from Vigna's splitmix64.c.
    assert _mix_int(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_golden_noise() -> None:
    """Replicas of different versions continue each other's streams: this must never change."""
    noise = gumbel(42, 7, np.arange(3, dtype=np.int64))

    assert noise.tolist() == pytest.approx(GOLDEN, rel=1e-12)
    assert gumbel(-1, 0, np.array([5])).tolist() == gumbel(2**64 - 1, 0, np.array([5])).tolist()


def test_a_replica_can_start_without_torch() -> None:
    modules = "core, frontend, grammar, logits, sampling, server"
    check = f"import sys; from roost_engine import {modules}; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


GOLDEN = [2.189628153634604, 0.4635744492184339, 1.254316590881168]
