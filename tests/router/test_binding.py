"""Text blocks bound to token blocks: exact up to the bound depth, and bounded."""

from __future__ import annotations

import tracemalloc
from array import array
from random import Random

import pytest
from bound_prompts import SIZE, certain, learn, stored, tokens_of

from roost_router.index.binding import Binding
from roost_router.index.text_chain import text_chain
from roost_router.index.token_index import TokenIndex
from roost_router.index.token_knowledge import Known, TokenKnowledge
from roost_wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Tier
from roost_wire.token_chain import block_hashes


class Prompts:
    """Prompts that share beginnings."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.known = [self.rng.randbytes(400)]

    def next(self) -> bytes:
        base = self.rng.choice(self.known)
        kept = base[: self.rng.randrange(len(base) + 1)]
        prompt = kept + self.rng.randbytes(self.rng.randrange(1, 9000))
        self.known.append(prompt)
        return prompt


@pytest.mark.parametrize("behind", [0, 1, 70, 300])
@pytest.mark.parametrize("removes", [False, True])
def test_matched_tokens_are_exact_up_to_the_bound_depth(behind, removes):
    prompts, binding, index = Prompts(behind), Binding(SIZE, 1 << 24), TokenIndex(1 << 24)
    rng = prompts.rng
    holders = [index.open_holder(hashes_are_chain=True) for _ in range(5)]
    held: dict[int, set[int]] = {holder: set() for holder in holders}
    bound: set[int] = set()
    for _ in range(80):
        prompt = prompts.next()
        chain, blocks = text_chain(prompt), array("Q", block_hashes(tokens_of(prompt), SIZE))
        for holder in holders:
            num_stored = rng.randrange(len(blocks) + 1)
            if num_stored and rng.random() < 0.3:
                index.apply(holder, stored(prompt, num_stored))
                held[holder].update(blocks[:num_stored])
            if removes and blocks and rng.random() < 0.3:  # somewhere, maybe in the middle
                some = tuple(set(rng.choices(blocks, k=2)))
                index.apply(holder, BlockRemoved(some, Tier.DEVICE))
                held[holder].difference_update(some)

        found = binding.lookup(index, chain, 0b11111)

        num_bound = sum(1 for text in chain if text in bound)
        known = certain(prompt, behind=behind)[num_bound - 1] // SIZE if num_bound else 0
        expected = {}
        for holder in holders:
            missing = [block not in held[holder] for block in blocks[:known]]
            matched = missing.index(True) if True in missing else known
            if matched:
                expected[holder] = matched * SIZE
        assert num_bound == binding.num_bound(chain)
        assert found.bound_tokens == known * SIZE
        assert expected == by_holder(found.levels)
        if rng.random() < 0.7:
            binding.bind(chain, blocks, certain(prompt, behind=behind))
            bound.update(chain)


def by_holder(levels: list[tuple[int, int]]) -> dict[int, int]:
    found: dict[int, int] = {}
    for matched, mask in levels:
        for holder in range(mask.bit_length()):
            if mask >> holder & 1:
                assert holder not in found
                found[holder] = matched
    return found


def bind(binding: Binding, prompt: bytes) -> None:
    chain = array("Q", block_hashes(tokens_of(prompt), SIZE))
    binding.bind(text_chain(prompt), chain, certain(prompt))


def test_a_prompt_that_is_bound_twice_takes_no_more_memory():
    binding, prompt = Binding(SIZE, 1 << 20), Random(1).randbytes(5000)
    bind(binding, prompt)
    before = binding.num_bytes, len(binding)

    for _ in range(100):
        bind(binding, prompt)

    assert (binding.num_bytes, len(binding)) == before


def test_the_cap_holds_and_what_was_touched_last_stays():
    binding, rng = Binding(SIZE, 600_000), Random(2)
    kept = rng.randbytes(6000)
    bind(binding, kept)
    prompts = [rng.randbytes(6000) for _ in range(400)]
    for prompt in prompts:
        bind(binding, prompt)
        binding.touch(text_chain(kept))
        assert binding.num_bytes <= 600_000

    chain = text_chain(kept)
    assert binding.num_bound(chain) == len(chain)
    assert binding.num_bound(text_chain(prompts[-1])) == len(text_chain(prompts[-1]))
    assert binding.num_bound(text_chain(prompts[0])) == 0
    assert binding.num_bytes >= 200_000


def test_a_prompt_that_would_take_all_memory_is_not_bound():
    binding = Binding(SIZE, 20_000)
    bind(binding, Random(3).randbytes(30_000))

    assert len(binding) == 0


@pytest.mark.interpreted
def test_memory_is_counted():
    rng = Random(4)
    prompts = [rng.randbytes(6000) for _ in range(60)]
    tracemalloc.start()
    try:
        binding = Binding(SIZE, 1 << 24)
        for prompt in prompts:
            bind(binding, prompt)
        traced = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()

    assert 0.85 * binding.num_bytes <= traced <= 1.01 * binding.num_bytes


def test_bound_prompts_are_closed_under_prefixes_whatever_is_dropped():
    prompts, binding = Prompts(5), Binding(SIZE, 150_000)
    for _ in range(300):
        bind(binding, prompts.next())
        for prompt in prompts.known[-20:]:
            there = [binding.get(text) is not None for text in text_chain(prompt)]
            assert there == sorted(there, reverse=True)


def test_a_smaller_cap_holds_at_once():
    binding, rng = Binding(SIZE, 1 << 22), Random(6)
    for _ in range(100):
        bind(binding, rng.randbytes(6000))

    binding.set_cap(50_000)

    assert binding.num_bytes <= 50_000


# token knowledge


def test_replicas_of_two_block_sizes_are_asked_each_in_its_own():
    knowledge, prompt = TokenKnowledge(1 << 24, 1 << 24), Random(7).randbytes(8192)
    index, chain = knowledge.index, text_chain(prompt)
    small, large, silent = (index.open_holder(hashes_are_chain=True) for _ in range(3))
    index.apply(small, stored(prompt, 3, 16))
    index.apply(large, stored(prompt, 2, 64))

    wanted = knowledge.wants_tokens(chain)
    before = knowledge.lookup(chain, 0b111)
    learn(knowledge, prompt)

    assert wanted
    assert before == {}
    assert not knowledge.wants_tokens(chain)
    assert knowledge.lookup(chain, 0b111) == {small: Known(48, 2048), large: Known(128, 2048)}
    assert knowledge.lookup(chain, 1 << silent) == {}


def test_those_who_hold_nothing_of_a_bound_prompt_are_known_to():
    knowledge, prompt = TokenKnowledge(1 << 24, 1 << 24), Random(8).randbytes(2048)
    holder = knowledge.index.open_holder()
    knowledge.index.apply(holder, stored(Random(9).randbytes(2048), 2))
    learn(knowledge, prompt)

    assert knowledge.lookup(text_chain(prompt), 1) == {holder: Known(0, 512)}


def test_nothing_is_tokenised_while_no_replica_tells_of_blocks():
    knowledge = TokenKnowledge(1 << 24, 1 << 24)
    knowledge.index.open_holder()

    assert not knowledge.wants_tokens(text_chain(bytes(4096)))


def test_what_is_bound_stays_where_all_replicas_begin_anew():
    """Until they tell of a block their block sizes are not known; text and tokens are as before."""
    knowledge, prompt = TokenKnowledge(1 << 24, 1 << 24), Random(11).randbytes(2048)
    holder = knowledge.index.open_holder()
    knowledge.index.apply(holder, stored(prompt, 2))
    learn(knowledge, prompt)

    knowledge.index.retire(holder)
    knowledge.bind(text_chain(bytes(4096)), {}, [])
    anew = knowledge.index.open_holder()
    knowledge.index.apply(anew, stored(prompt, 2))

    assert not knowledge.wants_tokens(text_chain(prompt))


def test_of_many_block_sizes_the_first_are_bound_and_memory_is_shared():
    knowledge, rng = TokenKnowledge(1 << 24, 1 << 20), Random(10)
    prompts = [rng.randbytes(8192) for _ in range(300)]
    for size in (16, 32, 48, 64, 80):
        holder = knowledge.index.open_holder()
        knowledge.index.apply(holder, stored(prompts[0], 1, size))
    for prompt in prompts:
        learn(knowledge, prompt)

    found = knowledge.lookup(text_chain(prompts[-1]), 0b11111)
    assert found == {
        holder: Known(0, 2048 // size * size) for holder, size in enumerate((16, 32, 48, 64))
    }
    assert not knowledge.wants_tokens(text_chain(prompts[-1]))
    assert knowledge.num_bytes - knowledge.index.num_bytes <= 1 << 20

    knowledge.index.retire(0)
    assert knowledge.wants_tokens(text_chain(prompts[-1]))


def test_adapter_and_salt_are_part_of_what_a_prompt_is_bound_to():
    knowledge, prompt = TokenKnowledge(1 << 24, 1 << 24), Random(11).randbytes(2048)
    plain, adapted = knowledge.index.open_holder(), knowledge.index.open_holder()
    tokens = tuple(tokens_of(prompt)[:32])
    for holder, lora in ((plain, None), (adapted, "a")):
        event = BlockStored((1, 2), None, tokens, SIZE, Tier.DEVICE, lora_name=lora)
        knowledge.index.apply(holder, event)

    learn(knowledge, prompt, adapter="a")

    assert knowledge.lookup(text_chain(prompt), 0b11) == {
        plain: Known(0, 512),
        adapted: Known(32, 512),
    }


def test_events_after_binding_are_seen_at_once():
    knowledge, prompt = TokenKnowledge(1 << 24, 1 << 24), Random(12).randbytes(2048)
    holder = knowledge.index.open_holder(hashes_are_chain=True)
    event = stored(prompt, 32)
    knowledge.index.apply(holder, event)
    learn(knowledge, prompt)
    chain = text_chain(prompt)

    seen = [knowledge.lookup(chain, 1)[holder].matched_tokens]
    knowledge.index.apply(holder, BlockRemoved(event.block_hashes[20:][::-1], Tier.DEVICE))
    seen.append(knowledge.lookup(chain, 1)[holder].matched_tokens)
    knowledge.index.apply(holder, AllBlocksCleared())
    seen.append(knowledge.lookup(chain, 1)[holder].matched_tokens)

    assert seen == [512, 320, 0]
