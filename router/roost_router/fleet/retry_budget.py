"""The retries that a model's requests may cause, so that a failing fleet is not stormed. Pure.

    credit += RETRY_SHARE for every first attempt, forgotten over WINDOW_S
    credit += MIN_PER_S * seconds, up to MIN_PER_S * WINDOW_S

A retry takes 1. Retries that clients make by themselves count too (`x-stainless-retry-count` of
the OpenAI and Anthropic SDKs): they take 1, add nothing, and are never refused. So with every
replica failing, the replicas see at most 1.2 times the clients' first attempts, and 10 a second.

Source: Linkerd's retry budget (20 %, 10/s, 10 s).
"""

from __future__ import annotations

from math import exp
from typing import Final

RETRY_SHARE: Final = 0.2
MIN_PER_S: Final = 10.0
WINDOW_S: Final = 10.0
#: Deposits that come sooner after the last look at the clock count from then.
_STEP_S: Final = 0.01


class RetryBudget:
    """The retries that requests of one model may still cause."""

    def __init__(self) -> None:
        self._share = 0.0
        self._reserve = MIN_PER_S * WINDOW_S
        self._at: float | None = None

    def __repr__(self) -> str:
        return f"<RetryBudget {self._share:.1f} earned, {self._reserve:.1f} reserve>"

    def deposit(self, now: float) -> None:
        """A request came for the first time."""
        if self._at is None or now - self._at > _STEP_S:
            self._refresh(now)
        self._share += RETRY_SHARE

    def try_withdraw(self, now: float) -> bool:
        """Take one retry, if there is one."""
        self._refresh(now)
        if self._share + self._reserve < 1.0:
            return False
        self._take()
        return True

    def charge(self, now: float) -> None:
        """A client retries by itself: it takes what is left, at most 1."""
        self._refresh(now)
        self._take()

    def _take(self) -> None:
        from_share = min(1.0, self._share)
        self._share -= from_share
        self._reserve = max(0.0, self._reserve - (1.0 - from_share))

    def _refresh(self, now: float) -> None:
        if self._at is not None and now > self._at:
            passed = now - self._at
            self._share *= exp(-passed / WINDOW_S)
            self._reserve = min(MIN_PER_S * WINDOW_S, self._reserve + MIN_PER_S * passed)
        self._at = now if self._at is None else max(now, self._at)
