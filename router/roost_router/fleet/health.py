"""Outlier ejection of one replica: out after failures, back through one probing request. Pure.

    CLOSED --MAX_FAILURES in a row, or one stall--> EJECTED --time is up--> PROBING
      ▲                                               ▲                       │
      └──────────────── its request succeeds ─────────┼── its request fails ──┘

CLOSED takes requests, EJECTED takes none, PROBING takes one at a time. An ejection lasts
BASE_S * 2^n, at most MAX_S, n being how many followed each other without a success.

A failure is a lost connection, a 500, 502 or 504, an error event. A stall (connection alive, no
progress, see watch.py) ejects at once: every request placed there would wait as long. 429 and
503 are no failures: such a replica works, and says so.

Silence is told from a stall by prediction, and predictions may be wrong, above all where a replica
is asked for too much. `slack` is how many times as long as predicted its prefill may take: after
each stall twice as long, up to MAX_SLACK, and with each success a little less.

Source: Envoy's outlier detection and circuit breakers, with shorter times: a replica that is
back serves a warm cache. How many may be out at once is the fleet's to say (fleet.py).
"""

from __future__ import annotations

from enum import Enum
from typing import Final

MAX_FAILURES: Final = 3
BASE_S: Final = 1.0
MAX_S: Final = 60.0
MAX_SLACK: Final = 8.0
SLACK_KEPT: Final = 0.98  # by a success: 35 of them take a doubling back


class Circuit(Enum):
    """Whether a replica takes requests."""

    CLOSED = "closed"
    EJECTED = "ejected"
    PROBING = "probing"


class Health:
    """What requests have shown of one replica."""

    def __init__(self) -> None:
        self.num_ejections = 0  # in a row
        self._num_failures = 0  # in a row
        self.ejected_until: float | None = None  # closed if None
        self.ejection_reason = ""  # of the last ejection, for people
        self.slack = 1.0
        self._probing_since: float | None = None

    def circuit(self, now: float) -> Circuit:
        """The state at `now`."""
        if self.ejected_until is None:
            return Circuit.CLOSED
        return Circuit.EJECTED if now < self.ejected_until else Circuit.PROBING

    def takes_requests(self, now: float) -> bool:
        """Whether one more request may be placed here."""
        circuit = self.circuit(now)
        if circuit is Circuit.CLOSED:
            return True
        is_probed = self._probing_since is not None and now < self._probing_since + MAX_S
        return circuit is Circuit.PROBING and not is_probed

    def placed(self, now: float) -> None:
        """A request was placed here: the probe, if one is due."""
        if self.ejected_until is not None:
            self._probing_since = now

    def succeeded(self) -> None:
        """A request was answered."""
        if self.slack > 1.0:
            self.slack = max(1.0, SLACK_KEPT * self.slack)
        if self._num_failures or self.ejected_until is not None:
            self._num_failures = self.num_ejections = 0
            self.ejected_until = self._probing_since = None

    def left(self) -> None:
        """A request ended without saying anything of the replica: the client went."""
        self._probing_since = None

    def failed(self, now: float, *, stalled: bool = False) -> bool:
        """A request was lost here; whether that ejects the replica."""
        self._num_failures += 1
        was_probing = self.circuit(now) is Circuit.PROBING
        if self.circuit(now) is Circuit.EJECTED:
            return False  # others that were under way: one fault, one ejection
        if not (stalled or was_probing or self._num_failures >= MAX_FAILURES):
            return False
        self.ejected_until = now + min(MAX_S, BASE_S * 2.0**self.num_ejections)
        if stalled:
            self.slack = min(MAX_SLACK, 2.0 * self.slack)
            self.ejection_reason = "a stream stalled"
        elif was_probing:
            self.ejection_reason = "its probe failed"
        else:
            self.ejection_reason = f"{self._num_failures} failures in a row"
        self._probing_since = None
        self.num_ejections = min(self.num_ejections + 1, 10)
        return True
