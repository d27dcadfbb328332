"""Why a call of the store has no result. Pure."""

from __future__ import annotations

from enum import Enum


class StoreFault(Enum):
    """What is wrong. Whoever calls does without the store, whichever it is."""

    DOWN = "down"  # nobody is reached; tried again in the background
    LATE = "late"  # no reply within the call's budget; whether it was done is not known
    REFUSED = "refused"  # the server's answer is an error: rights, memory, type, not the primary
    NONSENSE = "nonsense"  # the reply is not what this command's is


class StoreError(Exception):
    """A call of the store failed. The message names the cause, never a value or a password."""

    def __init__(self, fault: StoreFault, message: str) -> None:
        super().__init__(message)
        self.fault = fault
