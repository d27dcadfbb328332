"""What the requests of the last minutes were like, replica by replica. Pure.

Prometheus keeps what was counted since the start and leaves rates to whoever scrapes it; this is
for who asks a router now, and for findings.py. Fed with requests as they end.

Bounded: a replica has 60 slots of ten seconds, each with a histogram of at most 488 buckets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from roost_router.sliding import LogHistogram, Sliding
from roost_router.traffic import Told, Traffic

if TYPE_CHECKING:
    from roost_router.http.record import RequestRecord

_SLOT_S: Final = 10.0
_NUM_SLOTS: Final = 60
_SLOTS_A_MINUTE: Final = 6
#: Requests that no replica took.
_NOWHERE: Final = ""


class _Slot:
    def __init__(self) -> None:
        self.num_requests = 0
        self.num_failed = 0  # requests
        self.num_lost = 0  # attempts
        self.told = Told()
        self.told_tokens = 0  # of prompts whose `cached_tokens` were told
        self.ttft_us = LogHistogram()


class RecentTraffic:
    """Of one router process."""

    def __init__(self) -> None:
        self._replicas: dict[str, Sliding[_Slot]] = {}

    def add(self, record: RequestRecord) -> None:
        """Count a request that ended. In order of their ends."""
        now = record.started_at + record.duration_s
        slot = self._slot(record.replica or _NOWHERE, now)
        slot.num_requests += 1
        for leg in record.lost_legs:
            self._slot(leg.placement.replica.name, now).num_lost += 1
        if record.ttft_s is not None:
            slot.ttft_us.add(int(record.ttft_s * 1e6))
        if record.outcome in {"server_error", "cut"}:
            slot.num_failed += 1
            lost = record.lost_legs
            if not (lost and lost[-1].placement is record.placement):
                slot.num_lost += 1  # its last attempt, whose error the client got as it was
        elif record.outcome == "ok":
            told = slot.told
            told.num_answers += 1
            if record.prompt_tokens is not None:
                told.num_with_usage += 1
                told.matched_tokens += record.matched_tokens or 0
                if record.cached_tokens is not None:
                    told.num_with_cached += 1
                    told.cached_tokens += record.cached_tokens
                    slot.told_tokens += record.prompt_tokens

    def _slot(self, replica: str, now: float) -> _Slot:
        slots = self._replicas.get(replica)
        if slots is None:
            slots = self._replicas[replica] = Sliding(_Slot, _SLOT_S, _NUM_SLOTS)
        return slots.at(now)

    def prune(self, names: frozenset[str], now: float) -> None:
        """Forget replicas that are not among `names`, once nothing of them is recent."""
        gone = [name for name in self._replicas if name and name not in names]
        for name in gone:
            if not self._replicas[name].recent(now):
                del self._replicas[name]

    def traffic(self, replica: str, now: float) -> Traffic:
        """The last minute of one replica."""
        windows = [self._replicas[replica]] if replica in self._replicas else []
        return _traffic(windows, now, lambda slot: slot.num_lost)

    def total(self, now: float) -> Traffic:
        """The last minute of all, with requests that no replica took."""
        return _traffic(list(self._replicas.values()), now, lambda slot: slot.num_failed)

    def told(self, replica: str, now: float) -> Told:
        """The last ten minutes of one replica."""
        total = Told()
        if replica in self._replicas:
            for slot in self._replicas[replica].recent(now):
                for field in Told.__struct_fields__:
                    setattr(total, field, getattr(total, field) + getattr(slot.told, field))
        return total


def _traffic(
    windows: list[Sliding[_Slot]], now: float, failures: Callable[[_Slot], int]
) -> Traffic:
    slots = [slot for window in windows for slot in window.recent(now, _SLOTS_A_MINUTE)]
    span_s = max([window.span_s(now, _SLOTS_A_MINUTE) for window in windows], default=1.0)
    told_tokens = sum(slot.told_tokens for slot in slots)
    ttft_us = LogHistogram()
    for slot in slots:
        ttft_us.merge(slot.ttft_us)
    return Traffic(
        sum(slot.num_requests for slot in slots) / span_s,
        sum(map(failures, slots)) / span_s,
        sum(slot.told.cached_tokens for slot in slots) / told_tokens if told_tokens else None,
        _seconds(ttft_us.quantile(0.5)),
        _seconds(ttft_us.quantile(0.99)),
    )


def _seconds(us: float | None) -> float | None:
    return None if us is None else us / 1e6
