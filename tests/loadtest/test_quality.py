"""The quality gate's figures, on logits small enough to check by hand."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log

import numpy as np
import pytest

from roost.bench import run_bench_quality
from roost_engine.batch import Chunk
from roost_loadtest.quality import compare, read_text, teacher_forced

TOKENS = [0, 1, 2, 0]
REFERENCE = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.2, 0.2, 0.6]], np.float32))


def test_equal_logits_lose_nothing_whatever_their_offset() -> None:
    quality = compare([REFERENCE], [REFERENCE + 3.0], TOKENS)

    assert (quality.positions, quality.top1, quality.clear_top1) == (3, 1.0, 1.0)
    assert quality.perplexity_ratio == pytest.approx(1.0, abs=1e-6)
    assert quality.mean_kl == pytest.approx(0.0, abs=1e-6)


def test_perplexity_is_of_the_tokens_that_follow() -> None:
    quality = compare([REFERENCE], [REFERENCE], TOKENS)

    # After 0 comes 1 (0.2), after 1 comes 2 (0.4), after 2 comes 0 (0.2).
    expected = exp(-(log(0.2) + log(0.4) + log(0.2)) / 3)
    assert quality.perplexity_reference == pytest.approx(expected, rel=1e-6)


def test_kl_is_from_the_reference_to_the_candidate() -> None:
    p, q = np.array([[0.9, 0.1]], np.float32), np.array([[0.5, 0.5]], np.float32)

    quality = compare([np.log(p)], [np.log(q)], [0, 1])

    expected = 0.9 * log(0.9 / 0.5) + 0.1 * log(0.1 / 0.5)
    assert quality.mean_kl == pytest.approx(expected, rel=1e-5)
    assert quality.max_kl == pytest.approx(expected, rel=1e-5)


def test_agreement_is_counted_apart_where_the_reference_is_sure() -> None:
    """The gap of row 1 is log(5/4): there, and only there, the candidate prefers another token."""
    candidate = REFERENCE.copy()
    candidate[1] = [0.0, 1.0, 1.1]

    quality = compare([REFERENCE], [candidate], TOKENS)

    assert quality.top1 == pytest.approx(2 / 3)
    assert (quality.clear_positions, quality.clear_top1) == (2, 1.0)


def test_the_steps_may_be_cut_anywhere() -> None:
    whole = compare([REFERENCE], [REFERENCE * 2], TOKENS)
    cut = compare(
        iter([REFERENCE[:1], REFERENCE[1:]]), iter([REFERENCE[:1] * 2, REFERENCE[1:] * 2]), TOKENS
    )

    assert whole == cut


class RecordingRunner:
    def __init__(self) -> None:
        self.steps: list[list[Chunk]] = []

    def forward(self, chunks: Sequence[Chunk]) -> np.ndarray:
        self.steps.append(list(chunks))
        return np.zeros((len(chunks), 3), np.float32)


def test_teacher_forcing_decodes_the_text_itself() -> None:
    runner = RecordingRunner()

    rows = [len(step) for step in teacher_forced(runner, [5, 6, 7, 8], block_size=2, rows=2)]

    chunks = [chunk for step in runner.steps for chunk in step]
    assert rows == [2, 1]  # nothing follows the last token
    assert [(chunk.token_ids, chunk.start) for chunk in chunks] == [([5], 0), ([6], 1), ([7], 2)]
    assert all(chunk.block_table == [0, 1] and chunk.wants_logits for chunk in chunks)


@pytest.mark.model
def test_the_text_is_long_enough_for_the_gate() -> None:
    from roost_engine.loader import load_model

    assert len(load_model("smollm2").tokenizer.encode(read_text())) > 1000


@pytest.mark.model
def test_float32_passes_the_strictest_gate(capsys: pytest.CaptureFixture[str]) -> None:
    """The native kernels in float32 beside torch's: the same tokens, the same perplexity."""
    assert judge("float32", min_top1=1.0, max_loss=1e-4)
    assert "top-1 agreement  1.0000" in capsys.readouterr().out


@pytest.mark.model
@pytest.mark.parametrize(("min_top1", "max_loss"), [(1.01, 1.0), (0.0, -1.0)])
def test_either_threshold_fails_a_format(min_top1: float, max_loss: float) -> None:
    assert not judge("stored", min_top1=min_top1, max_loss=max_loss)


def judge(weights: str, *, min_top1: float, max_loss: float) -> bool:
    return run_bench_quality(
        model="smollm2",
        formats=[weights],
        num_tokens=60,
        rows=32,
        threads=2,
        min_top1=min_top1,
        max_loss=max_loss,
    )
