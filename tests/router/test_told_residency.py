"""What KV events tell counts for more than what was placed, as far as they can be relied upon."""

from __future__ import annotations

from random import Random

import pytest
from bound_prompts import SIZE, learn, stored, tokens_of

from roost_router.fleet.fleet import Fleet
from roost_router.index.prefix_index import PrefixIndex
from roost_router.index.token_knowledge import TokenKnowledge
from roost_router.kv.token_sink import TokenSink
from roost_router.kv.trust import Reason, Trust
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placer
from roost_router.policy.cost import CostPolicy
from roost_router.policy.interface import Candidate
from roost_router.tokens.drift import DriftChange
from roost_router.told_residency import NEWS_S, ToldResidency
from roost_wire.kv_events import AllBlocksCleared, BlockRemoved, Tier
from roost_wire.load_report import LoadReport
from roost_wire.token_chain import block_hashes

TOKENS = 1280
PROMPT = Random(1).randbytes(4 * TOKENS)


class Bench:
    """A placer over replicas whose events we tell."""

    def __init__(self, num_replicas: int = 2, index_bytes: int = 1 << 24) -> None:
        index = PrefixIndex()
        self.changes: list[DriftChange] = []
        self.knowledge = TokenKnowledge(index_bytes, 1 << 24)
        self.told = ToldResidency(self.knowledge, ["m"], self.changes.append)
        self.fleet = Fleet(index, [f"http://127.0.0.1:{8101 + n}" for n in range(num_replicas)])
        for replica in self.fleet.replicas:
            self.fleet.answered(replica, ["m", "other"], LoadReport(), "roost")
        self.sinks = [self.told.sink(replica, 0) for replica in self.fleet.replicas]
        self.placer = Placer(index, self.fleet, CostPolicy, Random(0), self.told)
        for sink in self.sinks:
            sink.trust_changed(Trust.EXACT, Reason.NONE)

    def tell(self, number: int, prompt: bytes, num_blocks: int) -> None:
        self.sinks[number].apply([stored(prompt, num_blocks)])

    def bound(self, prompt: bytes = PROMPT) -> None:
        learn(self.knowledge, ask(prompt).prompt)

    def matched(self, now: float = 100.0, prompt: bytes = PROMPT) -> list[int]:
        return [seen.matched_tokens for seen in self.candidates(now, prompt)]

    def candidates(self, now: float = 100.0, prompt: bytes = PROMPT) -> list[Candidate]:
        return self.placer.weigh(ask(prompt), now).candidates

    def run(self, now: float, prompt: bytes = PROMPT) -> str:
        """Place, answer and finish one; where it went."""
        placement = self.placer.place(ask(prompt), now)
        self.placer.first_byte(placement, now + 0.1, streamed=True)
        self.placer.finish(placement, now + 0.2, 9)
        return placement.replica.name


def ask(prompt: bytes, model: str = "m") -> RoutingFields:
    return RoutingFields(model, stream=True, prompt=prompt)


def test_what_is_told_is_known_to_the_block_and_shown_as_told():
    bench = Bench()
    bench.tell(0, PROMPT, 7)
    bench.tell(1, PROMPT, 40)
    before = bench.candidates()
    bench.bound()

    assert [seen.is_told for seen in before] == [False, False]
    assert [seen.is_told for seen in bench.candidates()] == [True, True]
    assert bench.matched() == [7 * SIZE, 40 * SIZE]
    assert bench.placer.place(ask(PROMPT), 100.0).replica.name == "r1"


def test_what_was_evicted_behind_our_back_is_not_expected():
    bench = Bench()
    home = bench.run(0.0)
    number = int(home[1])
    bench.tell(number, PROMPT, TOKENS // SIZE)
    bench.bound()
    assert bench.matched()[number] >= TOKENS - SIZE
    chain = block_hashes(tokens_of(PROMPT), SIZE)
    bench.sinks[number].apply([BlockRemoved(tuple(chain[5:]), Tier.DEVICE)])

    assert bench.matched()[number] == 5 * SIZE

    bench.sinks[number].apply([AllBlocksCleared()])
    assert bench.matched() == [0, 0]


def test_what_is_being_computed_is_expected_though_no_event_told_of_it():
    bench = Bench()
    bench.tell(0, Random(2).randbytes(4096), 8)  # the sizes of blocks are known
    bench.tell(1, Random(3).randbytes(4096), 8)
    bench.bound()
    assert bench.matched(0.0) == [0, 0]

    placement = bench.placer.place(ask(PROMPT), 0.0)
    number = int(placement.replica.name[1])
    assert bench.matched(3.0)[number] >= TOKENS - 2 * SIZE
    assert bench.matched(3.0)[1 - number] == 0

    bench.placer.first_byte(placement, 4.0, streamed=True)
    assert bench.matched(4.0)[number] >= TOKENS - 2 * SIZE
    # Its blocks should have been told of by now.
    assert bench.matched(4.0 + 2 * NEWS_S)[number] == 0


def test_beyond_what_is_bound_our_own_placements_count():
    bench = Bench()
    longer = PROMPT + Random(4).randbytes(4096)
    home = int(bench.run(0.0, longer)[1])
    bench.tell(home, longer, len(longer) // 4 // SIZE)
    bench.bound(PROMPT)

    matched = bench.matched(100.0, longer)

    assert matched[home] > TOKENS + 512
    assert matched[1 - home] == 0


@pytest.mark.parametrize("trust", [Trust.BLIND, Trust.CATCHING_UP])
def test_a_stream_that_is_not_exact_does_not_count(trust):
    bench = Bench()
    bench.tell(0, PROMPT, 7)
    bench.tell(1, PROMPT, 7)
    bench.bound()

    bench.sinks[0].trust_changed(trust, Reason.GAP)

    assert [seen.is_told for seen in bench.candidates()] == [False, True]
    assert not bench.told.is_relied_upon("m", "r0")
    assert bench.told.is_relied_upon("m", "r1")


def test_a_stream_that_was_joined_late_tells_what_is_held_at_least():
    bench = Bench()
    home = int(bench.run(0.0)[1])
    bench.sinks[home].trust_changed(Trust.APPROXIMATE, Reason.LATE_JOIN)
    bench.tell(home, PROMPT, 7)
    bench.bound()

    mine = bench.candidates()[home]
    assert not mine.is_told  # what was placed there is far more
    assert mine.matched_tokens >= TOKENS - SIZE
    replica = bench.fleet.replicas[home]
    bench.placer.index.retire(replica.holder)
    replica.holder = bench.placer.index.open_holder(1 << 20)

    mine, other = bench.candidates()[home], bench.candidates()[1 - home]
    assert (mine.matched_tokens, mine.is_told) == (7 * SIZE, True)
    assert (other.matched_tokens, other.is_told) == (0, False)


@pytest.mark.parametrize("reason", [Reason.GAP, Reason.UNDECODABLE, Reason.DIGEST])
def test_where_events_were_lost_only_what_is_told_since_counts(reason):
    bench = Bench()
    bench.tell(0, PROMPT, 7)
    bench.bound()

    bench.sinks[0].drop_all()
    bench.sinks[0].trust_changed(Trust.APPROXIMATE, reason)
    assert bench.matched() == [0, 0]
    bench.tell(0, PROMPT, 4)
    bench.sinks[0].trust_changed(Trust.APPROXIMATE, reason)  # again the same: nothing was lost

    assert bench.matched() == [4 * SIZE, 0]


def test_an_index_that_is_full_tells_what_is_held_at_least():
    bench = Bench(index_bytes=120_000)
    bench.tell(0, PROMPT, 7)
    bench.bound()
    placement = bench.placer.place(ask(PROMPT), 0.0)
    assert placement.replica.name == "r0"
    bench.placer.first_byte(placement, 0.1, streamed=True)
    assert bench.matched()[0] == 7 * SIZE
    for seed in range(300):
        bench.tell(0, Random(seed).randbytes(4096), 16)

    assert bench.sinks[0].trust is Trust.APPROXIMATE
    assert bench.matched()[0] >= TOKENS - SIZE  # as it was placed there
    assert not bench.candidates()[0].is_told


def test_while_reuse_is_reported_it_is_not_taken_for_copies():
    bench = Bench()
    bench.fleet.replicas[0].dialect = "vllm"
    sink = bench.told.sink(bench.fleet.replicas[0], 0)
    sink.trust_changed(Trust.EXACT, Reason.NONE)
    removed = BlockRemoved(stored(PROMPT, 3).block_hashes, Tier.DEVICE)
    sink.apply([stored(PROMPT, 3)])
    bench.bound()
    bench.told.report_reuse("r0", is_asked=True)
    sink.apply([stored(PROMPT, 3), removed])
    assert bench.matched()[0] == 0

    sink.drop_all()  # and so it stays for the next one
    sink.apply([stored(PROMPT, 3), stored(PROMPT, 3), removed])
    assert bench.matched()[0] == 0

    bench.told.report_reuse("r0", is_asked=False)
    sink.apply([stored(PROMPT, 3), stored(PROMPT, 3), removed])
    assert bench.matched()[0] == 3 * SIZE


def test_a_replica_that_began_anew_holds_nothing():
    bench = Bench()
    bench.tell(0, PROMPT, 7)
    bench.bound()

    bench.sinks[0].drop_all()
    bench.tell(0, Random(5).randbytes(4096), 7)

    assert bench.matched()[0] == 0
    assert bench.candidates()[0].is_told


def test_of_several_ranks_the_one_that_holds_most_counts():
    bench = Bench()
    second = bench.told.sink(bench.fleet.replicas[0], 1)
    second.trust_changed(Trust.EXACT, Reason.NONE)
    bench.tell(0, PROMPT, 7)
    second.apply([stored(PROMPT, 12)])
    bench.bound()

    assert bench.matched()[0] == 12 * SIZE


def test_a_stream_that_is_found_anew_forgets_what_the_old_one_told():
    bench = Bench()
    bench.tell(0, PROMPT, 7)
    bench.bound()

    anew = bench.told.sink(bench.fleet.replicas[0], 0)
    anew.trust_changed(Trust.EXACT, Reason.NONE)
    anew.apply([stored(PROMPT, 3)])

    assert isinstance(anew, TokenSink)
    assert bench.matched()[0] == 3 * SIZE


def test_models_without_a_tokenizer_go_by_placements():
    bench = Bench()
    bench.tell(0, PROMPT, 7)
    bench.bound()

    options = bench.placer.weigh(ask(PROMPT, "other"), 0.0)

    assert not any(seen.is_told for seen in options.candidates)
    assert not bench.told.knows("other")


def drift(bench: Bench, counted: int, num_prompts: int = 16) -> None:
    for number in range(num_prompts):
        fields = ask(PROMPT)
        placement = bench.placer.place(fields, float(number))
        fields.counted_tokens = counted
        bench.placer.learn(placement, TOKENS, 0)
        bench.placer.finish(placement, float(number))


def test_a_replica_that_counts_tokens_differently_is_not_relied_upon_until_it_starts_anew():
    bench = Bench(1)
    bench.tell(0, PROMPT, 7)
    bench.bound()
    drift(bench, TOKENS)
    assert bench.candidates()[0].is_told
    assert bench.changes == []

    drift(bench, TOKENS - 3)

    assert not bench.candidates()[0].is_told
    assert [change.is_drifting for change in bench.changes] == [True]
    assert bench.told.drifting() == [("m", "r0")]
    (replica,) = bench.fleet.replicas
    replica.started_at = 12.0
    drift(bench, TOKENS)
    assert bench.told.drifting() == []
    assert bench.candidates()[0].is_told


def test_a_share_that_caches_keep_is_not_learnt_from_what_was_told():
    bench = Bench(1)
    bench.tell(0, PROMPT, TOKENS // SIZE)
    bench.bound()
    (replica,) = bench.fleet.replicas

    placement = bench.placer.place(ask(PROMPT), 0.0)
    assert placement.was_told
    bench.placer.learn(placement, TOKENS, 0)

    assert replica.kept.share == 1.0
