"""Native sampling against its twin in the engine: the same token from the same numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from native import needs_native

from roost_engine.request import SamplingParams
from roost_engine.sampling import sample_plain
from roost_kernels.cpu_sampling import sample_rows

pytestmark = needs_native

SIZES = (1, 5, 16, 17, 1000, 49152)


def params(**options: float) -> SamplingParams:
    return SamplingParams(max_tokens=1, **options)  # type: ignore[arg-type]


def rows(size: int, count: int = 12) -> np.ndarray:
    """Logits as models have them: most far below a few."""
    numbers = np.random.default_rng(size).normal(-6, 3, (count, size)).astype(np.float32)
    numbers[:, : min(size, 20)] += 8
    return numbers


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [0.0, 1e-6, 0.3, 0.8, 1.0, 5.0])
def test_unrestricted_tokens_are_the_twins(size: int, temperature: float) -> None:
    logits = rows(size)
    requests = [params(temperature=temperature, seed=seed) for seed in range(12)]

    assert sample_rows(logits, requests, range(12)) == sample_plain(logits, requests, range(12))


@pytest.mark.parametrize("size", SIZES)
def test_restricted_tokens_are_the_twins(size: int) -> None:
    logits = rows(size)
    options = itertools.product((0, 1, 3, 40, 60000), (0.05, 0.5, 0.95, 1.0), (0.0, 0.02, 1.0))
    for number, (top_k, top_p, min_p) in enumerate(options):
        requests = [
            params(
                temperature=0.5 + seed / 6, top_k=top_k, top_p=top_p, min_p=min_p, seed=99 * seed
            )
            for seed in range(12)
        ]
        positions = range(number, number + 12)

        assert sample_rows(logits, requests, positions) == sample_plain(
            logits, requests, positions
        ), (top_k, top_p, min_p)


@pytest.mark.parametrize(
    "bad", [[0.0, np.nan, 1.0], [np.inf, 0.0, 0.0], [-np.inf] * 3, [np.nan] * 40]
)
def test_a_row_that_is_no_numbers_gives_no_token(bad: list[float]) -> None:
    logits = np.array([bad], np.float32)

    for temperature in (0.0, 1.0):
        assert sample_rows(logits, [params(temperature=temperature)], [0]) == [None]


def test_forbidden_tokens_are_never_drawn_and_ties_go_to_the_lower_id() -> None:
    logits = np.full((1, 40), -np.inf, np.float32)
    logits[0, [7, 31]] = 2.0

    assert sample_rows(logits, [params(temperature=0.0)], [0]) == [7]
    drawn = {sample_rows(logits, [params(temperature=1.0, seed=s)], [0])[0] for s in range(64)}
    assert drawn == {7, 31}


@pytest.mark.parametrize("allowed", [1, 2, 9])
@pytest.mark.parametrize(("top_k", "top_p"), [(40, 1.0), (40, 0.9), (0, 0.999999999), (3, 0.5)])
def test_more_may_be_asked_for_than_is_allowed(allowed: int, top_k: int, top_p: float) -> None:
    logits = np.full((12, 1000), -np.inf, np.float32)
    logits[:, 100 : 100 + allowed] = 1e4 * rows(allowed)
    logits[::2] /= 1e4
    requests = [params(top_k=top_k, top_p=top_p, seed=seed) for seed in range(12)]

    assert sample_rows(logits, requests, range(12)) == sample_plain(logits, requests, range(12))


def test_rows_may_be_apart_and_seeds_negative() -> None:
    padded = np.random.default_rng(0).normal(size=(6, 80)).astype(np.float32)
    requests = [params(temperature=1.0, seed=-seed) for seed in range(6)]

    apart = sample_rows(padded[:, :70], requests, range(6))

    assert apart == sample_plain(padded[:, :70], requests, range(6))


def test_logits_that_are_not_float32_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        sample_rows(np.zeros((1, 4)), [params()], [0])  # type: ignore[arg-type]
