"""Why the engine gives no answer: errors that are ours, not the client's (api_errors.py).

    EngineError                   status   another try may help
    ├── EngineDeadError           503      yes, elsewhere
    ├── EngineStoppingError       503      yes, elsewhere
    ├── EngineBusyError           429      yes, after `retry_after_s`
    │   └── DeadlineError         429      yes, after `retry_after_s`
    └── LogitsError               500      no

Not here: words and headers of responses (server.py).
"""

from __future__ import annotations


class EngineError(Exception):
    """A request cannot be served for a reason that is ours."""


class EngineDeadError(EngineError):
    """A step raised; this process computes nothing any more."""


class EngineStoppingError(EngineError):
    """The process is shutting down."""


class EngineBusyError(EngineError):
    """As many requests as may run and wait are here already; to be tried again later."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(EngineBusyError):
    """The request was still waiting when its deadline passed."""


class LogitsError(EngineError):
    """There is no next token for this request, and none for it alone; the engine lives on.

    The model computed NaN or infinity, or the grammar cannot follow.
    """
