"""The index's scripts on real servers against their Python twins: replies and all that is kept."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import ResponseError
from redis_twins import NUM_BUCKETS, HolderTwin, IndexTwin, pack, text

from roost_loadtest.redis_servers import VERSIONS, RedisServer
from roost_router.store import scripts
from roost_router.store.masks import depth_classes
from roost_router.store.scripts import Script

pytestmark = pytest.mark.e2e

PREFIX = b"roost:{1a2b3c4d}:"
TABLE = PREFIX + b"holders"
TTL_S = 86_400
PACKED = {b"ziplist", b"listpack"}


@pytest.fixture(scope="module", params=VERSIONS)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param, unix_socket=True) as running:
        yield running


class Both:
    """An index in Redis and its twin: each call goes to both, and both must say the same."""

    def __init__(self, server: RedisServer) -> None:
        self.redis = server.client
        self.redis.flushall()
        self.twin = IndexTwin()
        self.writers: list[tuple[int, int, int]] = []  # number, serial, fence of all ever opened

    def call(self, script: Script, *args: object) -> Any:
        return call(self.redis, script, *args)

    def open_holder(
        self, replica: bytes, tier: bytes, epoch: int, fence: int, anew: bool = False
    ) -> list[Any]:
        reply = self.call(scripts.OPEN_HOLDER, replica, tier, epoch, fence, int(anew), TTL_S)
        self.twin.now_us = self._version() or 0
        assert reply == self.twin.open_holder(replica, tier, epoch, fence, anew)
        if reply[0] == b"OK":
            self.writers.append((reply[1], int(reply[2]), fence))
        return reply

    def retire_holder(self, number: int, serial: int, fence: int) -> Any:
        reply = self.call(scripts.RETIRE_HOLDER, number, serial, fence)
        self.twin.now_us = self._version() or 0
        assert reply == self.twin.retire_holder(number, serial, fence)
        return reply

    def add(
        self, writer: tuple[int, int, int], ids: list[bytes], depth: int = 0, most: int = 480
    ) -> Any:
        depths = range(depth, depth + len(ids))
        return self.add_each(writer, ids, depths, most)

    def add_each(
        self,
        writer: tuple[int, int, int],
        ids: list[bytes],
        depths: Sequence[int],
        most: int = 480,
    ) -> Any:
        classes = depth_classes(depths)
        reply = self.call(scripts.ADD, *writer, TTL_S, most, classes, b"".join(ids))
        assert reply == self.twin.add(*writer, most, depths, ids)
        return reply

    def remove(self, writer: tuple[int, int, int], ids: list[bytes]) -> Any:
        reply = self.call(scripts.REMOVE, *writer, TTL_S, b"".join(ids))
        assert reply == self.twin.remove(*writer, ids)
        return reply

    def lookup(self, ids: list[bytes], most: int = 192) -> Any:
        reply = self.call(scripts.LOOKUP, b"".join(ids), most)
        assert reply == self.twin.lookup(ids, most)
        return reply

    def sweep(self, most_buckets: int = NUM_BUCKETS, most_blocks: int = 1 << 40) -> Any:
        reply = self.call(scripts.SWEEP, most_buckets, most_blocks, TTL_S)
        self.twin.now_us = self._version() or 0
        assert reply == self.twin.sweep(most_buckets, most_blocks)
        return reply

    def list_holders(self) -> None:
        ours, theirs = self.call(scripts.LIST_HOLDERS), self.twin.list_holders()
        assert listed(ours) == listed(theirs)

    def age(self, number: int) -> None:
        """Let a day pass in which nobody wrote for this holder."""
        if number in self.twin.holders:
            self.redis.hset(TABLE, f"s{number}", 1)
            self.twin.old.add(number)

    def poison(self, key: int, field: bytes | None, value: bytes) -> None:
        """Write into a bucket what no script writes; a key of a wrong type where field is None."""
        if not self.twin.generation:
            return
        name = self._bucket(key)
        if field is None:
            self.redis.set(name, value)
            self.redis.expire(name, TTL_S)
            self.twin.buckets[key] = None
        elif (bucket := self.twin.buckets.setdefault(key, {})) is not None:
            self.redis.hset(name, field, value)
            self.redis.expire(name, TTL_S)
            bucket[field] = value

    def check(self) -> None:
        """All that lies in Redis is what the twin says, and every key will vanish one day."""
        expected_keys = {self._bucket(key) for key in self.twin.buckets}
        if self.twin.at is not None:
            expected_keys.add(TABLE)
        assert set(self.redis.keys()) == expected_keys
        assert all(0 < self.redis.ttl(key) <= 2 * TTL_S for key in expected_keys)
        for key, bucket in self.twin.buckets.items():
            if bucket is not None:
                assert list(self.redis.hgetall(self._bucket(key)).items()) == list(bucket.items())
        if self.twin.at is not None:
            self._check_table()

    def _check_table(self) -> None:
        table = self.redis.hgetall(TABLE)
        for name in (b"live", b"dead", b"going"):
            mask = int.from_bytes(table.pop(name, b""), "little")
            assert mask == getattr(self.twin, name.decode())
        assert int(table.pop(b"cursor", b"0")) == self.twin.cursor
        expected = {b"at": text(self.twin.at or 0), b"gen": self.twin.generation}
        for number, holder in self.twin.holders.items():
            seen = int(table.pop(b"s%d" % number))
            assert (seen == 1) == (number in self.twin.old)
            expected[b"r%d" % number] = holder.record()
            expected[b"n%b %b" % (holder.tier, holder.replica)] = text(number)
        assert table == expected

    def _bucket(self, key: int) -> bytes:
        return PREFIX + b"b:" + self.twin.generation + struct.pack(">H", key)

    def _version(self) -> int | None:
        at = self.redis.hget(TABLE, "at")
        return None if at is None else int(at)


def call(client: Any, script: Script, *args: object) -> Any:
    assert client.script_load(script.source) == script.sha
    return client.evalsha(script.sha, 1, TABLE, *args)


def listed(reply: list[Any]) -> tuple[Any, ...]:
    if not reply:
        return ()
    version, live, *records = reply
    pairs = dict(zip(records[::2], records[1::2], strict=True))
    return version, int.from_bytes(live, "little"), pairs


# ids that meet in few buckets, in the first, the last, and those that a cleared bit makes equal
BLOCKS = [
    struct.pack(">H", bucket) + struct.pack(">HI", 0xD0D0, field)
    for bucket in (0, 1, 0x7FFF, 0x8001)
    for field in range(6)
]
ids = st.lists(st.sampled_from(BLOCKS), max_size=12)
writers = st.integers(0, 200)
DEPTHS = st.sampled_from([0, 1, 2, 14, 4000, 70_000])
VALUES = [b"", b"\x00", b"\x01\x00", b"\xf3\x01", b"\x00\x07\x00", b"\x0f" + b"x" * 63, b"x" * 64]
OPERATIONS = st.one_of(
    st.tuples(
        st.just("open"),
        st.sampled_from([b"http://a:1", b"b \x00\n", b""]),
        st.sampled_from([b"device", b"host"]),
        st.sampled_from([0, 1, 9, 10, 2**63, 2**64 + 1]),
        st.integers(0, 3),
        st.booleans(),
    ),
    st.tuples(st.just("add"), writers, ids, DEPTHS, st.integers(1, 9)),
    st.tuples(st.just("add"), writers, ids, st.integers(0, 40), st.integers(4, 9)),
    st.tuples(st.just("remove"), writers, ids),
    st.tuples(st.just("lookup"), ids, st.sampled_from([0, 1, 3, 192])),
    st.tuples(
        st.just("sweep"),
        st.sampled_from([1, 2, 20_000, NUM_BUCKETS]),
        st.sampled_from([1, 5, 10_000]),
    ),
    st.tuples(st.just("sweep"), st.just(NUM_BUCKETS), st.just(10_000)),
    st.tuples(st.just("retire"), writers),
    st.tuples(st.just("list")),
    st.tuples(st.just("age"), st.integers(0, 3)),
    st.tuples(
        st.just("poison"),
        st.sampled_from([0, 1, 0x7FFF]),
        st.sampled_from([None, b"", BLOCKS[0][2:], b"seven b"]),
        st.sampled_from(VALUES),
    ),
    st.tuples(st.just("stale"), writers, st.integers(-1, 1), st.integers(-2, 1), ids),
)


def play(index: Both, operations: list[tuple[Any, ...]]) -> None:
    for name, *args in operations:
        if name not in {"add", "remove", "retire", "stale"}:
            OF_THE_INDEX[name](index, *args)
        elif index.writers:
            OF_A_WRITER[name](index, index.writers[args[0] % len(index.writers)], *args[1:])
    index.check()


def write_as_another(
    index: Both, writer: tuple[int, int, int], serial: int, fence: int, blocks: list[bytes]
) -> None:
    other = writer[0], writer[1] + serial, max(0, writer[2] + fence)
    index.add(other, blocks)
    index.remove(other, blocks)


OF_THE_INDEX: dict[str, Any] = {
    "open": Both.open_holder,
    "lookup": Both.lookup,
    "sweep": Both.sweep,
    "list": Both.list_holders,
    "age": Both.age,
    "poison": Both.poison,
}
OF_A_WRITER: dict[str, Any] = {
    "add": Both.add,
    "remove": Both.remove,
    "retire": lambda index, writer: index.retire_holder(*writer),
    "stale": write_as_another,
}


@settings(
    max_examples=70, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(operations=st.lists(OPERATIONS, max_size=60))
def test_scripts_do_what_their_twins_do(
    server: RedisServer, operations: list[tuple[Any, ...]]
) -> None:
    index = Both(server)
    index.open_holder(b"http://first:1", b"device", 1, 1)
    play(index, operations)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 600)), max_size=6),
    count=st.integers(0, 600),
    most=st.sampled_from([2, 20, 192]),
)
def test_chains_of_any_length_are_found_as_their_twin_finds_them(
    server: RedisServer, lengths: list[tuple[int, int]], count: int, most: int
) -> None:
    index, chain = Both(server), chain_of(600)
    for replica in range(41):
        index.open_holder(b"%d" % replica, b"device", 1, 1)
    for replica, length in lengths:
        index.add(index.writers[replica], chain[:length])
    index.lookup(chain[:count], most)
    index.check()


def chain_of(count: int, seed: int = 1) -> list[bytes]:
    packed = Random(seed).randbytes(8 * count)
    return [packed[at : at + 8] for at in range(0, len(packed), 8)]


# Edges, each on both versions


def filled(index: Both, count: int) -> None:
    """So many holders."""
    for number in range(count):
        assert index.open_holder(b"%d" % number, b"device", 1, 1)[:2] == [b"OK", number]


def test_an_index_that_is_not_there_says_so(server: RedisServer) -> None:
    index = Both(server)

    assert index.lookup(chain_of(3)) == []
    assert index.add((0, 1, 1), chain_of(3)) == [b"GONE"]
    assert index.sweep() == [b"EMPTY"]
    index.list_holders()
    index.check()


@pytest.mark.parametrize("count", [0, 1, 2, 2048, 4096])
def test_chains_of_each_length_come_and_go(server: RedisServer, count: int) -> None:
    index, chain = Both(server), chain_of(count)
    filled(index, 2)

    for at in range(0, count, 256):
        index.add(index.writers[0], chain[at : at + 256], depth=at)
    index.add(index.writers[1], chain[: count // 2])

    runs = index.lookup(chain)[1:]
    half = [count // 2, pack(0, 3)] if count >= 2 else []
    assert runs == half + ([count, pack(0, 1)] if count else [])
    for at in range(0, count, 256):
        index.remove(index.writers[0], chain[at : at + 256])
    assert index.lookup(chain)[1:] == ([count // 2, pack(0, 2)] if count >= 2 else [])
    index.check()


def test_holders_of_every_number_hold_the_same_block(server: RedisServer) -> None:
    index, chain = Both(server), chain_of(9)
    filled(index, 504)

    assert index.open_holder(b"one more", b"device", 1, 1) == [b"FULL"]
    mask = 0
    for number in (300, 64, 503, 63, 8, 7, 0):
        index.add(index.writers[number], chain)
        mask |= 1 << number
        assert index.lookup(chain)[1:] == [9, pack(0, mask)]
    for number in (0, 300, 7, 64, 8, 503):
        index.remove(index.writers[number], chain)
        mask &= ~(1 << number)
        assert index.lookup(chain)[1:] == [9, pack(0, mask)]
    index.check()
    assert index.redis.object("encoding", index._bucket(chain_key(chain))) in PACKED


def chain_key(chain: list[bytes]) -> int:
    return int.from_bytes(chain[0][:2], "big") % NUM_BUCKETS


def test_the_fullest_bucket_with_the_longest_values_stays_packed(server: RedisServer) -> None:
    index = Both(server)
    filled(index, 504)
    chain = [b"\x00\x07" + struct.pack(">HI", 9, n) for n in range(481)]

    for writer in (index.writers[0], index.writers[503]):
        for at in range(0, 480, 160):
            index.add(writer, chain[at : at + 160], depth=at)

    assert len(index.redis.hgetall(index._bucket(7))) == 480
    assert index.redis.object("encoding", index._bucket(7)) in PACKED
    assert index.add(index.writers[0], chain[480:], depth=480) == [b"OK", 1, 61, 0]
    index.check()


def test_what_nobody_living_has_goes_first_then_the_deepest(server: RedisServer) -> None:
    index = Both(server)
    filled(index, 2)
    chain = [b"\x00\x07" + struct.pack(">HI", 9, n) for n in range(9)]
    index.add(index.writers[1], chain[:1])
    index.add(index.writers[0], chain[1:8], depth=1)
    index.retire_holder(*index.writers[1])

    assert index.add(index.writers[0], chain[8:], depth=8, most=8)[2] == 2
    left = index.redis.hkeys(index._bucket(7))
    assert left == [chain[n][2:] for n in (1, 2, 3, 4, 5, 6, 8)]
    index.check()


def test_what_is_not_ours_goes_before_all_else(server: RedisServer) -> None:
    index = Both(server)
    writer = filled_one(index)
    for field, value in ((b"seven b", b"\x00\x01"), (b"sixbyt", b"\xf3" + b"x" * 9)):
        index.poison(7, field, value)
    chain = [b"\x00\x07" + struct.pack(">HI", 9, n) for n in range(8)]

    assert index.add(writer, chain, most=8)[2] == 2

    assert index.redis.hkeys(index._bucket(7)) == [one[2:] for one in chain[:7]] + [chain[7][2:]]
    index.check()


def test_a_retired_number_is_given_away_after_a_whole_round_only(server: RedisServer) -> None:
    index, chain = Both(server), [one for one in chain_of(300) if chain_key([one]) < 20_000]
    filled(index, 1)
    index.add(index.writers[0], chain)
    index.sweep(20_000)
    index.open_holder(b"0", b"device", 2, 1)  # a restart: number 0 is dead, number 1 opens
    index.sweep(20_000)  # ends the round that began before

    assert index.open_holder(b"x", b"device", 1, 1)[1] == 2
    assert index.lookup(chain)[1:] != []  # lookups name it; the live mask leaves it out
    index.sweep()
    assert index.lookup(chain)[1:] == []
    assert index.open_holder(b"y", b"device", 1, 1)[1] == 0
    assert index.add(index.writers[0], chain[:1]) == [b"GONE"]  # the same number, another serial
    index.check()


def test_who_lost_the_lease_is_refused_and_the_successor_goes_on(server: RedisServer) -> None:
    index, chain = Both(server), chain_of(5)
    number, serial, _ = filled_one(index)

    assert index.add((number, serial, 7), chain)[0] == b"OK"
    assert index.add((number, serial, 6), chain) == [b"FENCED", b"7"]
    assert index.remove((number, serial, 6), chain) == [b"FENCED", b"7"]
    assert index.open_holder(b"r", b"device", 2, 6) == [b"FENCED", b"7", b"1"]
    assert index.open_holder(b"r", b"device", 0, 8) == [b"FENCED", b"7", b"1"]
    assert index.open_holder(b"r", b"device", 1, 8)[1:3] == [number, text(serial)]
    assert index.add((number, serial, 7), chain) == [b"FENCED", b"8"]
    index.check()


def filled_one(index: Both) -> tuple[int, int, int]:
    index.open_holder(b"r", b"device", 1, 1)
    return index.writers[0]


def test_a_holder_that_is_opened_anew_has_nothing(server: RedisServer) -> None:
    index, chain = Both(server), chain_of(5)
    index.add(filled_one(index), chain)

    index.open_holder(b"r", b"device", 1, 1, anew=True)

    assert index.writers[1][0] == 1
    assert index.add(index.writers[0], chain) == [b"GONE"]
    assert index.twin.holders == {1: HolderTwin(index.writers[1][1], 1, 1, b"device", b"r")}
    index.list_holders()
    index.check()


def test_a_table_that_was_lost_begins_with_other_buckets(server: RedisServer) -> None:
    index, chain = Both(server), chain_of(5)
    before = filled_one(index)
    index.add(before, chain)
    index.redis.delete(TABLE)
    old, index.twin = index.twin, IndexTwin()

    index.open_holder(b"r", b"device", 1, 1)

    assert index.writers[1][1] > before[1]
    assert index.twin.generation != old.generation
    assert index.lookup(chain)[1:] == []
    assert index.add(before, chain) == [b"GONE"]


def test_epochs_are_told_apart_that_a_double_does_not(server: RedisServer) -> None:
    index = Both(server)

    index.open_holder(b"r", b"device", 2**63, 1)

    assert index.open_holder(b"r", b"device", 2**63 + 1, 1)[0] == b"OK"
    assert index.open_holder(b"r", b"device", 2**63, 1)[0] == b"FENCED"
    index.check()


def test_serials_grow_although_the_clock_went_back(server: RedisServer) -> None:
    index = Both(server)
    filled_one(index)
    index.redis.hset(TABLE, "at", 9_000_000_000_000_000)
    index.twin.at = 9_000_000_000_000_000

    assert index.open_holder(b"s", b"device", 1, 1)[2] == b"9000000000000001"


@pytest.mark.parametrize("act", ["add", "open", "sweep"])
def test_what_is_used_lives_on(server: RedisServer, act: str) -> None:
    index, chain = Both(server), chain_of(3)
    writer = filled_one(index)
    index.add(writer, chain)
    bucket = index._bucket(chain_key(chain))
    for key in (TABLE, bucket):
        index.redis.expire(key, 100)

    if act == "add":
        index.add(writer, chain)
    elif act == "open":
        index.open_holder(b"r", b"device", 1, 1)
    else:
        index.sweep()

    assert index.redis.ttl(TABLE) > TTL_S
    assert (index.redis.ttl(bucket) > 100) == (act == "sweep")


def test_ids_that_are_not_whole_change_nothing(server: RedisServer) -> None:
    index = Both(server)
    writer = filled_one(index)
    for script, args in (
        (scripts.ADD, (*writer, TTL_S, 9, b"\0", b"x" * 15)),
        (scripts.REMOVE, (*writer, TTL_S, b"x" * 15)),
        (scripts.LOOKUP, (b"x" * 15, 9)),
    ):
        with pytest.raises(ResponseError, match="8 bytes each, these are 15 bytes"):
            index.call(script, *args)
    index.check()


@pytest.mark.parametrize("classes", [b"", b"\0", b"\0\1\2", b"\0\x10", b"\xff\0"])
def test_depth_classes_that_are_none_change_nothing(server: RedisServer, classes: bytes) -> None:
    index = Both(server)
    writer = filled_one(index)
    with pytest.raises(ResponseError, match="a byte from 0 to 15 for each id"):
        index.call(scripts.ADD, *writer, TTL_S, 9, classes, b"x" * 16)
    index.check()


def test_blocks_of_many_chains_are_added_in_one_call(server: RedisServer) -> None:
    index, chain = Both(server), chain_of(16)
    writer = filled_one(index)
    depths = [2**15 - 2, 0, 1, 2, 2**15 - 1, 2**20, 3, 7, 0, 14, 15, 6, 5, 30, 31, 0]

    assert index.add_each(writer, chain, depths) == [b"OK", 16, 0, 0]
    index.check()


def test_a_bucket_of_a_wrong_type_is_skipped_and_swept_away(server: RedisServer) -> None:
    index, chain = Both(server), chain_of(20)
    writer = filled_one(index)
    index.poison(chain_key(chain), None, b"poison")

    assert index.add(writer, chain) == [b"OK", 19, 0, 1]
    assert index.remove(writer, chain[:2]) == [b"OK", 1, 1]
    assert index.lookup(chain)[1:] == []
    assert index.sweep()[-1] == 1
    assert index.add(writer, chain) == [b"OK", 2, 0, 0]
    index.check()


def test_a_bucket_that_somebody_filled_is_thrown_away(server: RedisServer) -> None:
    index = Both(server)
    writer = filled_one(index)
    for key in (7, 8):
        for number in range(1001):
            index.poison(key, b"%06d" % number, b"\x00\x01")

    assert index.add(writer, [b"\x00\x07" + b"newone"], most=9) == [b"OK", 1, 1002, 0]
    assert index.sweep()[-1] == 1
    index.check()


def test_an_index_that_is_no_hash_is_refused(server: RedisServer) -> None:
    index = Both(server)
    index.redis.set(TABLE, "poison")
    for script, args in (
        (scripts.OPEN_HOLDER, (b"r", b"device", 1, 1, 0, TTL_S)),
        (scripts.ADD, (0, 1, 1, TTL_S, 9, b"\0", b"x" * 8)),
        (scripts.LOOKUP, (b"x" * 8, 9)),
        (scripts.SWEEP, (9, 9, TTL_S)),
    ):
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            index.call(script, *args)
    assert index.redis.keys() == [TABLE]
