"""What observers are told of a finished request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from roost_router.answer.phases import Answer
    from roost_router.placement import Placement

#: How a request ended; a metric label, and no Enum: the value of one costs a call.
#: Errors are ours or the replica's; "cut": lost after the first byte, and not to be continued.
Outcome = Literal["ok", "client_error", "server_error", "client_gone", "cut"]


class LostLeg:
    """A leg that was not enough."""

    def __init__(self, placement: Placement, lost: str, then: str) -> None:
        self.placement: Final = placement
        self.lost: Final = lost  # why, as the metrics call it
        self.then: Final = then  # what the router did: retried, resumed, failed, cut, not sent


class RequestRecord:
    """One request, over all its legs."""

    def __init__(
        self,
        request_id: bytes,
        model: str,
        answer: Answer,
        *,
        placement: Placement | None,
        first: Placement | None,
        lost_legs: tuple[LostLeg, ...],
        outcome: Outcome,
        status: int,
        error_code: str | None,
        started_at: float,
        duration_s: float,
        ttft_s: float | None,
    ) -> None:
        """`placement`: the last; `first`: the one that the client was told of."""
        self.request_id: Final = request_id
        self.model: Final = model
        self.placement: Final = placement
        self.lost_legs: Final = lost_legs  # in order; the last placement may be among them
        self.replica: Final = placement.replica.name if placement is not None else None
        self.outcome: Final = outcome
        self.status: Final = status
        self.error_code: Final = error_code  # of the router's own error
        self.attempts: Final = answer.num_attempts
        self.resumes: Final = answer.num_resumes
        self.started_at: Final = started_at  # seconds, monotonic
        self.duration_s: Final = duration_s
        self.ttft_s: Final = ttft_s
        #: Predicted; then what the replica reported.
        self.matched_tokens: Final = first.matched_tokens if first is not None else None
        self.cached_tokens: Final = answer.cached_tokens
        self.prompt_tokens: Final = answer.prompt_tokens
