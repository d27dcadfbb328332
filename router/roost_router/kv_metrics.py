"""Series about KV events and tokenizer workers, read when they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from roost_router.kv.trust import Trust
from roost_router.series import counter, gauge

if TYPE_CHECKING:
    from roost_router.kv.follow import KvFollower, StreamStatus
    from roost_router.tokens.prompts import PromptTokens
    from roost_router.told_residency import ToldResidency


class KvCollector(Collector):
    """What is known from KV events, and how far."""

    def __init__(self, told: ToldResidency, tokens: PromptTokens, follower: KvFollower) -> None:
        self._told = told
        self._tokens = tokens
        self._follower = follower

    def collect(self) -> Iterator[Metric]:
        """Yield the current values; called by prometheus_client."""
        streams = self._follower.status()
        yield gauge(
            "kv_stream_exact",
            "1 while every KV event of a stream was applied.",
            ("replica", "rank"),
            {(s.replica, str(s.rank)): s.trust is Trust.EXACT for s in streams},
        )
        for name, text, values in (
            ("kv_batches", "Batches of KV events.", _by_replica(streams, "num_batches")),
            ("kv_undecodable", "Of these, unreadable.", _by_replica(streams, "num_undecodable")),
        ):
            yield counter(name, text, ("replica",), values)
        losses: Counter[tuple[str, ...]] = Counter()
        for stream in streams:
            for reason, count in stream.losses.items():
                losses[stream.replica, reason] += count
        text = "How often not every KV event of a replica was known, by why."
        yield counter("kv_losses", text, ("replica", "reason"), losses)
        left_out: Counter[tuple[str, ...]] = Counter()
        for stream in streams:
            for reason, count in stream.left_out.items():
                left_out[stream.replica, reason] += count
        text = "Blocks or events that say nothing about where to route."
        yield counter("kv_left_out", text, ("replica", "reason"), left_out)
        knowledge = self._told.knowledge
        for name, text, value in (
            ("kv_index_blocks", "Distinct blocks of tokens in the index.", len(knowledge.index)),
            ("kv_index_bytes", "Memory of it, and of the text bound to it.", knowledge.num_bytes),
            ("tokenizer_waiting", "Prompts that wait for a worker.", self._tokens.num_waiting),
        ):
            yield gauge(name, text, (), {(): value})
        counts = self._tokens.counts
        ends = ("answered", "failed", "dropped", "lost")
        by_end: dict[tuple[str, ...], int] = {(end,): getattr(counts, end) for end in ends}
        yield counter("tokenizer_prompts", "By what became of them.", ("outcome",), by_end)
        yield counter("tokenizer_restarts", "Of workers.", (), {(): counts.restarts})
        drifting: dict[tuple[str, ...], float] = dict.fromkeys(self._told.drifting(), 1)
        text = "1 where a replica counts a model's tokens differently."
        yield gauge("token_drift", text, ("model", "replica"), drifting)


def _by_replica(streams: list[StreamStatus], field: str) -> dict[tuple[str, ...], int]:
    values: Counter[tuple[str, ...]] = Counter()
    for stream in streams:
        values[stream.replica,] += getattr(stream, field)
    return values
