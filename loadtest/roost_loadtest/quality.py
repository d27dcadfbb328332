"""The quality gate: how far a way of computing is from the float32 reference.

Both compute the same fixed text (quality.txt, prose and code), teacher-forced: the logits at each
position are those after the text's own tokens, never after generated ones, so one wrong token
does not spoil what follows. Compared at every position:

    top-1         share of positions where both find the same token most likely
    clear top-1   the same where the reference is sure: its two best logits differ by more than 0.5
    perplexity    exp(mean(-log p(next token of the text))), and candidate's / reference's
    KL            mean and largest sum(p log(p / q)), p of the reference, q of the candidate; nats

Every position is a chunk of one token, a decode, since that is what serving does most; `rows` of
them are one step. They share a block table: a runner lets a chunk read what another chunk of
its step writes. Kernels whose rows do not depend on each other give the same for any `rows`.

Not here: which runners there are (roost.bench), thresholds (the command's options).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from roost_engine.batch import Chunk

if TYPE_CHECKING:
    from roost_engine.core import Runner

    Logits = npt.NDArray[np.float32]

_CLEAR_GAP = 0.5


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate beside the reference."""

    positions: int
    top1: float
    clear_positions: int
    clear_top1: float
    perplexity_reference: float
    perplexity_candidate: float
    mean_kl: float
    max_kl: float

    @property
    def perplexity_ratio(self) -> float:
        """Candidate's to reference's; 1.0 is no loss."""
        return self.perplexity_candidate / self.perplexity_reference


def read_text() -> str:
    """The fixed text, some 3,500 tokens of a 49k vocabulary."""
    return Path(__file__).with_name("quality.txt").read_text(encoding="utf-8")


def teacher_forced(
    runner: Runner, token_ids: Sequence[int], *, block_size: int, rows: int
) -> Iterator[Logits]:
    """Logits after each token but the last, as arrays (at most `rows`, vocab) in order.

    Uses the runner's first blocks. An array is valid until the next one is asked for.
    """
    table = list(range(-(-len(token_ids) // block_size)))
    for begin in range(0, len(token_ids) - 1, rows):
        end = min(begin + rows, len(token_ids) - 1)
        chunks = [
            Chunk(token_ids=[token_ids[i]], start=i, block_table=table, wants_logits=True)
            for i in range(begin, end)
        ]
        yield np.asarray(runner.forward(chunks), dtype=np.float32)


def compare(
    reference: Iterable[Logits], candidate: Iterable[Logits], token_ids: Sequence[int]
) -> Quality:
    """Compare logits position by position; both give arrays of the same lengths."""
    position = 0
    columns: list[npt.NDArray[np.float64]] = []
    for expected, actual in zip(reference, candidate, strict=True):
        following = np.asarray(token_ids[position + 1 : position + 1 + len(expected)])
        position += len(expected)
        columns.append(_compare_rows(expected, actual, following))
    agree, gap, loss_reference, loss_candidate, kl = np.concatenate(columns, axis=1)
    clear = gap > _CLEAR_GAP
    return Quality(
        positions=position,
        top1=float(agree.mean()),
        clear_positions=int(clear.sum()),
        clear_top1=float(agree[clear].mean()) if clear.any() else 1.0,
        perplexity_reference=float(np.exp(loss_reference.mean())),
        perplexity_candidate=float(np.exp(loss_candidate.mean())),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
    )


def print_quality(name: str, quality: Quality) -> None:
    """What the command says about one format."""
    reference, candidate = quality.perplexity_reference, quality.perplexity_candidate
    ratio = quality.perplexity_ratio
    print(f"{name}: {quality.positions} positions")
    print(f"  top-1 agreement  {quality.top1:.4f}")
    print(f"  clear top-1      {quality.clear_top1:.4f} of {quality.clear_positions}")
    print(f"  perplexity       {candidate:.4f}, float32 {reference:.4f}, ratio {ratio:.4f}")
    print(
        f"  KL in nats       mean {quality.mean_kl:.2e}, largest {quality.max_kl:.2e}", flush=True
    )


def _compare_rows(
    reference: Logits, candidate: Logits, following: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """(5, rows): agreement, gap, loss of the reference, loss of the candidate, KL."""
    best_two = np.partition(reference, -2, axis=1)[:, -2:].astype(np.float64)
    log_p, log_q = _log_softmax(reference), _log_softmax(candidate)
    rows = np.arange(len(reference))
    return np.stack(
        [
            reference.argmax(axis=1) == candidate.argmax(axis=1),
            best_two[:, 1] - best_two[:, 0],
            -log_p[rows, following],
            -log_q[rows, following],
            (np.exp(log_p) * (log_p - log_q)).sum(axis=1),
        ]
    )


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    normalised: npt.NDArray[np.float64] = shifted - np.log(
        np.exp(shifted).sum(axis=1, keepdims=True)
    )
    return normalised
