"""One stream of KV events (a replica, a data-parallel rank): order, gaps, and how far to trust it.

    BLIND --first batch, or proof that there was none--> EXACT --a batch is missing--> CATCHING_UP
    CATCHING_UP --replayed--> EXACT, or what it was
    CATCHING_UP --not replayed--> APPROXIMATE --cleared, restarted, or a snapshot--> EXACT
    EXACT --a digest that does not add up--> APPROXIMATE

Sequence numbers go up by one. A gap is asked for on the replay socket; the answer are batches in
order, then an end. What the answer does not have is lost. A batch that clears everything makes
knowledge exact whatever was lost before: a restarted SGLang, a flush, our engine's snapshot in
place of batches that it does not keep any more. After a loss our engine is asked for a snapshot in
so many words: if it told something wrong, its batches would tell it again.

The digest of what was told goes with each batch of ours, so that equal means: nothing was lost, by
whatever cause. It is compared where no number is missing; heartbeats bound how late, to a second.

Restart: another epoch. Where there are no epochs: a number that is below the next and is no
repetition of a batch that came (same number, same time stamp); after a reconnection, any number but
the next.

Whoever feeds it carries out the effects in order. Work per batch is O(1) beside the digests that
our engine sends, O(hashes). At most MAX_HELD batches wait.

Not here: sockets and decoding (subscriber.py), what events mean (index/token_index.py).
"""

from __future__ import annotations

from collections import Counter, deque
from functools import reduce
from operator import xor
from typing import Final

import msgspec

from roost_router.kv.trust import Reason, Trust
from roost_wire.kv_events import (
    SNAPSHOT,
    AllBlocksCleared,
    KvEvent,
    KvEventBatch,
    Tier,
)
from roost_wire.told_load import ToldLoad

#: Batches that wait for a gap to be filled; more, and the gap is given up.
MAX_HELD: Final = 1024
#: An answer to a replay is given up when nothing of it came for so long.
REPLAY_TIMEOUT_S: Final = 2.0
MAX_REPLAY_TRIES: Final = 3
#: Between tries: this, doubled with each.
RETRY_S: Final = 0.25
#: Without heartbeats: how long a stream that spoke must be silent until it is asked whether the
#: last batches were lost.
PROBE_S: Final = 1.0
#: With heartbeats once a second: how long silence may last.
SILENCE_S: Final = 5.0
#: Between attempts to learn everything anew from an engine that sends snapshots: this, doubled
#: with each that did not help.
RESYNC_S: Final = 0.25
MAX_RESYNC_S: Final = 60.0
#: How long after a loss requests ask the engine to report the blocks that they reuse: by then
#: what was in use is known again.
RESEED_S: Final = 600.0
_NUM_REMEMBERED: Final = 256  # time stamps of the last batches, to know repetitions
_NUM_DEAD_EPOCHS: Final = 8


class Apply(msgspec.Struct, frozen=True):
    """These happened."""

    events: list[KvEvent]


class DropAll(msgspec.Struct, frozen=True):
    """Nothing that was known holds any more."""


class AskReplay(msgspec.Struct, frozen=True):
    """Ask for all batches from this number on; the answer goes to `replayed` and `replay_ended`.

    SNAPSHOT: for a snapshot, and all batches after it.

    What still comes in answer to an earlier one must not go there any more.
    """

    start: int


class TrustChanged(msgspec.Struct, frozen=True):
    """From now on."""

    trust: Trust
    reason: Reason


class LoadTold(msgspec.Struct, frozen=True):
    """The replica's load, newer than what it told before."""

    load: ToldLoad


Effect = Apply | DropAll | AskReplay | TrustChanged | LoadTold


class Feed:
    """State of one stream. All methods return effects, in order."""

    def __init__(self, *, can_replay: bool) -> None:
        """`can_replay`: whether there is a replay socket."""
        self._can_replay = can_replay
        self._effects: list[Effect] = []
        self._told = (Trust.BLIND, Reason.NOT_HEARD)
        self._next: int | None = None  # number of the batch to apply; None: not known
        self._held: dict[int, KvEventBatch | None] = {}  # beyond _next; None: could not be read
        self._must_drop = False  # before the first batch, of a snapshot at best, is applied
        self._loss: Reason | None = None  # why what was applied is not all
        self._lost_at = 0.0
        self._heard_at: float | None = None
        self._is_silent = False
        self._may_have_restarted = False
        self._epoch: int | None = None
        self._dead_epochs: deque[int] = deque(maxlen=_NUM_DEAD_EPOCHS)
        # Of the batches before _next, the last at the end; None: that batch was not read.
        self._times: deque[float | None] = deque(maxlen=_NUM_REMEMBERED)
        self._device_digest = self._host_digest = 0
        self._asked_at: float | None = None  # when an answer last came, while one is due
        self._asked_for: tuple[int | None, int | None] = (None, None)  # _next, first held
        self._is_probe = False  # the answer due is one that may well be empty
        self._num_tries = 0
        self._ask_after = 0.0
        self._has_probed = True  # since the last batch
        self._num_resyncs = 0
        self._resync_after = 0.0
        self._load_at = -1  # number of the batch that told the load last
        #: What has cost trust, how often; EXACT or not since.
        self.losses: Counter[Reason] = Counter()

    @property
    def trust(self) -> Trust:
        """As last told by an effect."""
        return self._told[0]

    @property
    def reason(self) -> Reason:
        """Why trust is not EXACT, as last told."""
        return self._told[1]

    def should_reseed(self, now: float) -> bool:
        """Whether requests should ask the engine to report the blocks that they reuse.

        Engines that tell epochs send snapshots, so they need not.
        """
        is_lossy = self._loss is not None and self._epoch is None
        return is_lossy and now - self._lost_at < RESEED_S

    # -- what happens ------------------------------------------------------------------------

    def start(self, now: float) -> list[Effect]:
        """The sockets are there. Asks for everything that is kept."""
        self._ask_if_needed(now)
        return self._take_effects()

    def receive(self, batch: KvEventBatch, now: float) -> list[Effect]:
        """A batch came, live."""
        self._hear(now)
        if batch.epoch is not None and batch.epoch in self._dead_epochs:
            return self._take_effects()
        if self._is_restart(batch):
            self._begin_anew()
        self._epoch = batch.epoch
        self._may_have_restarted = False
        if batch.load is not None and batch.sequence > self._load_at:
            self._load_at = batch.sequence  # also where batches before it are missing
            self._effects.append(LoadTold(batch.load))
        self._take(batch.sequence, batch, now)
        self._ask_if_needed(now)
        return self._take_effects()

    def undecodable(self, sequence: int, now: float) -> list[Effect]:
        """A batch of this number came that could not be read, live or replayed."""
        self._hear(now)
        self._take(sequence, None, now)
        self._ask_if_needed(now)
        return self._take_effects()

    def replayed(self, batch: KvEventBatch, now: float) -> list[Effect]:
        """A batch of an answer came."""
        self._hear(now)
        if self._asked_at is not None:
            self._asked_at = now
        if batch.epoch is not None and batch.epoch in self._dead_epochs:
            return self._take_effects()
        if self._epoch is not None and batch.epoch != self._epoch:
            self._begin_anew()  # the numbers that were asked for mean nothing to this process
            self._ask_if_needed(now)
            return self._take_effects()
        self._epoch = batch.epoch
        if self._next is None:
            self._begin(batch.sequence, batch, now)
        elif batch.sequence > self._next:
            # Answers are in order: those before it are not kept.
            self._skip_to(batch.sequence, batch, now)
        elif batch.sequence == self._next:
            self._apply(batch, now)
        self._apply_held(now)
        return self._take_effects()

    def replay_ended(self, now: float) -> list[Effect]:
        """The end of an answer came."""
        self._hear(now)
        if self._asked_at is None:
            return self._take_effects()
        self._asked_at = None
        self._num_tries = 0
        if self._next is None and not self._held:
            self._begin_empty()
        elif (self._next, self._first_held) == self._asked_for:
            self._give_up(now)
        self._ask_if_needed(now)
        return self._take_effects()

    def reconnected(self, now: float) -> list[Effect]:
        """The connection was lost and is there again; batches may be missing, or all of it new."""
        del now
        self._may_have_restarted = self._next is not None
        return self._take_effects()

    def restarted(self, now: float) -> list[Effect]:
        """Somebody else knows that the replica is a new process; engines with epochs tell."""
        if self._epoch is None:
            self._begin_anew()
            self._ask_if_needed(now)
        return self._take_effects()

    def tick(self, now: float) -> list[Effect]:
        """Time has passed; to be called a few times a second."""
        if self._asked_at is not None and now - self._asked_at >= REPLAY_TIMEOUT_S:
            self._asked_at = None
            self._num_tries += 1
            self._ask_after = now + RETRY_S * 2**self._num_tries
            if self._num_tries >= MAX_REPLAY_TRIES:
                self._num_tries = 0
                self._give_up(now)
        has_heartbeats = self._epoch is not None
        if self._heard_at is not None and has_heartbeats:
            self._is_silent = now - self._heard_at >= SILENCE_S
        self._ask_if_needed(now)
        if self._heard_at is not None and not has_heartbeats:
            self._probe(now)
        if self._loss is not None and has_heartbeats and not self._is_silent:
            self._resync(now)
        return self._take_effects()

    # -- order -------------------------------------------------------------------------------

    def _is_restart(self, batch: KvEventBatch) -> bool:
        if self._epoch is not None:
            return batch.epoch != self._epoch
        if self._next is None or batch.epoch is not None:
            return False
        if self._may_have_restarted:
            return batch.sequence != self._next
        age = self._next - batch.sequence
        if age <= 0:
            return False
        return age > len(self._times) or self._times[-age] not in (None, batch.sent_at)

    def _take(self, sequence: int, batch: KvEventBatch | None, now: float) -> None:
        """A live batch: apply it, hold it, or know it already."""
        needs_no_other = not self._can_replay or _is_fresh_start(batch)
        if self._next is None:
            if needs_no_other or sequence == 0:
                self._begin(sequence, batch, now)
            else:
                self._held[sequence] = batch
        elif sequence == self._next:
            self._apply(batch, now)
        elif sequence > self._next:
            if needs_no_other:
                self._skip_to(sequence, batch, now)
            else:
                self._held[sequence] = batch
        self._apply_held(now)
        if len(self._held) > MAX_HELD:
            self._give_up(now)

    @property
    def _first_held(self) -> int | None:
        return min(self._held, default=None)

    def _begin(self, sequence: int, batch: KvEventBatch | None, now: float) -> None:
        """The first batch that is known."""
        self._begin_empty()
        self._next = sequence
        if sequence > 0 and not _is_fresh_start(batch):
            self._lose(Reason.LATE_JOIN, now)
        self._apply(batch, now)

    def _begin_empty(self) -> None:
        """The replica is there and has told nothing yet: its cache is empty."""
        if self._must_drop:
            self._must_drop = False
            self._drop()
        self._next = 0
        self._has_probed = False

    def _skip_to(self, sequence: int, batch: KvEventBatch | None, now: float) -> None:
        """Apply this batch, and what is held before it, though others are missing."""
        if _is_fresh_start(batch):
            self._held = {number: held for number, held in self._held.items() if number > sequence}
        self._held[sequence] = batch
        for number in sorted(held for held in self._held if held <= sequence):
            assert self._next is not None
            if number > self._next:
                self._times.extend([None] * min(number - self._next, _NUM_REMEMBERED))
                self._next = number
                self._lose(Reason.GAP, now)
            self._apply(self._held.pop(number), now)

    def _give_up(self, now: float) -> None:
        """What is missing will not come."""
        self._must_drop = False
        first = self._first_held
        if first is None:
            return
        batch = self._held.pop(first)
        if self._next is None:
            self._begin(first, batch, now)
        else:
            self._skip_to(first, batch, now)
        self._apply_held(now)

    def _apply_held(self, now: float) -> None:
        if not self._held or self._next is None:
            return
        while self._next in self._held:
            self._apply(self._held.pop(self._next), now)
        for known in [sequence for sequence in self._held if sequence < self._next]:
            del self._held[known]

    def _apply(self, batch: KvEventBatch | None, now: float) -> None:
        """The batch whose turn it is."""
        assert self._next is not None
        self._next += 1
        self._has_probed = False
        if batch is None:
            self._times.append(None)
            self._lose(Reason.UNDECODABLE, now)
            return
        self._times.append(batch.sent_at)
        if self._loss is not None and _is_fresh_start(batch):
            self._loss = None
        if batch.events:
            self._effects.append(Apply(batch.events))
        if batch.device_digest is not None:
            self._check_digest(batch, now)

    def _check_digest(self, batch: KvEventBatch, now: float) -> None:
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self._device_digest = self._host_digest = 0
            elif event.tier is Tier.DEVICE:
                self._device_digest = reduce(xor, event.block_hashes, self._device_digest)
            else:
                self._host_digest = reduce(xor, event.block_hashes, self._host_digest)
        if self._loss is not None:
            return
        if (self._device_digest, self._host_digest) != (batch.device_digest, batch.host_digest):
            self._lose(Reason.DIGEST, now)
        elif not _is_fresh_start(batch):
            self._num_resyncs = 0

    def _lose(self, reason: Reason, now: float) -> None:
        """Something was not heard, and will not be."""
        if reason is not Reason.LATE_JOIN:
            self._effects.append(DropAll())  # removals may be among it
        if self._loss is not reason:
            self.losses[reason] += 1
        self._loss, self._lost_at = reason, now

    # -- epochs ------------------------------------------------------------------------------

    def _begin_anew(self) -> None:
        """The replica is another process: nothing that was known holds."""
        if self._epoch is not None:
            self._dead_epochs.append(self._epoch)
        self._epoch = None
        self._load_at = -1
        self._drop()
        self._next = None
        self._held.clear()
        self._must_drop = False
        self._asked_at = None
        self._num_tries = 0
        self._ask_after = 0.0

    def _drop(self) -> None:
        self._effects.append(DropAll())
        self._times.clear()
        self._device_digest = self._host_digest = 0
        self._loss = None

    def _resync(self, now: float) -> None:
        """Learn everything anew, from a snapshot."""
        if self._can_replay and self._asked_at is None and now >= self._resync_after:
            self._resync_after = now + min(RESYNC_S * 2**self._num_resyncs, MAX_RESYNC_S)
            self._num_resyncs += 1
            self._next = None
            self._must_drop = True
            self._ask(now)

    # -- replays -----------------------------------------------------------------------------

    def _ask_if_needed(self, now: float) -> None:
        is_needed = self._next is None or bool(self._held)
        if self._can_replay and is_needed and self._asked_at is None and now >= self._ask_after:
            self._ask(now)

    def _probe(self, now: float) -> None:
        """Ask whether the last batches before a silence were lost."""
        if (
            self._can_replay
            and not self._has_probed
            and self._asked_at is None
            and now >= self._ask_after
            and self._heard_at is not None
            and now - self._heard_at >= PROBE_S
        ):
            self._has_probed = True
            self._ask(now, is_probe=True)

    def _ask(self, now: float, *, is_probe: bool = False) -> None:
        self._asked_at = now
        self._asked_for = (self._next, self._first_held)
        self._is_probe = is_probe
        start = SNAPSHOT if self._must_drop else self._next or 0
        self._effects.append(AskReplay(start))

    # -- trust -------------------------------------------------------------------------------

    def _hear(self, now: float) -> None:
        self._heard_at = now
        self._is_silent = False

    def _take_effects(self) -> list[Effect]:
        now_told = self._assess()
        if now_told != self._told:
            self._told = now_told
            self._effects.append(TrustChanged(*now_told))
        effects, self._effects = self._effects, []
        return effects

    def _assess(self) -> tuple[Trust, Reason]:
        if self._is_silent:
            return Trust.BLIND, Reason.SILENT
        if self._next is None and not self._must_drop:
            return Trust.BLIND, Reason.NOT_HEARD
        if self._held or (self._asked_at is not None and not self._is_probe):
            return Trust.CATCHING_UP, self._loss or Reason.GAP
        if self._loss is not None:
            return Trust.APPROXIMATE, self._loss
        return Trust.EXACT, Reason.NONE


def _is_fresh_start(batch: KvEventBatch | None) -> bool:
    """Whether the batch says all there is to know, whatever came before it. O(events)."""
    return batch is not None and any(isinstance(event, AllBlocksCleared) for event in batch.events)
