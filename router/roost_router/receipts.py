"""Receipts: why each of the last requests went where it went, and what came of it. Pure.

A receipt is packed when its request ends, into one `bytes` of MessagePack: arrays without names,
read again by explanation.py, which has the fields in the same order. It holds figures, names of
replicas, and words out of closed sets (outcomes, reasons of losses, codes of errors); of what
the client sent it holds the request id and the start of the model's name. Prompts, keys, headers
and replicas' error texts, which may quote a prompt, are never in it.

Packed, for memory: 100,000 receipts of eight candidates take 40 MiB. The placements that they
are made from would take 2 KB each, 4.6 with their prompts' hashes: three and seven times the
bound, and a million objects for the garbage collector to walk while streams wait. Packing costs
1.3 us a request where it is compiled, 2.1 where not.

Bounded in number and in bytes: the oldest leave. Each receipt is charged its two `bytes` and
_OVERHEAD_BYTES, so that the bound is one of memory, not of payload.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from roost_router.http.record import RequestRecord
    from roost_router.placement import Placement
    from roost_router.policy.interface import Candidate

MAX_RECEIPTS: Final = 100_000
MAX_BYTES: Final = 64 << 20
#: What clients choose is kept up to here. Ids of requests are bounded where they are read.
MAX_MODEL_CHARS: Final = 128
#: Of one receipt beside its content: two objects of 33 bytes, each rounded up to 16; two pointers.
_OVERHEAD_BYTES: Final = 112

_encode_into: Final = msgspec.msgpack.Encoder().encode_into


class Receipts:
    """The receipts of one router process, oldest first. Not thread-safe."""

    def __init__(self, max_receipts: int = MAX_RECEIPTS, max_bytes: int = MAX_BYTES) -> None:
        self._max_receipts: Final = max_receipts
        self._max_bytes: Final = max_bytes
        #: Packed into first: what the encoder returns by itself takes up to half as much again.
        self._buffer: Final = bytearray()
        self.num_bytes = 0  # of memory, estimated from above
        self._ids: deque[bytes] = deque()
        self._packed: deque[bytes] = deque()  # of the same requests

    def __len__(self) -> int:
        """Receipts held."""
        return len(self._ids)

    def add(self, record: RequestRecord) -> None:
        """Keep the receipt of a request that ended. O(candidates), amortised."""
        request_id, packed = record.request_id, self._pack(record)
        self._ids.append(request_id)
        self._packed.append(packed)
        self.num_bytes += len(request_id) + len(packed) + _OVERHEAD_BYTES
        while self.num_bytes > self._max_bytes or len(self._ids) > self._max_receipts:
            evicted_bytes = len(self._ids.popleft()) + len(self._packed.popleft())
            self.num_bytes -= evicted_bytes + _OVERHEAD_BYTES

    def get(self, request_id: bytes) -> bytes | None:
        """The packed receipt of the last request with this id, if it is still held.

        O(requests that ended since): 3 ms over 100,000. Few ask; a dict by id would cost every
        request 0.4 us and 100 bytes.
        """
        for number, held in enumerate(reversed(self._ids), 1):
            if held == request_id:
                return self._packed[-number]
        return None

    def _pack(self, record: RequestRecord) -> bytes:
        started_at, placement, lost = record.started_at, record.placement, record.lost_legs
        attempts = [_attempt(leg.placement, started_at, leg.lost, leg.then) for leg in lost]
        if placement is not None and not (lost and lost[-1].placement is placement):
            attempts.append(_attempt(placement, started_at, None, None))
        receipt = (
            started_at,
            record.model[:MAX_MODEL_CHARS],
            record.outcome,
            record.status,
            record.error_code,
            record.ttft_s,
            record.duration_s,
            record.prompt_tokens,
            record.cached_tokens,
            attempts,
        )
        _encode_into(receipt, self._buffer)
        return bytes(self._buffer)


def _attempt(
    placement: Placement, started_at: float, lost: str | None, then: str | None
) -> tuple[Any, ...]:
    decision, placed_at = placement.decision, placement.placed_at
    return (
        decision.chosen,
        placed_at - started_at,
        placement.prefilled_at - placed_at,
        lost,
        then,
        decision.costs_s,  # by itself: zip(strict=True) below would cost half a microsecond
        [seen(candidate) for candidate in placement.candidates],
    )


def seen(candidate: Candidate) -> tuple[str, int, int, int, int, bool]:
    """What is told of a candidate: the first fields of explanation.CandidateRow."""
    return (
        candidate.name,
        candidate.matched_tokens,
        candidate.uncached_tokens,
        candidate.queued_tokens,
        candidate.num_decoding,
        candidate.is_told,
    )
