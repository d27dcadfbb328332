"""A shadow policy: what a second policy would do with live traffic, without owning it. Pure.

It sees the candidates of every placement as the policy in charge saw them, picks, and is compared:
how often both chose the same, what each choice was predicted to wait and to find in cache. The
yardstick is the same for both, whatever units their scores have:

    wait = (queued + uncached) / prefill speed + decoding * decode_s      seconds to the first token

It tells what another policy would do *next*, not what a fleet under it would be like: caches and
queues are those that the policy in charge has made. `roost sim` answers the other question.

What it raises is counted and goes no further. Over the last ten minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from roost_router.policy.interface import retain
from roost_router.sliding import Sliding

if TYPE_CHECKING:
    from random import Random

    from roost_router.policy.interface import Candidate, Policy

_SLOT_S: Final = 30.0
_NUM_SLOTS: Final = 20


class ShadowReport(msgspec.Struct):
    """The second policy beside the one in charge; None where nothing was decided."""

    policy: str
    num_decisions: int  # with a choice: two candidates or more
    num_failed: int  # of them, that it raised an error at
    agreement: float | None  # share of decisions that were the same
    wait_s: float | None  # predicted until the first token, mean: of the policy in charge
    shadow_wait_s: float | None
    hit_rate: float | None  # share of prompt tokens believed in cache: of the policy in charge
    shadow_hit_rate: float | None


class _Slot:
    def __init__(self) -> None:
        self.num_decisions = 0
        self.num_failed = 0
        self.num_same = 0
        self.wait_s = 0.0
        self.shadow_wait_s = 0.0
        self.prompt_tokens = 0
        self.matched_tokens = 0
        self.shadow_matched_tokens = 0


class Shadow:
    """One policy that watches."""

    def __init__(self, name: str, make_policy: Callable[[], Policy], rng: Random) -> None:
        """`make_policy`: called for each model, as for the policy in charge."""
        self.name = name
        self._make_policy = make_policy
        self._policies: dict[str, Policy] = {}  # by model
        self._rng = rng
        self._slots = Sliding(_Slot, _SLOT_S, _NUM_SLOTS)

    def see(self, model: str, candidates: Sequence[Candidate], chosen: int, now: float) -> None:
        """The policy in charge picked `candidates[chosen]`. The cost of the second's pick."""
        if len(candidates) < 2:
            return
        slot = self._slots.at(now)
        slot.num_decisions += 1
        try:
            policy = self._policies.get(model)
            if policy is None:
                policy = self._policies[model] = self._make_policy()
            other = candidates[policy.pick(candidates, self._rng).chosen]
        except Exception:  # noqa: BLE001 - a user's own policy may raise anything
            slot.num_failed += 1
            return
        mine = candidates[chosen]
        slot.num_same += other is mine
        slot.wait_s += _wait_s(mine)
        slot.shadow_wait_s += _wait_s(other)
        slot.prompt_tokens += mine.matched_tokens + mine.uncached_tokens
        slot.matched_tokens += mine.matched_tokens
        slot.shadow_matched_tokens += other.matched_tokens

    def retain(self, names: frozenset[str]) -> None:
        """Of replicas, only these are left. Idempotent."""
        for policy in self._policies.values():
            retain(policy, names)

    def report(self, now: float) -> ShadowReport:
        """What the last ten minutes showed."""
        slots = self._slots.recent(now)
        num_decisions = sum(slot.num_decisions for slot in slots)
        num_failed = sum(slot.num_failed for slot in slots)
        num_compared = num_decisions - num_failed
        prompt_tokens = sum(slot.prompt_tokens for slot in slots)

        def mean(total: float, number: int) -> float | None:
            return total / number if number else None

        return ShadowReport(
            self.name,
            num_decisions,
            num_failed,
            mean(sum(slot.num_same for slot in slots), num_compared),
            mean(sum(slot.wait_s for slot in slots), num_compared),
            mean(sum(slot.shadow_wait_s for slot in slots), num_compared),
            mean(sum(slot.matched_tokens for slot in slots), prompt_tokens),
            mean(sum(slot.shadow_matched_tokens for slot in slots), prompt_tokens),
        )


def _wait_s(candidate: Candidate) -> float:
    tokens = candidate.queued_tokens + candidate.uncached_tokens
    return tokens / candidate.prefill_tokens_per_s + candidate.num_decoding * candidate.decode_s
