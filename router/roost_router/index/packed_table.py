"""Packed table: fixed-size records by keys of 48 bits, in hardly more memory than they need. Pure.

    buckets[i]    bytes: record, record, ...            record = key (6 bytes) value (num_bytes)

A `dict` of integers costs about 150 bytes an entry; this one 22 + 2 for a value of 16 bytes. A
bucket is an object of exactly its size, searched by `bytes.find` and replaced when it changes:
about 0.3 µs an operation at 32 records a bucket, and no free slots to pay for.

Linear hashing (Litwin 1980): the table grows by one bucket at a time, whose records come out of
one other. So no operation costs more than a few µs, where a `dict` of a million entries stops
its thread for 0.1 s now and then.

Keys are the low 48 bits of 64-bit hashes: among a million of them two are equal once in 560
tables, and what that leads to is up to the caller.

Not here: what the records mean (token_index.py).
"""

from __future__ import annotations

from typing import Final

KEY_BYTES: Final = 6
KEY_MASK: Final = (1 << 48) - 1
#: Records a bucket on average, when one is split: more cost time, fewer memory.
_SPLIT_AT: Final = 32
_EMPTY: Final = b""


#: A bucket besides its records: the object, its place in the list, what the allocator rounds up.
_BUCKET_BYTES: Final = 33 + 8 + 12


class PackedTable:
    """Values of `value_bytes` each, by integers from 0 to KEY_MASK."""

    def __init__(self, value_bytes: int) -> None:
        self._record_bytes: Final = KEY_BYTES + value_bytes
        self._buckets: list[bytes] = [_EMPTY]
        self._mask = 0  # of the keys' bits that name a bucket ...
        self._next = 0  # ... and one bit more for buckets before this one, which were split
        self._len = 0
        #: Memory of the records and what holds them, to 1 %.
        self.num_bytes = _BUCKET_BYTES

    def __len__(self) -> int:
        return self._len

    def get(self, key: int) -> bytes | None:
        """The value of `key`."""
        place = key & self._mask
        if place < self._next:
            place = key & (self._mask << 1 | 1)
        bucket = self._buckets[place]
        at = bucket.find(key.to_bytes(KEY_BYTES, "little"))
        if at % self._record_bytes:
            at = self._find(bucket, key)
        return None if at < 0 else bucket[at + KEY_BYTES : at + self._record_bytes]

    def try_add(self, key: int, value: bytes) -> bool:
        """Take in a key; False if it is here already."""
        place = key & self._mask
        if place < self._next:
            place = key & (self._mask << 1 | 1)
        bucket, packed = self._buckets[place], key.to_bytes(KEY_BYTES, "little")
        at = bucket.find(packed)
        if at >= 0 and (not at % self._record_bytes or self._find(bucket, key) >= 0):
            return False
        self._buckets[place] = bucket + packed + value
        self._len += 1
        self.num_bytes += self._record_bytes
        if self._len > _SPLIT_AT * len(self._buckets):
            self._split()
        return True

    def set(self, key: int, value: bytes) -> None:
        """Change the value of a key that is here."""
        place = self._place(key)
        bucket = self._buckets[place]
        at = self._find(bucket, key)
        assert at >= 0
        self._buckets[place] = bucket[: at + KEY_BYTES] + value + bucket[at + self._record_bytes :]

    def pop(self, key: int) -> bytes | None:
        """Drop a key, and return the value it had."""
        place = key & self._mask
        if place < self._next:
            place = key & (self._mask << 1 | 1)
        bucket, size = self._buckets[place], self._record_bytes
        at = bucket.find(key.to_bytes(KEY_BYTES, "little"))
        if at % size:
            at = self._find(bucket, key)
        if at < 0:
            return None
        self._buckets[place] = bucket[:at] + bucket[at + size :]
        self._len -= 1
        self.num_bytes -= size
        return bucket[at + KEY_BYTES : at + size]

    def add_to_count(self, key: int, step: int, most: int) -> bytes | None:
        """Add to the number in the last two bytes of a value, unless it is over `most`.

        The value after that; None if the key is not here.
        """
        place = key & self._mask
        if place < self._next:
            place = key & (self._mask << 1 | 1)
        bucket, size = self._buckets[place], self._record_bytes
        at = bucket.find(key.to_bytes(KEY_BYTES, "little"))
        if at % size:
            at = self._find(bucket, key)
        if at < 0:
            return None
        end = at + size
        value = bucket[at + KEY_BYTES : end]
        count = value[-2] | value[-1] << 8
        if count <= most:
            value = value[:-2] + (count + step).to_bytes(2, "little")
            self._buckets[place] = bucket[: at + KEY_BYTES] + value + bucket[end:]
        return value

    def take_bucket(self) -> list[bytes]:
        """Remove some values, all of one bucket, and return them; for emptying a table in parts.

        To be called until the table has no buckets left; nothing else may be called in between.
        """
        bucket, size = self._buckets.pop(), self._record_bytes
        self._len -= len(bucket) // size
        self.num_bytes -= len(bucket) + _BUCKET_BYTES
        return [bucket[at + KEY_BYTES : at + size] for at in range(0, len(bucket), size)]

    @property
    def num_buckets(self) -> int:
        """How many buckets there are."""
        return len(self._buckets)

    def bucket(self, place: int) -> list[tuple[int, bytes]]:
        """Keys and values in one of them."""
        bucket, size = self._buckets[place], self._record_bytes
        return [
            (
                int.from_bytes(bucket[at : at + KEY_BYTES], "little"),
                bucket[at + KEY_BYTES : at + size],
            )
            for at in range(0, len(bucket), size)
        ]

    @property
    def has_buckets(self) -> bool:
        """Whether `take_bucket` may be called once more."""
        return bool(self._buckets)

    def _place(self, key: int) -> int:
        place = key & self._mask
        return place if place >= self._next else key & (self._mask << 1 | 1)

    def _find(self, bucket: bytes, key: int) -> int:
        """Where the record of `key` begins, -1 if there is none."""
        packed, size = key.to_bytes(KEY_BYTES, "little"), self._record_bytes
        at = bucket.find(packed)
        while at > 0 and at % size:  # the same bytes within some value
            at = bucket.find(packed, at + 1)
        return at

    def _split(self) -> None:
        """Move the records of the next bucket whose keys have one bit more to a new bucket."""
        buckets, size, bit = self._buckets, self._record_bytes, self._mask + 1
        old = buckets[self._next]
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        for at in range(0, len(old), size):
            record = old[at : at + size]
            parts[int.from_bytes(record[:KEY_BYTES], "little") & bit != 0].append(record)
        buckets[self._next] = _EMPTY.join(parts[0])
        buckets.append(_EMPTY.join(parts[1]))
        self.num_bytes += _BUCKET_BYTES
        self._next += 1
        if self._next > self._mask:
            self._mask = self._mask << 1 | 1
            self._next = 0
