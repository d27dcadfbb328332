"""What observers are told of a finished request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from roost_router.answer.phases import Answer
    from roost_router.placement import Placement

#: How a request ended; a metric label, and no Enum: the value of one costs a call.
#: Errors are ours or the replica's; "cut": lost after the first byte, and not to be continued.
Outcome = Literal["ok", "client_error", "server_error", "client_gone", "cut"]


class RequestRecord:
    """One request, over all its legs."""

    def __init__(
        self,
        model: str,
        answer: Answer,
        *,
        placement: Placement | None,
        first: Placement | None,
        outcome: Outcome,
        status: int,
        duration_s: float,
        ttft_s: float | None,
    ) -> None:
        """`placement`: the last; `first`: the one that the client was told of."""
        self.model: Final = model
        self.replica: Final = placement.replica.name if placement is not None else None
        self.outcome: Final = outcome
        self.status: Final = status
        self.attempts: Final = answer.num_attempts
        self.resumes: Final = answer.num_resumes
        self.duration_s: Final = duration_s
        self.ttft_s: Final = ttft_s
        #: Predicted; then what the replica reported.
        self.matched_tokens: Final = first.matched_tokens if first is not None else None
        self.cached_tokens: Final = answer.cached_tokens
        self.prompt_tokens: Final = answer.prompt_tokens
