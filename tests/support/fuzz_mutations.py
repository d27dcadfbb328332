"""Random mutations of seeds: bytes changed, dropped, repeated, spliced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

_INTERESTING = [
    b"\x00", b"\xff", b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b";", b",", b"{", b"}", b"[", b"]",
    b'"', b"\\", b"-1", b"0", b"1e999", b"null", b"true", b"NaN", b"\\ud800", b"\xed\xa0\x80",
    b"9" * 20, b"[" * 50, b"\xff" * 8, b"\x00" * 8, b"data: ", b"{{", b"{%", b"%}",
]  # fmt: skip


def mutations(seeds: Sequence[bytes], rng: Random) -> Iterator[bytes]:
    """Inputs without end; the seeds themselves first."""
    yield from seeds
    while True:
        data = rng.choice(seeds)
        for _ in range(rng.choice([1, 1, 2, 3, 8])):
            data = _mutated(data, seeds, rng)
        yield data


def _mutated(data: bytes, seeds: Sequence[bytes], rng: Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.choice([0, 1, 1, 2, 4, 8, 64]))
    match rng.randrange(6):
        case 0:
            middle = rng.choice(_INTERESTING)
        case 1:
            middle = bytes([rng.randrange(256)])
        case 2:
            middle = b""
        case 3:
            middle = data[start:stop] * rng.choice([2, 3, 100])
        case 4:
            other = rng.choice(seeds)
            middle = other[rng.randrange(len(other) + 1) :]
        case _:
            middle = bytes(byte ^ 1 << rng.randrange(8) for byte in data[start:stop])
    return data[:start] + middle + data[stop:]
