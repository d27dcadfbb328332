"""Python twins of the scripts that run inside Redis: plain dictionaries, the same replies.

Where a script asks Redis' clock a twin is told what it answered: `now_us`. Holders that nobody has
written for lately are `old`, for nobody waits a day in a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

NUM_BUCKETS = 32_768
MAX_HOLDERS = 504
MAX_FIELDS = 1000


def pack(depth_class: int, mask: int) -> bytes:
    """A value as the scripts write it; `mask` is not 0."""
    skip = 0
    while mask % (1 << 32) == 0:
        mask, skip = mask >> 32, skip + 1
    return bytes([16 * skip + depth_class]) + mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def unpack(value: bytes) -> int:
    return int.from_bytes(value[1:], "little") << 32 * (value[0] // 16)


def is_value(value: bytes) -> bool:
    return len(value) >= 2 and value[0] // 16 * 4 + len(value) - 1 <= 63


def text(number: int) -> bytes:
    return b"%d" % number


@dataclass(frozen=True)
class HolderTwin:
    serial: int
    fence: int
    epoch: int
    tier: bytes
    replica: bytes

    def record(self) -> bytes:
        return b"%d %d %d %b %b" % (self.serial, self.fence, self.epoch, self.tier, self.replica)


@dataclass
class IndexTwin:
    """Table of holders, buckets. A bucket that is None is a key of a wrong type."""

    at: int | None = None
    generation: bytes = b""
    cursor: int = 0
    holders: dict[int, HolderTwin] = field(default_factory=dict)
    old: set[int] = field(default_factory=set)
    dead: int = 0
    going: int = 0
    buckets: dict[int, dict[bytes, bytes] | None] = field(default_factory=dict)
    now_us: int = 0

    @property
    def live(self) -> int:
        return sum(1 << number for number in self.holders)

    def open_holder(
        self, replica: bytes, tier: bytes, epoch: int, fence: int, anew: bool
    ) -> list[bytes | int]:
        retired = False
        for number, holder in self.holders.items():
            if (holder.replica, holder.tier) != (replica, tier):
                continue
            if fence < holder.fence or epoch < holder.epoch:
                return [b"FENCED", text(holder.fence), text(holder.epoch)]
            if epoch == holder.epoch and not anew:
                self._write(number, fence)
                return [b"OK", number, text(holder.serial), text(self.at or 0)]
            self._retire(number)
            retired = True
            break
        number = next(n for n in range(MAX_HOLDERS + 1) if not (self.live | self.dead) >> n & 1)
        if number == MAX_HOLDERS:
            if retired:
                self._next_version()
            return [b"FULL"]
        self._next_version()
        assert self.at is not None
        if not self.generation:
            self.generation = (self.at % (1 << 32)).to_bytes(4, "big")
        self.holders[number] = HolderTwin(self.at, fence, epoch, tier, replica)
        self.old.discard(number)
        return [b"OK", number, text(self.at), text(self.at)]

    def retire_holder(self, number: int, serial: int, fence: int) -> list[bytes | int]:
        if refused := self._refusal(number, serial, fence):
            return refused
        self._retire(number)
        self._next_version()
        return [b"OK"]

    def list_holders(self) -> list[bytes | int]:
        if self.at is None:
            return []
        reply: list[bytes | int] = [text(self.at), self.live.to_bytes(63, "little")]
        for number, holder in self.holders.items():
            reply += [number, holder.record()]
        return reply

    def add(
        self,
        number: int,
        serial: int,
        fence: int,
        most: int,
        depths: Sequence[int],
        ids: list[bytes],
    ) -> list[bytes | int]:
        if refused := self._refusal(number, serial, fence):
            return refused
        added = evicted = skipped = 0
        for place, block_id in zip(depths, ids, strict=True):
            key, name = bucket_of(block_id), block_id[2:]
            bucket = self.buckets.setdefault(key, {})
            mine = pack(min(15, (place + 1).bit_length() - 1), 1 << number)
            if bucket is None:
                skipped += 1
            elif name not in bucket:
                bucket[name] = mine
                added += 1
                if len(bucket) > most:
                    evicted += self._evict(key, bucket, most)
            elif not is_value(value := bucket[name]):
                bucket[name] = mine
            else:
                bucket[name] = pack(value[0] % 16, unpack(value) | 1 << number)
        return [b"OK", added, evicted, skipped]

    def remove(self, number: int, serial: int, fence: int, ids: list[bytes]) -> list[bytes | int]:
        if refused := self._refusal(number, serial, fence):
            return refused
        removed = skipped = 0
        for block_id in ids:
            key, name = bucket_of(block_id), block_id[2:]
            bucket = self.buckets.get(key, {})
            if bucket is None:
                skipped += 1
            elif name in bucket:
                after = _changed(bucket[name], ~(1 << number))
                removed += not after or after != bucket[name]
                self._put(key, bucket, name, after)
        return [b"OK", removed, skipped]

    def lookup(self, ids: list[bytes], most: int) -> list[bytes | int]:
        """As the script: bisection, at most about `most` blocks are looked at."""
        if self.at is None:
            return []
        reply: list[bytes | int] = [text(self.at)]
        left = most

        def look(place: int) -> bytes:
            nonlocal left
            left -= 1
            bucket = self.buckets.get(bucket_of(ids[place - 1]))
            value = (bucket or {}).get(ids[place - 1][2:], b"")
            return bytes([value[0] // 16 * 16]) + value[1:] if is_value(value) else b""

        def walk(low: int, low_value: bytes, high: int, high_value: bytes) -> None:
            if low_value in {high_value, b""}:
                return
            if high - low == 1 or left <= 0:
                reply.extend([low, low_value])
                return
            middle = (low + high) // 2
            value = look(middle)
            walk(low, low_value, middle, value)
            walk(middle, value, high, high_value)

        if ids and (first := look(1)):
            last = look(len(ids)) if len(ids) > 1 else first
            walk(1, first, len(ids), last)
            if last:
                reply.extend([len(ids), last])
        return reply

    def sweep(self, most_buckets: int, most_blocks: int) -> list[bytes | int]:
        if self.at is None:
            return [b"EMPTY"]
        seen = blocks = removed = freed = strange = 0
        left = most_blocks
        while seen < most_buckets and left > 0 and self.cursor < NUM_BUCKETS:
            key = self.cursor
            if key in self.buckets:
                bucket = self.buckets[key]
                if bucket is None or len(bucket) > MAX_FIELDS:
                    del self.buckets[key]
                    strange += 1
                else:
                    blocks += len(bucket)
                    if self.dead:
                        left -= len(bucket)
                        removed += self._clean(key, bucket)
            self.cursor += 1
            seen += 1
        if self.cursor == NUM_BUCKETS:
            self.cursor = 0
            freed = self.going.bit_count()
            self.dead &= ~self.going
            late = self.old & set(self.holders)
            for number in late:
                self._retire(number)
            if late:
                self._next_version()
            self.going = self.dead
        return [b"OK", self.cursor, seen, blocks, removed, freed, strange]

    def _refusal(self, number: int, serial: int, fence: int) -> list[bytes | int] | None:
        holder = self.holders.get(number)
        if holder is None or holder.serial != serial:
            return [b"GONE"]
        if fence < holder.fence:
            return [b"FENCED", text(holder.fence)]
        self._write(number, fence)
        return None

    def _write(self, number: int, fence: int) -> None:
        self.holders[number] = replace(self.holders[number], fence=fence)
        self.old.discard(number)

    def _retire(self, number: int) -> None:
        del self.holders[number]
        self.dead |= 1 << number

    def _next_version(self) -> None:
        self.at = max(self.now_us, (self.at or 0) + 1)

    def _evict(self, key: int, bucket: dict[bytes, bytes], most: int) -> int:
        size = len(bucket)
        if size > MAX_FIELDS:
            del self.buckets[key]
            return size

        def rank(name: bytes) -> int:
            if len(name) != 6 or not is_value(bucket[name]):
                return 17
            return bucket[name][0] % 16 if unpack(bucket[name]) & self.live else 16

        surplus = size - (most - most // 8)
        for name in sorted(bucket, key=rank, reverse=True)[:surplus]:
            self._put(key, bucket, name, b"")
        return surplus

    def _clean(self, key: int, bucket: dict[bytes, bytes]) -> int:
        before = len(bucket)
        for name, value in list(bucket.items()):
            after = _changed(value, ~self.dead) if len(name) == 6 else b""
            self._put(key, bucket, name, after)
        return before - len(bucket)

    def _put(self, key: int, bucket: dict[bytes, bytes], name: bytes, value: bytes) -> None:
        if value:
            bucket[name] = value
        else:
            del bucket[name]
        if not bucket:
            self.buckets.pop(key, None)


def bucket_of(block_id: bytes) -> int:
    return int.from_bytes(block_id[:2], "big") % NUM_BUCKETS


def _changed(value: bytes, keep: int) -> bytes:
    mask = unpack(value) & keep if is_value(value) else 0
    return pack(value[0] % 16, mask) if mask else b""


@dataclass
class LeasesTwin:
    """Leases: replica to fence and owner; the routers that are alive."""

    leases: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)
    alive: set[bytes] = field(default_factory=set)

    def beat(self, router: bytes, replicas: list[bytes], now_us: int) -> list[bytes]:
        self.alive.add(router)
        if len(self.leases) > 4 * (len(replicas) + 3) + 64:
            self.leases = {
                name: lease for name, lease in self.leases.items() if lease[1] in self.alive
            }
        fences = []
        for replica in replicas:
            fence, owner = self.leases.get(replica, (0, b""))
            if owner != router and owner in self.alive:
                fences.append(b"0")
                continue
            if owner != router:
                fence = max(now_us, fence + 1)
                self.leases[replica] = (fence, router)
            fences.append(text(fence))
        return fences

    def release(self, router: bytes) -> int:
        was_alive = router in self.alive
        self.alive.discard(router)
        return int(was_alive)


@dataclass
class SpendTwin:
    """scripts/spend.lua: buckets of tokens, each a minute's worth of its limit."""

    buckets: dict[str, tuple[float, int]] = field(default_factory=dict)  # level, microseconds

    def __call__(self, now_us: int, name: str, limit: int, spent: float) -> float:
        """The level after `spent` is gone."""
        level, since = self.buckets.get(name, (float(limit), now_us))
        level = min(limit, level + max(0, now_us - since) / 60e6 * limit) - spent
        if spent:
            self.buckets[name] = level, max(now_us, since)
        return level
