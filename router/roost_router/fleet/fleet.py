"""All replicas: who may take a request, and what reports and failures change. Pure.

The poller (poll.py) and the data path bring evidence, this file turns it into state:

    JOINING --answered--> UP --refused, or MAX_FAILED_POLLS late polls--> DOWN --answered--> UP

Requests bring evidence too: failures and stalls eject a replica for a while (health.py), unless
more than half of those up would be out: then the cause is rather something they share, and all
take requests (Envoy's panic threshold).

A refused connection means the process is gone and its KV cache with it; so does another start
time in its report. Both retire the replica's holder in the prefix index: a new epoch, with
nothing known. A late answer changes nothing until it repeats: a busy replica is not a dead one.

Replicas come and go:

    add ──► MEMBER ◄──set_draining──► DRAINING ──remove──► LEAVING ──last request ends──► GONE
                └───────────────────remove──────────────────┘└──add──► MEMBER

A replica that drains or leaves gets no new request, held ones included; those that run there go on
to their end, and it is polled until then, so that they do not wait for one that has died. Then
whoever keeps something of it (a Watcher) is told to let it go.

One URL is one replica: one that comes back before its last request has ended is the same object.
Names are never used for another URL. A URL that comes back has its old name, as far as that is
remembered: its series go on, and its place on a ring of names is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Final, Protocol

from roost_router.errors import ModelNotFoundError, NoReplicaError
from roost_router.fleet.health import Circuit, Health
from roost_router.fleet.kept import MIN_UNDOUBTED, Kept
from roost_router.fleet.replica import MAX_FAILED_POLLS, Membership, Replica, ReplicaState
from roost_router.fleet.retry_budget import RetryBudget
from roost_router.fleet.speed import Prefill
from roost_router.index.prefix_index import Floor, PrefixIndex
from roost_wire.llama_cpp import LLAMA_CPP
from roost_wire.load_report import LoadReport
from roost_wire.told_load import ToldLoad

#: KV capacity assumed of a replica that does not report one.
DEFAULT_KV_CAPACITY_TOKENS = 262_144
#: English text in a 32k to 150k vocabulary; traffic corrects it.
PRIOR_BYTES_PER_TOKEN = 4.0
_DEFAULT_BYTES = int(DEFAULT_KV_CAPACITY_TOKENS * PRIOR_BYTES_PER_TOKEN)
#: With a larger share of the replicas ejected, none counts as ejected.
PANIC_SHARE = 0.5
#: More requests than this router's by so many may have ended while the report was on its way.
MIN_OTHERS = 2
#: Capacity in bytes is set anew only when it moved by more than this share.
_RESIZE_SHARE = 0.05
#: And looked at only when the density moved by more than this.
_REFIT_SHARE = 0.01
#: Of a replica that is gone: in no index.
NO_HOLDER: Final = -1
#: Names remembered of replicas that are gone: addresses of pods never end.
MAX_NAMES: Final = 4096
#: Seconds for which a model whose last replica was removed is not unknown, but has no replica.
LEFT_S: Final = 300.0
_MAX_LEFT: Final = 1024


class Watcher(Protocol):
    """Keeps something for each replica."""

    def joined(self, replica: Replica) -> None:
        """A replica was added."""
        ...

    def gone(self, replica: Replica) -> None:
        """It was removed, and no request is left there: let go of what was kept for it."""
        ...


class Fleet:
    """The replicas of one router."""

    def __init__(self, index: PrefixIndex, urls: Iterable[str]) -> None:
        self._index = index
        self._bytes_per_token: dict[str, float] = {}  # by model
        self._budgets: dict[str, RetryBudget] = {}  # by model
        #: By model, the replicas that are up; used while none of them is ejected.
        self._calm: dict[str, list[Replica]] = {}
        #: By what makes replicas alike; see `_share_fit`.
        self._prefills: dict[tuple[tuple[str, ...], str, int], Prefill] = {}
        #: A replica once had clearly more requests than this router gave it: others do, too.
        self.others_seen = False
        self._fitted: dict[str, float] = {}  # by model: bytes a token that capacities follow
        #: Members. Never changed in place: who iterates has the list of that moment.
        self.replicas: list[Replica] = []
        self.leaving: list[Replica] = []  # removed, with requests that are not over
        self.num_added = self.num_removed = 0
        self._by_url: dict[str, Replica] = {}  # members and leaving
        self._names: dict[str, str] = {}  # by URL, of those that are gone, the latest last
        self._num_names = 0
        self._left: dict[str, float] = {}  # by model: when its last replica was removed
        self._watchers: list[Watcher] = []
        for url in urls:
            self.add(url)

    def __repr__(self) -> str:
        return f"<Fleet {self.replicas!r}>"

    @property
    def is_ready(self) -> bool:
        """Whether at least one replica can take requests."""
        return any(replica.is_open for replica in self.replicas)

    def watch(self, watcher: Watcher) -> None:
        """Tell `watcher` of all replicas, now and from now on.

        Of those that are gone who came last hears first: it may use what the others keep.
        """
        self._watchers.append(watcher)
        for replica in [*self.replicas, *self.leaving]:
            watcher.joined(replica)

    def find(self, url: str) -> Replica | None:
        """The replica at `url`, member or leaving."""
        return self._by_url.get(url)

    def add(self, url: str) -> Replica:
        """`url` is a member's from now on. Idempotent. O(replicas).

        A new one is JOINING until a poll is answered; one that was leaving is as it was.
        """
        replica = self._by_url.get(url)
        if replica is None:
            replica = Replica(self._name(url), url, self._index.open_holder(_DEFAULT_BYTES))
            self._by_url[url] = replica
        elif replica.membership is Membership.LEAVING:
            self.leaving = [other for other in self.leaving if other is not replica]
        else:
            return replica
        is_new = replica.membership is Membership.MEMBER
        replica.membership = Membership.MEMBER
        self.replicas = [*self.replicas, replica]
        self.num_added += 1
        self._calm.clear()
        if is_new:
            for watcher in self._watchers:
                watcher.joined(replica)
        return replica

    def _name(self, url: str) -> str:
        name = self._names.pop(url, None)
        if name is None:
            name = f"r{self._num_names}"
            self._num_names += 1
        return name

    def set_draining(self, replica: Replica, *, is_draining: bool) -> None:
        """Whether a member is to get no new requests for now. Idempotent."""
        if replica.membership in {Membership.MEMBER, Membership.DRAINING}:
            replica.membership = Membership.DRAINING if is_draining else Membership.MEMBER
            self._calm.clear()

    def remove(self, replica: Replica, now: float) -> None:
        """`replica` is no member any more; see the module. Idempotent. O(replicas)."""
        if replica.membership in {Membership.LEAVING, Membership.GONE}:
            return
        replica.membership = Membership.LEAVING
        self.replicas = [other for other in self.replicas if other is not replica]
        self.leaving = [*self.leaving, replica]
        self.num_removed += 1
        self._calm.clear()
        for model in replica.models:
            if not self.knows(model):
                self._left.pop(model, None)
                self._left[model] = now
                if len(self._left) > _MAX_LEFT:
                    del self._left[next(iter(self._left))]
        self.released(replica)

    def released(self, replica: Replica) -> None:
        """A request on `replica` is over; the last one of a leaving replica: that is gone."""
        if replica.membership is not Membership.LEAVING or replica.num_in_flight:
            return
        self.leaving = [other for other in self.leaving if other is not replica]
        del self._by_url[replica.url]
        self._names[replica.url] = replica.name
        if len(self._names) > MAX_NAMES:
            del self._names[next(iter(self._names))]
        replica.membership = Membership.GONE
        replica.speed.prefill.num_replicas -= 1
        self._index.retire(replica.holder)
        if replica.ended_holder is not None:
            self._index.retire(replica.ended_holder)
        replica.holder, replica.ended_holder = NO_HOLDER, None
        replica.epoch += 1
        for watcher in reversed(self._watchers):
            watcher.gone(replica)

    def models(self) -> dict[str, list[Replica]]:
        """Model id -> replicas that serve it and take requests."""
        served: dict[str, list[Replica]] = {}
        for replica in self.replicas:
            if replica.is_open:
                for model in replica.models:
                    served.setdefault(model, []).append(replica)
        return served

    def is_served(self, model: str) -> bool:
        """Whether a replica that serves `model` takes requests. O(replicas)."""
        return any(replica.is_open and model in replica.models for replica in self.replicas)

    def knows(self, model: str) -> bool:
        """Whether a replica ever named `model`. O(replicas)."""
        return any(model in replica.models for replica in self.replicas)

    def is_adapter(self, model: str) -> bool:
        """Whether a replica names `model` as an adapter of another. O(replicas)."""
        return any(model in replica.adapters for replica in self.replicas)

    def candidates(
        self,
        model: str,
        tried: frozenset[str],
        now: float,
        dialects: frozenset[str] | None = None,
    ) -> list[Replica]:
        """Replicas that could answer for `model`, at best none of those named in `tried`.

        Where nobody else is left, ejected replicas come next, then those tried before: a second
        attempt there beats none. `dialects`: only servers of these kinds.

        Raises ModelNotFoundError when replicas have told what they serve and none ever named
        `model`, nor one that was removed within LEFT_S; NoReplicaError when nobody is left who
        could answer. O(replicas).
        """
        if not tried and dialects is None:
            calm = self._calm.get(model, [])
            for replica in calm:
                if replica.health.ejected_until is not None:
                    break
            else:
                if calm:
                    return calm
        up = [r for r in self.replicas if r.is_open and model in r.models]
        if dialects is not None:
            up = [replica for replica in up if replica.dialect in dialects]
        fresh = [replica for replica in up if replica.name not in tried] if tried else up
        taking = [replica for replica in fresh if replica.health.takes_requests(now)]
        if len(taking) < len(fresh):
            num_out = sum(r.health.circuit(now) is Circuit.EJECTED for r in up)
            if num_out > PANIC_SHARE * len(up):
                taking = fresh
        found = taking or fresh or up
        if len(taking) == len(up) and dialects is None:
            self._calm[model] = up
        if found:
            return found
        known = {name for replica in self.replicas for name in replica.models}
        left_at = self._left.get(model)
        if known and model not in known and (left_at is None or now > left_at + LEFT_S):
            raise ModelNotFoundError(model, sorted(known))
        raise NoReplicaError(model, tried=len(tried))

    def has_fresh(self, model: str, tried: frozenset[str]) -> bool:
        """Whether a replica for `model` takes requests and is not in `tried`. O(replicas)."""
        return any(r.is_open and model in r.models and r.name not in tried for r in self.replicas)

    def prefill_tokens_per_s(self, replica: Replica) -> float:
        """Fitted speed; before the first fit the fleet's median."""
        return self.expected_speed(replica)[0]

    def expected_speed(self, replica: Replica) -> tuple[float, float]:
        """Prefill in tokens/s, and by how much shorter than predicted waits are.

        Before the first fit the fleet's medians, the same for all such replicas: so a new one is
        neither flooded nor starved. O(1), but O(replicas) for a new one.
        """
        speeds = [replica.speed]
        if not replica.speed.num_observed:
            speeds = [r.speed for r in self.replicas if r.speed.num_observed] or speeds
        tokens_per_s = median([speed.prefill_tokens_per_s for speed in speeds])
        return tokens_per_s, median([speed.wait_scale for speed in speeds])

    def retry_budget(self, model: str) -> RetryBudget:
        """The retries that requests of `model` may still cause."""
        budget = self._budgets.get(model)
        if budget is None:
            budget = RetryBudget()
            if self.knows(model):  # names that clients make up are not kept
                self._budgets[model] = budget
        return budget

    def answered(
        self,
        replica: Replica,
        models: Iterable[str],
        report: LoadReport | None,
        dialect: str = "",
    ) -> None:
        """A poll succeeded: `replica` is up, serves `models` and reports `report`.

        `report`: None where it did not come in time; the last one stays. `dialect`: which server it
        is, by its own words.
        """
        if replica.membership is Membership.GONE:
            return
        if report is not None:
            self._reported(replica, report)
        self._calm.clear()
        if replica.dialect != dialect:
            replica.dialect = dialect
            self._believe_anew(replica)
        replica.state = ReplicaState.UP
        replica.num_failed_polls = 0
        replica.models = tuple(models)
        self._resize(replica)
        self._share_fit(replica)

    def _reported(self, replica: Replica, report: LoadReport) -> None:
        known = replica.started_at is not None and report.started_at is not None
        if known and replica.started_at != report.started_at:
            assert report.started_at is not None
            self.started_anew(replica, report.started_at)
        self._take_in(replica, report, 0, 0)
        if replica.num_others > MIN_OTHERS:
            self.others_seen = True
        if report.started_at is not None:  # a page that lacks it once does not unmake it
            replica.started_at = report.started_at
        if report.kv_capacity_tokens is not None:
            replica.kv_capacity_tokens = report.kv_capacity_tokens

    def started_anew(self, replica: Replica, started_at: float) -> None:
        """It is another process now: what the last one held and did is past."""
        self._new_epoch(replica)
        replica.health = Health()
        replica.started_at = started_at

    def load_told(
        self, replica: Replica, load: ToldLoad, num_ended: int = 0, done_tokens: int = 0
    ) -> None:
        """`replica` told its load without being asked, which is as good as a poll.

        `num_ended`: of our requests in flight there, those that it counts no more. `done_tokens`:
        of our uncached tokens queued there, those that it has computed.

        It comes with each answer, and news of ends may overtake it: what is seen once in a thousand
        times does not prove that there are others.
        """
        self._take_in(replica, replica.report.with_load(load), num_ended, done_tokens)

    def refused(self, replica: Replica) -> None:
        """Nobody listens at `replica`'s address: down, and its cache is gone."""
        if replica.membership is Membership.GONE:
            return
        if self._index.num_blocks(replica.holder):
            newest = self._index.newest(replica.holder)
            self._new_epoch(replica)
            # What other routers tell late of the process that is gone is not held by the next one.
            self._index.drop_below(replica.holder, Floor(newest, 0))
        if replica.is_up:
            self._calm.clear()
            replica.state = ReplicaState.DOWN

    def failed(self, replica: Replica, now: float, *, stalled: bool = False) -> None:
        """A request was lost on `replica`, or made no progress there."""
        replica.health.failed(now, stalled=stalled)

    def learn_kept(self, replica: Replica, believed_tokens: int, cached_tokens: int) -> None:
        """Of `believed_tokens` (positive) of a prompt, `replica` had so many; see kept.py."""
        replica.kept.learn(believed_tokens, cached_tokens)
        if replica.kept.share < MIN_UNDOUBTED:
            self._tell_ended_apart(replica)

    def _tell_ended_apart(self, replica: Replica) -> None:
        if replica.ended_holder is None:
            replica.ended_holder = self._index.open_holder(self._capacity_bytes(replica))

    def poll_failed(self, replica: Replica) -> None:
        """A poll timed out or answered nonsense; it counts only when it repeats."""
        replica.num_failed_polls += 1
        if replica.num_failed_polls >= MAX_FAILED_POLLS and replica.is_up:
            self._calm.clear()
            replica.state = ReplicaState.DOWN

    def bytes_per_token(self, model: str) -> float:
        """Bytes of canonical prompt a token of `model`, over recent traffic."""
        return self._bytes_per_token.get(model, PRIOR_BYTES_PER_TOKEN)

    def set_bytes_per_token(self, model: str, bytes_per_token: float) -> None:
        """Prompts of `model` turned out to be that dense: capacities in bytes follow."""
        self._bytes_per_token[model] = bytes_per_token
        fitted = self._fitted.get(model, 0.0)
        if abs(bytes_per_token - fitted) <= _REFIT_SHARE * fitted:
            return  # it moves with each answer, and capacities by steps
        self._fitted[model] = bytes_per_token
        for replica in self.replicas:
            if model in replica.models:
                self._resize(replica)

    def _share_fit(self, replica: Replica) -> None:
        """Alike are replicas of one server and model with as much KV memory.

        Mixed GPUs mostly differ in it. Where it is unknown, a replica is like no other.
        """
        if replica.kv_capacity_tokens is None:
            return
        kind = (replica.models, replica.dialect, replica.kv_capacity_tokens)
        prefill = self._prefills.get(kind)
        if prefill is None:
            self._prefills = {k: p for k, p in self._prefills.items() if p.num_replicas}
            prefill = self._prefills[kind] = Prefill()
        replica.speed.share(prefill)

    def _new_epoch(self, replica: Replica) -> None:
        self._index.retire(replica.holder)
        replica.holder = self._index.open_holder(self._capacity_bytes(replica))
        replica.epoch += 1
        if replica.ended_holder is not None:
            self._index.retire(replica.ended_holder)
            replica.ended_holder = None
        self._believe_anew(replica)

    def _believe_anew(self, replica: Replica) -> None:
        by_slot = replica.dialect == LLAMA_CPP
        replica.kept = Kept(by_slot=by_slot)
        if by_slot:
            self._tell_ended_apart(replica)

    def _resize(self, replica: Replica) -> None:
        capacity = self._capacity_bytes(replica)
        before = self._index.capacity_bytes(replica.holder)
        if abs(capacity - before) > _RESIZE_SHARE * before:
            self._index.set_capacity(replica.holder, capacity)
            if replica.ended_holder is not None:
                self._index.set_capacity(replica.ended_holder, capacity)

    def _capacity_bytes(self, replica: Replica) -> int:
        """Bytes of prompts that the replica's KV cache holds, by its first model's density."""
        tokens = replica.kv_capacity_tokens or DEFAULT_KV_CAPACITY_TOKENS
        model = replica.models[0] if replica.models else ""
        return int(tokens * self.bytes_per_token(model))

    def _take_in(
        self, replica: Replica, report: LoadReport, num_ended: int, done_tokens: int
    ) -> None:
        """What a replica says of itself; the last two as in `load_told`."""
        replica.report = report
        shared = replica.shared
        num_known = replica.num_in_flight + shared.num_in_flight - num_ended
        num_reported = (report.num_running or 0) + (report.num_waiting or 0)
        replica.num_others = max(0, num_reported - num_known)
        known_tokens = replica.queued_tokens + shared.queued_tokens - done_tokens
        replica.others_told(report.queued_tokens, known_tokens)
