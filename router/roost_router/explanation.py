"""Why a request went, or would go, where: the JSON of GET /explain/{id} and POST /explain. Pure.

The other half of receipts.py, and apart from it because what is compiled decodes nothing
(docs/decisions/0016). `roost explain` reads the same structs again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from roost_router.receipts import seen

if TYPE_CHECKING:
    from roost_router.placement import Options
    from roost_router.policy.interface import Decision


class CandidateRow(msgspec.Struct):
    """One replica that could have taken the request, as the policy saw it."""

    replica: str
    matched_tokens: int  # of the prompt, believed in its KV cache
    uncached_tokens: int  # of the prompt, to be computed there
    queued_tokens: int  # placed there before, not yet computed
    num_decoding: int  # streams running
    is_told: bool  # most of what is matched: by its KV events, not by what was placed there
    cost_s: float | None  # what the policy predicted and compared; None: not finite


class RunnerUp(msgspec.Struct):
    """The best of those not chosen."""

    replica: str
    behind_s: float | None  # its cost less the chosen one's; below 0, a tie or a guard decided


class DryRun(msgspec.Struct):
    """Where a request would go now."""

    model: str
    prompt_bytes: int
    prompt_tokens: int  # estimated
    replica: str
    runner_up: RunnerUp | None
    candidates: list[CandidateRow]


class Attempt(msgspec.Struct):
    """One placement of a request."""

    replica: str  # chosen
    at_s: float  # after the request came
    #: Of the queue and this prompt, before its first token.
    predicted_prefill_s: float | None
    lost: str | None  # why it was not enough: a loss, as the metrics call it; None: it was
    then: str | None  # what the router did: retried, resumed, failed, cut, not sent
    runner_up: RunnerUp | None
    candidates: list[CandidateRow]


class Explanation(msgspec.Struct):
    """One request: where it went and why, and what came of it."""

    id: str
    at: str  # when it came, ISO 8601, UTC
    model: str
    outcome: str
    status: int  # of the answer; 499: the client left before
    error: str | None  # code of the router's own error
    ttft_s: float | None  # after the request came; streams only
    duration_s: float
    prompt_tokens: int | None  # as the replica counted, as the next
    cached_tokens: int | None
    attempts: list[Attempt]


class _PackedAttempt(msgspec.Struct, array_like=True):
    chosen: int
    at_s: float
    predicted_prefill_s: float
    lost: str | None
    then: str | None
    costs_s: list[float]
    candidates: list[tuple[str, int, int, int, int, bool]]


class _Packed(msgspec.Struct, array_like=True):
    started_at: float  # seconds, monotonic
    model: str
    outcome: str
    status: int
    error: str | None
    ttft_s: float | None
    duration_s: float
    prompt_tokens: int | None
    cached_tokens: int | None
    attempts: list[_PackedAttempt]


_unpack = msgspec.msgpack.Decoder(_Packed)


def explain(request_id: bytes, packed: bytes, at: Callable[[float], str]) -> Explanation:
    """What a receipt of receipts.py says. `at`: the date of a moment in seconds, monotonic.

    O(candidates of all attempts).
    """
    receipt = _unpack.decode(packed)
    return Explanation(
        request_id.decode("ascii"),
        at(receipt.started_at),
        receipt.model,
        receipt.outcome,
        receipt.status,
        receipt.error,
        receipt.ttft_s,
        receipt.duration_s,
        receipt.prompt_tokens,
        receipt.cached_tokens,
        [_attempt(attempt) for attempt in receipt.attempts],
    )


def dry_run(options: Options, decision: Decision) -> DryRun:
    """What `decision` on `options` says. O(candidates)."""
    rows = [
        CandidateRow(*seen(candidate), cost)
        for candidate, cost in zip(options.candidates, decision.costs_s, strict=True)
    ]
    chosen = decision.chosen
    return DryRun(
        options.fields.model,
        len(options.fields.prompt),
        options.candidates[chosen].prompt_tokens,
        rows[chosen].replica,
        _runner_up(rows, decision.costs_s, chosen),
        rows,
    )


def _attempt(attempt: _PackedAttempt) -> Attempt:
    costs = attempt.costs_s
    candidates = [
        CandidateRow(*told, cost) for told, cost in zip(attempt.candidates, costs, strict=True)
    ]
    return Attempt(
        candidates[attempt.chosen].replica,
        attempt.at_s,
        attempt.predicted_prefill_s,
        attempt.lost,
        attempt.then,
        _runner_up(candidates, costs, attempt.chosen),
        candidates,
    )


def _runner_up(rows: list[CandidateRow], costs_s: list[float], chosen: int) -> RunnerUp | None:
    others = [number for number in range(len(costs_s)) if number != chosen]
    if not others:
        return None
    second = min(others, key=costs_s.__getitem__)
    return RunnerUp(rows[second].replica, costs_s[second] - costs_s[chosen])
