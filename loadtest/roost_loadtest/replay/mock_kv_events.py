"""KV events of a mock engine, in vLLM's words over ZMQ, for routers that follow caches.

    frames     b"", number of the batch (8 bytes, big-endian), msgpack [time, [event, ...], 0]
    stored     when a request is admitted: a little earlier than an engine has computed it
    removed    when a block is evicted

Events are those of vLLM 0.33 (maps with a `type`). No replay: the router is there first.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import zmq

from roost_loadtest.fleet_sim.cache import BlockCache


class KvPublisher:
    """A PUB socket on one port."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], port: int) -> None:
        self._socket = context.socket(zmq.PUB)
        self._socket.set_hwm(100_000)
        self._socket.bind(f"tcp://127.0.0.1:{port}")
        self._number = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close(linger=0)

    def publish(self, events: list[dict[str, object]]) -> None:
        """One batch; dropped if nobody listens."""
        frames = [b"", self._number.to_bytes(8, "big"), msgspec.msgpack.encode([0.0, events, 0])]
        self._socket.send_multipart(frames, zmq.NOBLOCK)
        self._number += 1


class ToldCache(BlockCache):
    """A cache that tells what enters and leaves it."""

    def __init__(self, capacity_blocks: int, block_tokens: int, publisher: KvPublisher) -> None:
        self._evicted: list[int] = []
        super().__init__(capacity_blocks, self._evicted.extend)
        self._block_tokens = block_tokens
        self.publisher = publisher
        self._texts: dict[int, memoryview] = {}  # of blocks whose requests wait ...
        self._num_waiting: dict[int, int] = {}  # ... and how many of them

    def expect(self, names: Sequence[int], prompt: bytes) -> None:
        """A request with these blocks comes; four bytes of its prompt are a token."""
        size, text = self._block_tokens * 4, memoryview(prompt)
        for place, name in enumerate(names):
            self._texts[name] = text[place * size : (place + 1) * size]
            self._num_waiting[name] = self._num_waiting.get(name, 0) + 1

    def take(self, block_ids: Sequence[int], num_private: int) -> int | None:
        """See BlockCache."""
        matched = super().take(block_ids, num_private)
        if matched is None:
            return None
        events: list[dict[str, object]] = []
        texts = [self._text(name) for name in block_ids]
        if matched < len(block_ids):
            new = block_ids[matched:]
            events.append(
                {
                    "type": "BlockStored",
                    "block_hashes": list(new),
                    "parent_block_hash": block_ids[matched - 1] if matched else None,
                    "token_ids": [token for text in texts[matched:] for token in text.cast("I")],
                    "block_size": self._block_tokens,
                    "lora_id": None,
                    "medium": "GPU",
                    "lora_name": None,
                }
            )
        if self._evicted:
            gone = self._evicted.copy()
            self._evicted.clear()
            events.append({"type": "BlockRemoved", "block_hashes": gone, "medium": "GPU"})
        if events:
            self.publisher.publish(events)
        return matched

    def _text(self, name: int) -> memoryview:
        """Of a block of a request that waited; forgotten with the last of them."""
        self._num_waiting[name] -= 1
        if self._num_waiting[name]:
            return self._texts[name]
        del self._num_waiting[name]
        return self._texts.pop(name)
