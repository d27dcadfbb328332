"""Order, gaps and trust of a stream of KV events; then chaos, against what the engine has."""

from __future__ import annotations

import random
from collections import deque

import pytest

from roost_router.kv.feed import (
    MAX_HELD,
    MAX_REPLAY_TRIES,
    PROBE_S,
    REPLAY_TIMEOUT_S,
    RESEED_S,
    RETRY_S,
    SILENCE_S,
    Apply,
    AskReplay,
    DropAll,
    Feed,
    LoadTold,
    TrustChanged,
)
from roost_router.kv.trust import Reason, Trust
from roost_wire.kv_events import (
    SNAPSHOT,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEventBatch,
    Tier,
)
from roost_wire.told_load import ToldLoad

EXACT = TrustChanged(Trust.EXACT, Reason.NONE)


def stored(*hashes):
    return BlockStored(hashes, None, hashes, 1, Tier.DEVICE)


def batch(sequence, *events, sent_at=None, **fields):
    """Batch number n stores block n unless told otherwise, at second n of the engine's clock."""
    return KvEventBatch(
        sequence=sequence,
        events=list(events) or [stored(sequence)],
        sent_at=float(sequence) if sent_at is None else sent_at,
        **fields,
    )


def applied(effects):
    return [
        event.block_hashes[0]
        for effect in effects
        if isinstance(effect, Apply)
        for event in effect.events
        if isinstance(event, BlockStored)
    ]


def test_each_loss_drops_what_was_known_and_keeps_what_comes_behind_it():
    """Removals may be among what was lost, the second time as the first."""
    feed, held = Feed(can_replay=False), set()
    for sequence in (0, 2, 3, 5):
        for effect in feed.receive(batch(sequence), 0.0):
            if isinstance(effect, DropAll):
                held.clear()
            held |= set(applied([effect]))
        if sequence == 3:
            assert held == {2, 3}
    assert held == {5}
    effects = feed.undecodable(6, 0.0)
    assert DropAll() in effects
    assert DropAll() in feed.undecodable(7, 0.0)
    assert DropAll() not in feed.receive(batch(8), 0.0)


def test_who_comes_late_has_lost_nothing_yet():
    effects = Feed(can_replay=False).receive(batch(7), 0.0)
    assert TrustChanged(Trust.APPROXIMATE, Reason.LATE_JOIN) in effects
    assert DropAll() not in effects


def changes(effects):
    return [(effect.trust, effect.reason) for effect in effects if isinstance(effect, TrustChanged)]


def asked(effects):
    return [effect.start for effect in effects if isinstance(effect, AskReplay)]


def started(num_batches=0):
    """A feed that has all of the first batches, by a replay."""
    feed = Feed(can_replay=True)
    assert feed.start(0.0) == [AskReplay(0)]
    for sequence in range(num_batches):
        feed.replayed(batch(sequence), 0.0)
    feed.replay_ended(0.0)
    assert feed.trust is Trust.EXACT
    return feed


def test_a_replica_that_has_told_nothing_yet_is_known_to_be_empty():
    feed = Feed(can_replay=True)

    assert feed.start(0.0) == [AskReplay(0)]
    assert (feed.trust, feed.reason) == (Trust.BLIND, Reason.NOT_HEARD)
    assert feed.replay_ended(0.1) == [EXACT]
    assert feed.receive(batch(0), 0.2) == [Apply([stored(0)])]


def test_a_late_follower_gets_what_it_missed_before_what_it_hears():
    feed = Feed(can_replay=True)
    feed.start(0.0)

    assert feed.receive(batch(2), 0.1) == []
    assert applied(feed.replayed(batch(0), 0.2)) == [0]
    assert feed.trust is Trust.CATCHING_UP
    assert applied(feed.replayed(batch(1), 0.2)) == [1, 2]
    assert feed.replayed(batch(2), 0.2) == []
    assert feed.replay_ended(0.3) == [EXACT]


def test_a_late_follower_of_an_engine_that_keeps_too_little_knows_a_part():
    feed = Feed(can_replay=True)
    feed.start(0.0)
    feed.replayed(batch(7), 0.1)

    assert changes(feed.replay_ended(0.1)) == [(Trust.APPROXIMATE, Reason.LATE_JOIN)]
    assert feed.should_reseed(RESEED_S)
    assert not feed.should_reseed(RESEED_S + 0.2)


def test_without_replay_the_first_batch_tells_whether_we_are_late():
    punctual, late = Feed(can_replay=False), Feed(can_replay=False)

    assert punctual.start(0.0) == []
    assert punctual.receive(batch(0), 0.0) == [Apply([stored(0)]), EXACT]
    assert changes(late.receive(batch(4), 0.0)) == [(Trust.APPROXIMATE, Reason.LATE_JOIN)]


def test_a_gap_is_filled_and_later_batches_wait():
    feed = started(2)

    assert feed.receive(batch(4), 1.0) == [
        AskReplay(2),
        TrustChanged(Trust.CATCHING_UP, Reason.GAP),
    ]
    assert feed.receive(batch(5), 1.1) == []
    assert applied(feed.replayed(batch(2), 1.2)) == [2]
    assert applied(feed.replayed(batch(3), 1.2)) == [3, 4, 5]
    assert feed.replay_ended(1.3) == [EXACT]
    assert not feed.should_reseed(1.3)


def test_a_gap_without_replay_is_a_loss():
    feed = Feed(can_replay=False)
    feed.receive(batch(0), 0.0)
    effects = feed.receive(batch(2), 1.0)

    assert applied(effects) == [2]
    assert changes(effects) == [(Trust.APPROXIMATE, Reason.GAP)]
    assert applied(feed.receive(batch(3), 1.0)) == [3]


def test_what_the_answer_does_not_have_is_lost_and_the_rest_applied():
    feed = started(1)
    feed.receive(batch(3), 1.0)
    feed.receive(batch(9), 1.0)
    effects = [*feed.replayed(batch(5), 1.1), *feed.replayed(batch(6), 1.1)]

    assert applied(effects) == [3, 5, 6]
    assert asked(feed.replay_ended(1.2)) == [7]  # it may be that 7 was sent after the question
    effects = feed.replay_ended(1.3)
    assert applied(effects) == [9]
    assert changes(effects) == [(Trust.APPROXIMATE, Reason.GAP)]


def test_a_gap_that_opens_while_an_answer_comes_is_asked_for_again():
    feed = started(1)
    feed.receive(batch(2), 1.0)
    feed.replayed(batch(1), 1.1)
    feed.receive(batch(4), 1.1)

    assert asked(feed.replay_ended(1.2)) == [3]


def test_an_answer_that_does_not_come_is_asked_for_again_then_given_up():
    feed = started(1)
    now, tries = 1.0, asked(feed.receive(batch(2), 1.0))
    while feed.trust is Trust.CATCHING_UP:
        now += 0.05
        effects = feed.tick(now)
        tries += asked(effects)

    assert tries == [1] * MAX_REPLAY_TRIES
    assert applied(effects) == [2]
    assert feed.reason is Reason.GAP
    between = sum(RETRY_S * 2**number for number in range(1, MAX_REPLAY_TRIES))
    assert now == pytest.approx(1.0 + MAX_REPLAY_TRIES * REPLAY_TIMEOUT_S + between, abs=0.5)


def test_an_answer_may_take_long_while_it_comes():
    feed = started(0)
    asked_at = asked(feed.receive(batch(5), 1.0))
    for sequence in range(4):
        now = 1.0 + (sequence + 1) * (REPLAY_TIMEOUT_S - 0.01)
        feed.replayed(batch(sequence), now)
        asked_at += asked(feed.tick(now + REPLAY_TIMEOUT_S - 0.02))

    assert asked_at == [0]


def test_what_a_snapshot_voids_is_not_applied_before_it():
    feed = started(1)
    feed.receive(batch(3), 1.0)
    feed.receive(batch(6), 1.0)

    assert applied(feed.replayed(batch(5, AllBlocksCleared(), stored(77)), 1.1)) == [77, 6]
    assert feed.replay_ended(1.2) == [EXACT]


def test_more_held_batches_than_fit_end_the_wait():
    feed = started(1)
    for sequence in range(2, 2 + MAX_HELD):
        assert applied(feed.receive(batch(sequence), 1.0)) == []

    assert len(applied(feed.receive(batch(2 + MAX_HELD), 1.0))) == MAX_HELD + 1
    feed.replay_ended(1.0)
    assert feed.reason is Reason.GAP


def test_repetitions_are_ignored():
    feed = started(5)
    for sequence in (4, 0, 3):
        assert feed.receive(batch(sequence), 1.0) == []
    assert applied(feed.receive(batch(5), 1.0)) == [5]


def test_repetitions_of_batches_before_lost_ones_are_known_and_late_ones_ignored():
    feed = Feed(can_replay=False)
    for told in (batch(0), batch(1), batch(4)):
        feed.receive(told, 0.0)
    feed.undecodable(5, 0.0)

    for sequence in (0, 1, 2, 4, 5):
        assert feed.receive(batch(sequence), 1.0) == []


@pytest.mark.parametrize("sequence", [0, 1, 2])
def test_a_lower_number_at_another_time_is_another_process(sequence):
    feed = started(5)
    effects = feed.receive(batch(sequence, sent_at=100.0), 9.0)

    assert effects[0] == DropAll()
    assert applied(effects) == ([0] if sequence == 0 else [])
    assert asked(effects) == ([] if sequence == 0 else [0])
    for missing in range(sequence):
        feed.replayed(batch(missing, sent_at=99.0), 9.1)
    feed.replay_ended(9.2)
    assert feed.trust is Trust.EXACT


def test_after_a_reconnection_any_number_but_the_next_is_another_process():
    same, other = started(3), started(3)
    same.reconnected(4.0)
    other.reconnected(4.0)

    assert applied(same.receive(batch(3), 5.0)) == [3]
    assert same.receive(batch(5), 5.0)[0] == AskReplay(4)
    assert other.receive(batch(7, sent_at=50.0), 5.0)[:2] == [DropAll(), AskReplay(0)]


def test_another_epoch_voids_everything_and_the_old_one_is_not_heard_any_more():
    feed = Feed(can_replay=True)
    feed.start(0.0)
    feed.replayed(batch(0, epoch=1), 0.0)
    feed.replay_ended(0.0)
    effects = feed.receive(batch(0, epoch=2), 1.0)

    assert effects == [DropAll(), Apply([stored(0)])]
    assert feed.receive(batch(1, epoch=1), 1.0) == []
    assert feed.replayed(batch(1, epoch=1), 1.0) == []
    assert applied(feed.receive(batch(1, epoch=2), 1.0)) == [1]


def test_an_answer_of_another_process_is_asked_for_from_the_beginning():
    feed = Feed(can_replay=True)
    feed.start(0.0)
    feed.replayed(batch(0, epoch=1), 0.0)
    feed.replay_ended(0.0)
    feed.receive(batch(5, epoch=1), 1.0)
    effects = feed.replayed(batch(3, epoch=2), 1.1)

    assert effects[:2] == [DropAll(), AskReplay(0)]
    assert applied(effects) == []


@pytest.mark.parametrize("can_replay", [True, False])
def test_a_cleared_cache_is_known_exactly_whatever_was_lost(can_replay):
    feed = Feed(can_replay=can_replay)
    feed.start(0.0)
    effects = feed.receive(batch(6, AllBlocksCleared(), stored(6)), 0.0)
    feed.replay_ended(0.0)

    assert applied(effects) == [6]
    assert feed.trust is Trust.EXACT
    feed.receive(batch(9), 1.0)
    assert feed.trust is not Trust.EXACT
    feed.receive(batch(10, stored(10), AllBlocksCleared()), 1.0)
    feed.replay_ended(1.0)
    assert feed.trust is Trust.EXACT


@pytest.mark.parametrize("can_replay", [True, False])
@pytest.mark.parametrize("sequence", [0, 3])
def test_a_batch_that_cannot_be_read_is_lost_and_no_other(can_replay, sequence):
    feed = Feed(can_replay=can_replay)
    feed.start(0.0)
    heard = []
    for number in range(6):
        receive = feed.replayed if can_replay else feed.receive
        if number == sequence:
            heard += applied(feed.undecodable(number, 0.0))
        else:
            heard += applied(receive(batch(number), 0.0))
    feed.replay_ended(0.0)

    assert heard == [number for number in range(6) if number != sequence]
    assert feed.trust is Trust.APPROXIMATE


def test_engines_without_heartbeats_are_asked_once_whether_the_last_batches_were_lost():
    feed = started(2)

    assert feed.tick(PROBE_S - 0.01) == []
    assert feed.tick(PROBE_S) == [AskReplay(2)]
    assert feed.trust is Trust.EXACT
    assert applied(feed.replayed(batch(2), 1.1)) == [2]
    assert feed.replay_ended(1.1) == []
    assert asked(feed.tick(3.0)) == [3]  # that one came: there may be more
    feed.replay_ended(3.0)
    assert feed.tick(60.0) == []


def digest_of(*hashes):
    digest = 0
    for block_hash in hashes:
        digest ^= block_hash
    return {"epoch": 1, "device_digest": digest, "host_digest": 0}


def test_missing_heartbeats_make_blind_until_the_next():
    feed = Feed(can_replay=True)
    feed.start(0.0)
    feed.replayed(batch(0, **digest_of(0)), 0.0)
    feed.replay_ended(0.0)

    assert feed.tick(SILENCE_S - 0.01) == []
    assert feed.tick(SILENCE_S) == [TrustChanged(Trust.BLIND, Reason.SILENT)]
    assert feed.receive(batch(1, **digest_of(0, 1)), 9.0) == [Apply([stored(1)]), EXACT]


def test_a_digest_that_does_not_add_up_makes_it_learn_everything_anew():
    feed = Feed(can_replay=True)
    feed.start(0.0)
    feed.replayed(batch(0, stored(8, 4), **digest_of(8, 4)), 0.0)
    feed.replay_ended(0.0)
    feed.receive(batch(1, BlockRemoved((8,), Tier.DEVICE), **digest_of(4)), 0.1)
    assert feed.trust is Trust.EXACT

    assert changes(feed.receive(batch(2, stored(9), **digest_of(4, 9, 77)), 0.2)) == [
        (Trust.APPROXIMATE, Reason.DIGEST)
    ]
    assert asked(feed.tick(0.5)) == [SNAPSHOT]  # its batches would tell the same again
    effects = feed.replayed(
        batch(2, AllBlocksCleared(), stored(4, 9, 77), **digest_of(4, 9, 77)), 0.6
    )
    assert effects[0] == DropAll()
    assert changes(feed.replay_ended(0.6)) == [(Trust.EXACT, Reason.NONE)]


def test_a_snapshot_whose_answer_is_lost_is_asked_for_again():
    feed = Feed(can_replay=True)
    feed.start(0.0)
    feed.replay_ended(0.0)
    feed.receive(batch(0, stored(9), **digest_of(7)), 0.1)
    now, tries = 0.2, asked(feed.tick(0.2))
    while len(tries) < 3:
        now += 0.05
        tries += asked(feed.tick(now))

    assert tries == [SNAPSHOT] * 3


def test_losses_are_counted_by_reason_once_each_and_what_is_mended_is_not_forgotten():
    feed = Feed(can_replay=True)
    feed.start(0.0)
    feed.replayed(batch(0, stored(8), **digest_of(8)), 0.0)
    feed.replay_ended(0.0)
    feed.receive(batch(1, stored(9), **digest_of(8, 9, 77)), 0.2)
    feed.receive(batch(2, stored(10), **digest_of(8, 9, 10, 77)), 0.2)
    feed.tick(0.5)
    snapshot = (AllBlocksCleared(), stored(8, 9, 10, 77))
    feed.replayed(batch(2, *snapshot, **digest_of(8, 9, 10, 77)), 0.6)
    feed.replay_ended(0.6)

    assert feed.trust is Trust.EXACT
    assert feed.losses == {Reason.DIGEST: 1}


def loads(effects):
    return [effect.load.num_running for effect in effects if isinstance(effect, LoadTold)]


def load(num_running):
    return {"load": ToldLoad(num_running, 0, 0, 64, 0)}


def test_the_newest_load_is_told_on_at_once_and_an_older_one_never():
    feed = Feed(can_replay=True)
    feed.start(0.0)
    told = [
        (feed.replayed, 0, 1),  # of an answer: it was so once
        (feed.receive, 3, 2),  # those before it are missing
        (feed.receive, 2, 3),
        (feed.receive, 3, 4),
        (feed.receive, 4, 5),
    ]
    heard = [
        loads(hear(batch(sequence, epoch=1, **load(num_running)), 0.0))
        for hear, sequence, num_running in told
    ]

    assert heard == [[], [2], [], [], [5]]
    assert loads(feed.receive(batch(0, epoch=2, **load(6)), 1.0)) == [6]  # another process
    assert loads(feed.receive(batch(5, epoch=1, **load(7)), 1.0)) == []


@pytest.mark.parametrize("digest", [1, 5])
def test_learning_anew_is_tried_ever_less_often_where_it_does_not_help(digest):
    """Whether the snapshot or what comes after it does not add up."""
    feed = Feed(can_replay=True)
    feed.start(0.0)
    tries, now, sequence = 0, 0.0, 0
    while now < 300.0:
        now += 0.1
        sequence += 1
        feed.receive(batch(sequence, stored(7), **digest_of(2)), now)
        if asked(feed.tick(now)):
            tries += 1
            snapshot = (AllBlocksCleared(), stored(1))
            feed.replayed(batch(sequence, *snapshot, **digest_of(digest)), now)
            feed.replay_ended(now)

    assert 8 <= tries <= 16


# -- chaos -----------------------------------------------------------------------------------


class Engine:
    """An engine's events, and what it has after each batch."""

    def __init__(self, rng, keeps, *, is_ours):
        self.rng, self.is_ours = rng, is_ours
        self.kept = deque(maxlen=keeps)
        self.start(0.0)

    def start(self, now):
        self.epoch = self.rng.getrandbits(62) if self.is_ours else None
        self.resident, self.next, self.history = set(), 0, {}
        self.kept.clear()

    def step(self, now):
        events = []
        for _ in range(self.rng.randint(0 if self.is_ours else 1, 3)):
            if self.rng.random() < 0.6:
                new = self.rng.getrandbits(40)
                self.resident.add(new)
                events.append(stored(new))
            elif self.rng.random() < 0.02:
                self.resident.clear()
                events.append(AllBlocksCleared())
            elif self.resident:
                old = self.rng.choice(sorted(self.resident))
                self.resident.remove(old)
                events.append(BlockRemoved((old,), Tier.DEVICE))
        told = self.batch(self.next, events, now)
        self.history[self.next] = set(self.resident)
        self.kept.append(told)
        self.next += 1
        return told

    def batch(self, sequence, events, now):
        state = digest_of(*self.resident) | {"epoch": self.epoch} if self.is_ours else {}
        return KvEventBatch(sequence=sequence, events=events, sent_at=now, **state)

    def replay(self, start, now):
        oldest = self.next - len(self.kept)
        if self.is_ours and (start < oldest or start == SNAPSHOT):
            clear = [AllBlocksCleared(), *(stored(name) for name in self.resident)]
            return [self.batch(self.next - 1, clear, now)]
        return [told for told in self.kept if told.sequence >= start]


class Follower:
    """Carries out a feed's effects: answers come later, or not at all."""

    def __init__(self, engine):
        self.engine = engine
        self.feed = Feed(can_replay=True)
        self.sink = set()
        self.answer = deque()

    def carry_out(self, effects, now):
        for effect in effects:
            match effect:
                case Apply(events):
                    for event in events:
                        match event:
                            case AllBlocksCleared():
                                self.sink.clear()
                            case BlockRemoved():
                                self.sink.difference_update(event.block_hashes)
                            case BlockStored():
                                self.sink.update(event.block_hashes)
                case DropAll():
                    self.sink.clear()
                case AskReplay(start):
                    self.answer = deque([*self.engine.replay(start, now), None])
        feed, engine = self.feed, self.engine
        if feed.trust is Trust.EXACT and engine.is_ours and feed._epoch == engine.epoch:
            assert self.sink == engine.history.get(feed._next - 1, set())

    def hear_answer(self, now, num_batches):
        for _ in range(min(num_batches, len(self.answer))):
            told = self.answer.popleft()
            if told is None:
                self.carry_out(self.feed.replay_ended(now), now)
            else:
                self.carry_out(self.feed.replayed(told, now), now)


@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_chaos_ends_in_what_the_engine_has(seed, is_ours):
    """Dropped, repeated, reordered batches, lost answers, restarts, late join; then none of it.

    An engine with epochs, digests and snapshots keeps few batches and says nothing of restarts
    but by its epoch. Others keep all, and a restart breaks the connection.
    """
    rng = random.Random(seed)
    engine = Engine(rng, keeps=8 if is_ours else 10_000, is_ours=is_ours)
    now = 0.0
    for _ in range(rng.randint(0, 30)):
        now += 0.05
        engine.step(now)
    follower = Follower(engine)
    follower.carry_out(follower.feed.start(now), now)
    line = []
    while now < 20.0:
        now += 0.05
        is_faulty = now < 12.0
        if is_faulty and rng.random() < 0.02:
            engine.start(now)
            if not is_ours:
                line.clear()
                follower.answer.clear()
                follower.carry_out(follower.feed.reconnected(now), now)
        if is_faulty or (is_ours and rng.random() < 0.1):
            line.append(engine.step(now))
        if is_faulty:
            line = [told for told in line if rng.random() > 0.1]
            line += [told for told in line if rng.random() < 0.1]
            if rng.random() < 0.1:
                rng.shuffle(line)
            if rng.random() < 0.05:
                follower.answer.clear()
        for _ in range(rng.randint(0, 2) if is_faulty else len(line)):
            if line:
                follower.carry_out(follower.feed.receive(line.pop(0), now), now)
        follower.hear_answer(now, rng.randint(0, 5) if is_faulty else 1000)
        follower.carry_out(follower.feed.tick(now), now)

    assert follower.feed.trust is Trust.EXACT
    assert follower.sink == engine.resident
