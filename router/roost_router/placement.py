"""Place a request: index, fleet and policy put to work together. Pure.

This is the router's brain. The data path calls it at four moments and does what it says; the
simulator and the tests drive the same object with their own clock:

    place        decide, and at once record the decision: residency and load
    first_byte   the prefill is done
    learn        the replica told its prompt and cached tokens
    finish       the request left, for whatever reason

What is learnt. *Bytes per token*, an average by model, turns block counts into tokens.
`cached_tokens` corrects the index: if a block that we believed resident was not, then with
least-recently-used eviction all blocks of that replica touched no later than it are gone as
well. Two guards keep that deduction true. Expected blocks do not count: what is still being
prefilled is not evicted, only late. And density varies within a prompt, so the cached tokens are
taken to be as many bytes as they may plausibly be.

A request that is not streamed shows nothing between its arrival and its end, so its prefill is
taken to be over when the fitted speed says so.

What a replica's KV events tell of a prompt counts for more than what was placed there, as far as
the prompt's tokens are known (told_residency.py). Two things they cannot tell are added from our
own placements: what is being computed, and what lies deeper than the tokens that are known.

Not here: any I/O, retries, how bytes reach the replica.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from roost_router.fleet.fleet import PRIOR_BYTES_PER_TOKEN, Fleet
from roost_router.fleet.replica import Membership, Replica
from roost_router.index.prefix_index import PrefixIndex
from roost_router.index.text_chain import (
    TEXT_BLOCK_BYTES,
    chain_bytes,
    num_whole_blocks,
)
from roost_router.index.unseen import Unseen, kind_of, ranks
from roost_router.openai_request import RoutingFields
from roost_router.policy.cost import interference
from roost_router.policy.interface import Candidate, Decision, Policy, retain
from roost_router.policy.slow_start import thin
from roost_router.shared.journal import Journal
from roost_router.shared.stamps import Stamps

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from roost_router.index.token_knowledge import Known
    from roost_router.told_residency import ToldResidency

#: Tokens that the prior of bytes per token weighs, and the most that the past may weigh.
_PRIOR_TOKENS = 1_000.0
_MEMORY_TOKENS = 1_000_000.0
#: Averages outside are not of text: parts that are no text, or a replica that counts nonsense.
_MIN_BYTES_PER_TOKEN = 0.5
_MAX_BYTES_PER_TOKEN = 16.0
#: How much denser than average the cached part of a prompt may be.
_DENSITY_SLACK = 1.5
#: Blocks are cut at 256 bytes here and at (typically) 16 tokens there.
_TOLERANCE_BYTES = 2 * TEXT_BLOCK_BYTES
#: Times the lag of news after which a first byte is overdue.
_OVERDUE = 2.0
#: A holder may have grown to so many capacities where another router is to trim it.
_MOST_CAPACITIES: Final = 2
_NO_DEPTHS: dict[int, int] = {}
_NOTHING_TOLD: list[Known | None] = []
#: Fewer events say more about the first and the last than about the pace between them.
_MIN_EVENTS_FOR_ITL = 8


class Options:
    """The replicas that could take a request, at one moment."""

    def __init__(
        self,
        fields: RoutingFields,
        replicas: list[Replica],
        candidates: list[Candidate],
        depths: dict[int, int],
        unseen_kinds: list[int],
    ) -> None:
        self.fields: Final = fields
        self.replicas: Final = replicas
        self.candidates: Final = candidates  # of the replicas, in order
        self.depths: Final = depths  # matched blocks by holder, where there are any
        self.unseen_kinds: Final = unseen_kinds  # of the replicas; empty: no block is unknown


def _unseen_kinds(chain: list[int], depths: dict[int, int], replicas: list[Replica]) -> list[int]:
    """What index/unseen.py calls the kind of each replica; none where no block is unknown."""
    if len(replicas) == 1:
        return []
    deepest = max(depths.values()) if depths else 0
    if deepest == len(chain):
        return []
    found = ranks(chain[deepest], [replica.salt for replica in replicas])
    if not deepest:
        return found
    get = depths.get
    return [
        kind_of(rank, holds_deepest=get(replica.holder) == deepest)
        for rank, replica in zip(found, replicas, strict=True)
    ]


def _matched_tokens(
    replica: Replica, depths: dict[int, int], density: float, prompt_tokens: int
) -> int:
    """Of a prompt, what is there by our own placements, less what running requests keep."""
    if replica.holder not in depths:
        return 0
    matched_bytes = chain_bytes(depths[replica.holder])
    matched_tokens = min(prompt_tokens - 1, int(matched_bytes / density))
    if replica.ended_holder is None or not replica.kept.is_by_slot:
        return matched_tokens
    ended_bytes = chain_bytes(depths.get(replica.ended_holder, 0))
    return min(matched_tokens, int(ended_bytes / density))


def _num_decoding(replica: Replica) -> int:
    """Streams that run there, of all routers."""
    return replica.num_decoding + replica.shared.num_decoding + replica.num_others


class Placement:
    """One request on one replica, from decision to end."""

    def __init__(  # noqa: PLR0917
        self,
        replica: Replica,
        fields: RoutingFields,
        decision: Decision,
        candidates: list[Candidate],
        matched_blocks: int,
        matched_stamps: list[int],
        ended_stamps: list[int] | None,
        is_after_running: bool,
        number: int,
        unseen_kind: int | None,
        now: float,
    ) -> None:
        chosen = candidates[decision.chosen]
        self.replica: Final = replica
        self.fields: Final = fields
        self.model: Final = fields.model
        self.decision: Final = decision
        self.candidates: Final = candidates
        self.number: Final = number  # in the order of placements
        self.stamp = 0  # in the index, from the first byte on
        self.placed_at: Final = now  # seconds, monotonic
        self.prompt_bytes: Final = len(fields.prompt)
        self.matched_tokens: Final = chosen.matched_tokens  # predicted
        self.uncached_tokens: Final = chosen.uncached_tokens  # predicted; what was reserved
        self.was_told: Final = chosen.is_told  # matched_tokens, by KV events
        self.prompt_tokens: Final = chosen.prompt_tokens  # predicted
        #: Uncached tokens that stood before the first token, queue included.
        self.work_tokens: Final = chosen.queued_tokens + chosen.uncached_tokens
        #: The same, if nothing of them turns out to be cached.
        self.most_tokens: Final = (
            replica.queued_prompt_tokens
            + replica.shared.queued_prompt_tokens
            + chosen.prompt_tokens
        )
        speed = chosen.prefill_tokens_per_s
        #: Predicted until the first token, beside the streams that are running.
        self.predicted_s: Final = interference(chosen) * self.work_tokens / speed
        #: Predicted; believed where the answer shows nothing before its end.
        self.prefilled_at: Final = now + self.work_tokens / speed
        self.holder: Final = replica.holder  # of the replica at decision time ...
        self.epoch: Final = replica.epoch  # ... while this is its epoch
        self.chain: Final = fields.chain
        self.matched_blocks: Final = matched_blocks  # expected ones included
        self.matched_stamps: Final = matched_stamps  # of those that were held, before this
        #: Of those that requests computed which ended since; None: these are not told apart.
        self.ended_stamps: Final = ended_stamps
        #: The last that had all of the matched blocks was running.
        self.is_after_running: Final = is_after_running
        self.unseen_kind: Final = unseen_kind  # None: no block of it was unknown
        self.first_byte_at: float | None = None
        self.ttft_s: float | None = None  # of a stream; None again once it was observed
        self.is_decoding = False  # counted as a running stream, no longer as queued
        self.is_finished = False
        self.has_learnt = False

    def explain(self) -> str:
        """Why this replica: every candidate with what it held, had to do, and would cost."""
        return "; ".join(
            f"{'*' if i == self.decision.chosen else ''}{c.name} cost {cost:.3f} s "
            f"(matched {c.matched_tokens}, uncached {c.uncached_tokens}, queued "
            f"{c.queued_tokens} tokens, {c.num_decoding} decoding, "
            f"{c.prefill_tokens_per_s:.0f} tokens/s)"
            for i, (c, cost) in enumerate(zip(self.candidates, self.decision.costs_s, strict=True))
        )


class Placer:
    """Decides where requests go and remembers where they went."""

    def __init__(
        self,
        index: PrefixIndex,
        fleet: Fleet,
        make_policy: Callable[[], Policy],
        rng: Random,
        told: ToldResidency | None = None,
        *,
        journal: Journal | None = None,
    ) -> None:
        """`make_policy`: called for each model, since what a policy keeps is of its replicas.

        `told`: what KV events say; None: they are not followed. `journal`: notes what other routers
        should know; None: there are none.
        """
        self.index = index
        self.fleet = fleet
        self.told = told
        self.journal = journal
        self._stamps = Stamps() if journal is None else journal.stamps
        self._make_policy = make_policy
        self._policies: dict[str, Policy] = {}  # by model
        self._rng = rng
        self._num_placed = 0
        self._unseen_by_model: dict[str, Unseen] = {}
        # By replica, for as long as it is one (`joined`, `gone`):
        self._pending: dict[str, dict[int, Placement]] = {}
        #: Stamps of placements that have shown a first byte and no end.
        self._running: dict[str, set[int]] = {}
        self._silent: dict[str, dict[int, Placement]] = {}
        self._seen: dict[str, tuple[float, float]] = {}  # by model: bytes, tokens
        fleet.watch(self)

    def joined(self, replica: Replica) -> None:
        """A replica was added to the fleet."""
        self._pending[replica.name] = {}
        self._running[replica.name] = set()
        self._silent[replica.name] = {}

    def gone(self, replica: Replica) -> None:
        """It was removed, and its last request is over."""
        del self._pending[replica.name], self._running[replica.name], self._silent[replica.name]
        if self.told is not None:
            self.told.forget(replica.name)
        names = frozenset([other.name for other in (*self.fleet.replicas, *self.fleet.leaving)])
        for policy in self._policies.values():
            retain(policy, names)

    def place(
        self,
        fields: RoutingFields,
        now: float,
        tried: frozenset[str] = frozenset(),
        dialects: frozenset[str] | None = None,
    ) -> Placement:
        """Pick a replica, at best not in `tried`, and record the placement.

        `dialects`: only servers of these kinds (`Replica.dialect`).

        Raises ModelNotFoundError or NoReplicaError. O(blocks of the prompt + candidates).
        """
        options = self.weigh(fields, now, tried, dialects)
        return self.bind(options, self.decide(options), now)

    def weigh(
        self,
        fields: RoutingFields,
        now: float,
        tried: frozenset[str] = frozenset(),
        dialects: frozenset[str] | None = None,
    ) -> Options:
        """The replicas that could take a request, as `place` sees them; nothing is recorded.

        Raises ModelNotFoundError or NoReplicaError. O(log(blocks) + candidates).
        """
        fleet, silent = self.fleet, self._silent
        replicas = fleet.candidates(fields.model, tried, now, dialects)
        chain = fields.chain
        holders = 0
        for replica in replicas:
            holders |= 1 << replica.holder
            if replica.ended_holder is not None:
                holders |= 1 << replica.ended_holder
            waiting = silent[replica.name]
            if waiting:
                self._assume_prefilled(waiting, now)
        depths = self.index.lookup(chain, holders) if chain else _NO_DEPTHS
        told = _NOTHING_TOLD
        if self.told is not None and chain:
            told = self.told.lookup(fields.model, chain, replicas)
        density = fleet.bytes_per_token(fields.model)
        prompt_tokens = int(len(fields.prompt) / density + 0.5) or 1
        kinds: list[int] = []
        if fleet.others_seen:
            kinds = _unseen_kinds(chain, depths, replicas)
        unseen = self._unseen(fields.model)
        is_thin = thin([self.index.num_bytes(replica.holder) for replica in replicas])
        unfitted: tuple[float, float] | None = None  # what is expected of all without a fit
        candidates = []
        for number, replica in enumerate(replicas):
            speed = replica.speed
            if speed.num_observed:
                tokens_per_s, wait_scale = speed.prefill_tokens_per_s, speed.wait_scale
            else:
                if unfitted is None:
                    unfitted = fleet.expected_speed(replica)
                tokens_per_s, wait_scale = unfitted
            capacity = replica.kv_capacity_tokens or 0
            matched_tokens = _matched_tokens(replica, depths, density, prompt_tokens)
            known, is_told = told[number] if told else None, False
            if known is not None:
                is_all = known.matched_tokens < known.bound_tokens
                ours = matched_tokens
                if is_all:
                    ours = self._untold_tokens(replica, chain, depths, density, now)
                is_told = is_all or 2 * known.matched_tokens >= ours  # most of it, at least
                matched_tokens = min(prompt_tokens - 1, max(known.matched_tokens, ours))
            uncached_tokens = prompt_tokens - matched_tokens
            hoped_tokens = 0.0 if is_told else matched_tokens * (replica.kept.share - 1.0)
            if kinds:
                hoped_tokens += uncached_tokens * unseen.share(kinds[number])
            candidates.append(
                Candidate(
                    replica.name,
                    matched_tokens=matched_tokens,
                    uncached_tokens=uncached_tokens,
                    queued_tokens=self._queued_tokens(replica, tokens_per_s, now)
                    + replica.shared.queued_tokens
                    + replica.others_tokens(tokens_per_s, now),
                    num_decoding=_num_decoding(replica),
                    prefill_tokens_per_s=tokens_per_s,
                    decode_s=speed.decode_s,
                    recent_uncached_tokens=replica.recent_uncached_tokens(now),
                    num_in_flight=replica.num_in_flight + replica.shared.num_in_flight,
                    kv_usage=replica.report.kv_usage or 0.0,
                    kv_capacity_tokens=capacity,
                    kv_release_tokens_per_s=replica.kv_release.tokens_per_s(capacity, now),
                    prompt_key=fields.prompt_key,
                    hoped_tokens=hoped_tokens,
                    is_thin=is_thin[number],
                    is_speed_known=speed.num_observed > 0,
                    wait_scale=wait_scale,
                    is_told=is_told,
                    num_others=replica.num_others,
                    tells_queue=replica.tells_queue,
                    slot_wait_s=replica.slot_wait_s(),
                )
            )
        return Options(fields, replicas, candidates, depths, kinds)

    def decide(self, options: Options) -> Decision:
        """The policy's pick."""
        return self.policy(options.fields.model).pick(options.candidates, self._rng)

    def policy(self, model: str) -> Policy:
        """Who decides for requests of `model`, which a replica serves."""
        policy = self._policies.get(model)
        if policy is None:
            policy = self._policies[model] = self._make_policy()
        return policy

    def bind(self, options: Options, decision: Decision, now: float) -> Placement:
        """Record that the request goes where `decision` says: residency and load.

        O(blocks of the prompt).
        """
        fields = options.fields
        chain, replica = fields.chain, options.replicas[decision.chosen]
        self._num_placed = number = self._num_placed + 1
        holder = replica.holder
        matched_blocks = options.depths.get(holder, 0)
        matched_stamps: list[int] = []
        if matched_blocks:
            num_held = self.index.num_held(holder, chain, matched_blocks)
            matched_stamps = self.index.stamps(holder, chain[:num_held])
        ended_stamps: list[int] | None = None
        if replica.ended_holder is not None:
            ended_blocks = min(matched_blocks, options.depths.get(replica.ended_holder, 0))
            ended_stamps = self.index.stamps(replica.ended_holder, chain[:ended_blocks])
        placement = Placement(
            replica,
            fields,
            decision,
            options.candidates,
            matched_blocks,
            matched_stamps,
            ended_stamps,
            bool(matched_stamps) and matched_stamps[-1] in self._running[replica.name],
            number,
            options.unseen_kinds[decision.chosen] if options.unseen_kinds else None,
            now,
        )
        self._pending[replica.name][number] = placement
        if not fields.stream:
            self._silent[replica.name][number] = placement
        if chain:
            self.index.expect(holder, chain, len(matched_stamps))
        tokens_per_s = options.candidates[decision.chosen].prefill_tokens_per_s
        replica.reserve(placement.uncached_tokens, placement.prompt_tokens, tokens_per_s, now)
        replica.health.placed(now)
        if self.journal is not None:
            self.journal.expected(number, replica, placement.uncached_tokens, chain)
        return placement

    def first_byte(self, placement: Placement, now: float, *, streamed: bool) -> None:
        """The replica's answer begins. `streamed`: with its first token, not with the whole."""
        if placement.first_byte_at is not None or placement.is_finished:
            return
        placement.first_byte_at = now
        replica = placement.replica
        self._start_decoding(placement, now)
        self._settle(placement)
        placement.stamp = stamp = self._stamps.next(now)
        self._running[replica.name].add(stamp)
        if self.told is not None:
            self.told.settled(replica.name, stamp, now)
        if placement.epoch == replica.epoch and placement.chain:
            self.index.add(placement.holder, placement.chain, stamp)
            if self.journal is not None:
                self.journal.touched(replica, stamp, placement.chain)
            self._trim(replica)
        if streamed:
            placement.ttft_s = now - placement.placed_at
            replica.speed.observe_wait(placement.predicted_s, placement.ttft_s)
            if not placement.matched_tokens:
                self._observe_ttft(placement, placement.uncached_tokens)

    def learn(self, placement: Placement, prompt_tokens: int, cached_tokens: int | None) -> None:
        """The replica counted the prompt and, maybe, told what its cache held. Once a request.

        Figures that cannot be true are ignored: a replica's mistake must not spoil the others.
        """
        if placement.has_learnt or prompt_tokens <= 0:
            return
        placement.has_learnt = True
        density = placement.prompt_bytes / prompt_tokens
        if not _MIN_BYTES_PER_TOKEN <= density <= _MAX_BYTES_PER_TOKEN:
            return
        prior = (PRIOR_BYTES_PER_TOKEN * _PRIOR_TOKENS, _PRIOR_TOKENS)
        num_bytes, num_tokens = self._seen.get(placement.model, prior)
        keep = max(0.0, 1.0 - prompt_tokens / _MEMORY_TOKENS)
        num_bytes = num_bytes * keep + placement.prompt_bytes
        num_tokens = num_tokens * keep + prompt_tokens
        self._seen[placement.model] = (num_bytes, num_tokens)
        self.fleet.set_bytes_per_token(placement.model, num_bytes / num_tokens)
        counted = placement.fields.counted_tokens
        is_gone = placement.replica.membership is Membership.GONE
        if self.told is not None and counted is not None and not is_gone:
            self.told.compare(placement.model, placement.replica, counted, prompt_tokens)
        if cached_tokens is not None and 0 <= cached_tokens <= prompt_tokens:
            self._observe_ttft(placement, prompt_tokens - cached_tokens)
            is_same = placement.epoch == placement.replica.epoch
            if placement.matched_blocks and is_same and not placement.was_told:
                self._learn_kept(placement, cached_tokens, density)
            if placement.unseen_kind is not None and not placement.was_told:
                self._unseen(placement.model).learn(
                    placement.unseen_kind,
                    prompt_tokens - placement.matched_tokens,
                    cached_tokens - placement.matched_tokens,
                )
            self._correct(placement, cached_tokens, density)

    def _learn_kept(self, placement: Placement, cached_tokens: int, density: float) -> None:
        """Blocks were matched, each of which has tokens: 256 bytes of plausible density."""
        kept, ended = placement.replica.kept, placement.ended_stamps
        believed_tokens = int(chain_bytes(placement.matched_blocks) / density)
        if ended is not None:
            ended_tokens = int(chain_bytes(len(ended)) / density)
            if ended:
                kept.learn_ended(ended_tokens, cached_tokens)
            if placement.is_after_running and 2 * ended_tokens < believed_tokens:
                kept.learn_running(believed_tokens, cached_tokens)
        self.fleet.learn_kept(placement.replica, believed_tokens, cached_tokens)

    def finish(self, placement: Placement, now: float, num_events: int = 0) -> None:
        """The request left: answered, failed or aborted. Idempotent.

        `num_events`: events of a stream that went at the replica's own pace, else 0.
        """
        if placement.is_finished:
            return
        placement.is_finished = True
        self._silent[placement.replica.name].pop(placement.number, None)
        replica, first_at = placement.replica, placement.first_byte_at
        if first_at is None:
            self._settle(placement)
        else:
            self._observe_ttft(placement, placement.uncached_tokens)
            if placement.fields.stream:
                replica.speed.observe_answer(now - first_at)
            if num_events >= _MIN_EVENTS_FOR_ITL:
                itl_s = (now - first_at) / (num_events - 1)
                replica.speed.observe_itl(itl_s, max(1, _num_decoding(replica)))
        self._running[replica.name].discard(placement.stamp)
        self._end(placement, now)
        replica.release(
            placement.uncached_tokens, placement.prompt_tokens, decoding=placement.is_decoding
        )
        kv_tokens = placement.prompt_tokens + num_events
        replica.kv_release.num_tokens += kv_tokens
        replica.kv_release.released(kv_tokens, now)
        if self.journal is not None:
            self.journal.changed(replica)
        if replica.membership is Membership.LEAVING:
            self.fleet.released(replica)

    def _untold_tokens(
        self,
        replica: Replica,
        chain: list[int],
        depths: dict[int, int],
        density: float,
        now: float,
    ) -> int:
        """Tokens of a prompt that are computed there, or just were: no event tells of them yet."""
        holder = replica.holder
        depth = depths.get(holder, 0)
        if not depth:
            return 0
        assert self.told is not None
        if self.index.num_held(holder, chain, depth) == depth:
            since = self.told.untold_since(replica.name, now)
            depth = self.index.num_since(holder, chain, depth, since)
        return int(chain_bytes(depth) / density) if depth else 0

    def _assume_prefilled(self, silent: dict[int, Placement], now: float) -> None:
        """Count requests that are not streamed as decoding once their prefill must be over."""
        while silent:
            stamp, placement = next(iter(silent.items()))
            if placement.prefilled_at > now:
                break
            del silent[stamp]
            self._start_decoding(placement, placement.prefilled_at)

    def _queued_tokens(self, replica: Replica, tokens_per_s: float, now: float) -> int:
        """Uncached tokens that stand before a request that comes now.

        Where news takes its time, prefills are taken to go on meanwhile as predicted; but when one
        is overdue by more than its news can be, something holds them up, and all of them count.
        """
        if not replica.queued_tokens or not replica.news_lag_s:
            return replica.queued_tokens
        oldest = next(iter(self._pending[replica.name].values()), None)
        if oldest is not None and now > oldest.prefilled_at + _OVERDUE * replica.news_lag_s:
            return replica.queued_tokens
        return int(replica.undrained_tokens(tokens_per_s, now))

    def _unseen(self, model: str) -> Unseen:
        unseen = self._unseen_by_model.get(model)
        if unseen is None:
            unseen = self._unseen_by_model[model] = Unseen()
        return unseen

    def _start_decoding(self, placement: Placement, at: float) -> None:
        if not placement.is_decoding:
            placement.is_decoding = True
            placement.replica.start_decoding(placement.uncached_tokens, placement.prompt_tokens, at)

    def _observe_ttft(self, placement: Placement, uncached_tokens: int) -> None:
        """Once a stream: how long its first token took, of `uncached_tokens` and its queue.

        At once where all of a prompt had to be computed; else when the replica told what was
        cached, or ended: a prompt that was computed against belief would look like a slow replica,
        and many of them like one to which length is nothing.
        """
        if placement.ttft_s is not None:
            work_tokens = placement.work_tokens - placement.uncached_tokens + uncached_tokens
            placement.replica.speed.observe_ttft(work_tokens, placement.ttft_s)
            placement.ttft_s = None

    def _end(self, placement: Placement, now: float) -> None:
        """What a request computed may be had by the next one from now on; see fleet/kept.py."""
        replica, index = placement.replica, self.index
        holder = replica.ended_holder
        if holder is None or placement.first_byte_at is None or placement.epoch != replica.epoch:
            return
        index.add(holder, placement.chain, self._stamps.next(now))
        index.trim(holder)

    def _trim(self, replica: Replica) -> None:
        """Evict what the replica must have evicted, unless another router says what that is."""
        journal, index, holder = self.journal, self.index, replica.holder
        if journal is None:
            index.trim(holder)
        elif journal.feeds(replica):
            if index.trim(holder):
                journal.dropped(replica, index.floor(holder))
        elif index.num_bytes(holder) > _MOST_CAPACITIES * index.capacity_bytes(holder):
            index.trim(holder)  # its feeder is slow, or there is none
            journal.dropped(replica, index.floor(holder))

    def _settle(self, placement: Placement) -> None:
        replica = placement.replica
        if self._pending[replica.name].pop(placement.number, None) is None:
            return
        if self.journal is not None:
            self.journal.settled(placement.number, replica)
        if placement.epoch == replica.epoch:
            num_held = len(placement.matched_stamps)
            self.index.unexpect(placement.holder, placement.chain, num_held)

    def _correct(self, placement: Placement, cached_tokens: int, density: float) -> None:
        """Drop what the replica must have evicted, if it had less than we believed.

        `density`: bytes a token of this prompt as a whole.
        """
        replica = placement.replica
        if placement.epoch != replica.epoch:
            return
        densest = _DENSITY_SLACK * max(density, self.fleet.bytes_per_token(placement.model))
        cached_bytes = int(cached_tokens * densest) + _TOLERANCE_BYTES
        # Not the first that is missing, but the first that surely is: as old or older.
        first, ended = num_whole_blocks(cached_bytes), placement.ended_stamps
        if ended is not None and first < len(ended) and replica.ended_holder is not None:
            self.index.forget_older(replica.ended_holder, ended[first])
        if first < len(placement.matched_stamps) and not replica.kept.is_by_slot:
            # Else all is there, or a running request has it, and keeps it to itself.
            self.index.forget_older(placement.holder, placement.matched_stamps[first])
            if self.journal is not None:
                self.journal.dropped(replica, self.index.floor(placement.holder))
