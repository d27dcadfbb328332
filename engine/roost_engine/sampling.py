"""Position-keyed sampling: the next token as a pure function of (logits, seed, position).

    token = argmax over allowed ids of  logits[id] / temperature + Gumbel(seed, position, id)

With independent standard Gumbel noise this draws exactly from softmax(logits / temperature)
(the Gumbel-max trick; Gumbel 1954, Maddison et al., "A* Sampling", 2014). The noise is not
taken from a stateful generator but computed from its coordinates:

    key    = mix(mix(seed) + position)
    bits   = mix(key + (id + 1) * 0x9E3779B97F4A7C15)          all modulo 2**64
    u      = (top 53 bits of `bits` + 1/2) / 2**53             in (0, 1)
    Gumbel = -log(-log(u))

`mix` is the finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014; constants of Stafford's variant 13, as in Vigna's public domain
splitmix64.c), so `bits` is output number `id` of a splitmix64 generator started at `key`.

Invariant: nothing else enters. Batch-mates, chunking, preemption, cache hits, speculation and
the choice of replica cannot change a token, as long as they do not change the logits; a stream
can be continued elsewhere from its tokens and its seed.

`temperature` 0 is argmax. Ties, here and at the edge of top-k and top-p, go to the lower id.
min-p, top-k and top-p are applied in this order, after the temperature. Computed in float64 on the
CPU: 0.5 ms a row for 49k tokens, of which the noise is 0.3; logits without structure, whose
nucleus is most of the vocabulary, cost 8 ms for the sort.

Rows are plain or edited. An edited row is first changed by rules of its request (penalties, bias,
grammar: logits.py), in a copy; from there on it is a row like any other.

A row without a finite maximum (NaN anywhere, +inf, or nothing but -inf) is the sign of a model
or a cache gone wrong: it gives no token, and says so, instead of an arbitrary one.

Not here: choosing seeds (the server draws one where the client gave none), rules (logits.py).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from roost_engine.request import SamplingParams

    Floats = npt.NDArray[np.float64]
    Ids = npt.NDArray[np.int64]
    Row = npt.NDArray[np.float32]
    RowEdit = Callable[[Row], None]
    #: Draws a token for each row that is final: `sample_plain`, or its native twin.
    Draw = Callable[
        [npt.NDArray[np.float32], Sequence[SamplingParams], Sequence[int]], list[int | None]
    ]

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def sample_plain(
    rows: npt.NDArray[np.float32], params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int | None]:
    """`sample` of rows that are final. (rows, vocab)."""
    return [
        sample_row(row, row_params, position) if np.isfinite(row.max()) else None
        for row, row_params, position in zip(rows, params, positions, strict=True)
    ]


def sample(
    logits: npt.ArrayLike,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    edits: Sequence[RowEdit | None] | None = None,
    draw: Draw = sample_plain,
) -> list[int | None]:
    """One token for each row, None for a row whose largest logit is not finite.

    logits: (rows, vocab) float32, an array or whatever numpy can view as one; not changed.
    `positions[row]` is the index in its sequence of the token to be drawn, that is the number of
    tokens before it. `edits[row]` changes a copy of the row before anything else, if there is one.
    `draw` draws from final rows.
    """
    rows = np.asarray(logits)
    edited = [row for row, edit in enumerate(edits or ()) if edit is not None]
    if not edits or not edited:
        return draw(rows, params, positions)
    copies = rows[edited]
    for copy, row in zip(copies, edited, strict=True):
        edit = edits[row]
        if edit is not None and np.isfinite(copy.max()):
            edit(copy)
    tokens = _sample_some(draw, copies, edited, params, positions)
    plain = [row for row, edit in enumerate(edits) if edit is None]
    if plain:
        tokens += _sample_some(draw, rows[plain], plain, params, positions)
    order = edited + plain
    return [token for _, token in sorted(zip(order, tokens, strict=True), key=lambda pair: pair[0])]


def _sample_some(
    draw: Draw,
    rows: npt.NDArray[np.float32],
    indices: Sequence[int],
    params: Sequence[SamplingParams],
    positions: Sequence[int],
) -> list[int | None]:
    """Draw for some rows of a batch; the lists are those of all."""
    chosen = [params[index] for index in indices]
    return draw(rows, chosen, [positions[index] for index in indices])


def sample_row(logits: npt.NDArray[np.float32], params: SamplingParams, position: int) -> int:
    """The token that follows; logits: (vocab,) with a finite maximum. Depends on nothing else."""
    if params.temperature == 0.0:
        return int(np.argmax(logits))
    scaled = _scale(logits, params.temperature)
    ids = allowed_ids(scaled, params.top_k, params.top_p, params.min_p)
    noise = gumbel(params.seed, position, ids)
    return int(ids[np.argmax(scaled[ids] + noise)])


def allowed_ids(scaled: Floats, top_k: int, top_p: float, min_p: float = 0.0) -> Ids:
    """Ids in ascending order that min-p, then top-k, then top-p leave; at least one.

    min-p keeps tokens with at least `min_p` times the probability of the most likely one. top-p
    keeps the smallest set of most likely tokens whose probability, among what is left, reaches
    `top_p`. `top_k` 0, `top_p` 1 and `min_p` 0 do not restrict.
    """
    ids: Ids
    if min_p > 0.0:
        ids = np.flatnonzero(scaled >= scaled.max() + math.log(min_p))
    else:
        ids = np.arange(scaled.size, dtype=np.int64)
    if 0 < top_k < ids.size:
        ids = ids[_largest(scaled[ids], top_k)]
    if top_p < 1.0:
        ids = np.sort(_nucleus(scaled, ids, top_p))
    return ids


def gumbel(seed: int, position: int, ids: Ids) -> Floats:
    """Standard Gumbel noise of token `ids` at `position`, as in the module's formula."""
    key = _mix_int(_mix_int(seed & _MASK) + position & _MASK)
    counters = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    bits = _mix(counters + np.uint64(key))
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    noise: Floats = -np.log(-np.log(uniform))
    return noise


def _scale(logits: npt.NDArray[np.float32], temperature: float) -> Floats:
    """Logits / temperature with maximum 0, so that a tiny temperature cannot overflow to NaN."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    with np.errstate(over="ignore"):
        scaled: Floats = shifted / temperature
    return scaled


def _nucleus(scaled: Floats, ids: Ids, top_p: float) -> Ids:
    """Smallest set of most likely `ids` with probability `top_p`, most likely first.

    Only tokens above (1 - top_p) / n are sorted: all others together weigh at most 1 - top_p,
    so the set never needs them. That is a few hundred of 49k for real logits.
    """
    weights = np.exp(scaled[ids] - scaled[ids].max())
    probabilities = weights / weights.sum()
    candidates = probabilities > (1.0 - top_p) / ids.size
    if not candidates.any():  # uniform up to rounding, with top_p tiny
        candidates = probabilities == probabilities.max()
    order = np.argsort(-probabilities[candidates], kind="stable")
    reached = np.cumsum(probabilities[candidates][order])
    count = int(np.searchsorted(reached, top_p, side="left")) + 1
    kept: Ids = ids[candidates][order][:count]
    return kept


def _largest(scaled: Floats, count: int) -> Ids:
    """Indices of the `count` largest values, ascending, without sorting them all."""
    edge = np.partition(scaled, -count)[-count]
    above = np.flatnonzero(scaled > edge)
    at_edge = np.flatnonzero(scaled == edge)[: count - above.size]
    ids: Ids = np.sort(np.concatenate([above, at_edge]))
    return ids


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finaliser of splitmix64, elementwise; numpy's unsigned arrays wrap silently."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _mix_int(state: int) -> int:
    """`_mix` of one number, which is also its slow twin."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
    return state ^ (state >> 31)
