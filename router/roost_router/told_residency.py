"""What replicas' KV events say they hold of a prompt, where that can be relied upon. Pure.

    sink      takes in the events of one stream (kv/follow.py asks for one for each)
    lookup    how much of a prompt each replica holds; None: events do not tell
    compare   a replica counted a prompt's tokens: did we count as many?

Streams of which every event was applied (Trust.EXACT) tell what a replica holds, and what not.
Others that are followed tell only what it holds at least: what came before we did, or was lost, is
missing. Both only of replicas that count tokens as we do (tokens/drift.py). Of several
data-parallel ranks of a replica the one that holds most counts: which of them computes a request is
the replica's choice, and it knows them, too.

Events come after the fact, so they do not tell what is being computed. `untold_since` says which
placements they may not have told of yet: those that had their first byte less than NEWS_S ago. So
a burst of siblings is kept together.

Not here: how blocks of tokens are found by text (index/token_knowledge.py), streams (kv/).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from roost_router.index.token_knowledge import Known, TokenKnowledge
from roost_router.kv.token_sink import TokenSink
from roost_router.kv.trust import Trust
from roost_router.shared.stamps import NEVER
from roost_router.tokens.drift import DriftChange, DriftWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from roost_router.fleet.replica import Replica

#: Seconds after a first byte by which its blocks are told of.
NEWS_S: Final = 0.5
#: `owned_by` of our engine, whose names of blocks are the chain hashes of the index.
_OURS: Final = "roost"
#: vLLM may hold a block twice under one name.
_VLLM: Final = "vllm"
_COUNT: Final = (Trust.EXACT, Trust.APPROXIMATE)
_NOTHING: Final[list[Known | None]] = []


class _Lately:
    """The least stamp of the placements that had their first byte lately."""

    def __init__(self) -> None:
        self._since = 0.0
        self._least = self._least_before = NEVER

    def add(self, stamp: int, now: float) -> None:
        self._turn(now)
        self._least = min(self._least, stamp)

    def least(self, now: float) -> int:
        """Of the last NEWS_S, and of up to as long before."""
        self._turn(now)
        return min(self._least, self._least_before)

    def _turn(self, now: float) -> None:
        if now - self._since < NEWS_S:
            return
        is_next = now - self._since < 2.0 * NEWS_S
        self._least_before = self._least if is_next else NEVER
        self._least = NEVER
        self._since = now


class ToldResidency:
    """Who holds what, as told, for the models whose tokenizers are given."""

    def __init__(
        self,
        knowledge: TokenKnowledge,
        models: Collection[str],
        on_drift: Callable[[DriftChange], None],
    ) -> None:
        """`models`: whose prompts can be tokenised. `on_drift`: a replica's count parts from ours,
        or is ours again.
        """
        self.knowledge: Final = knowledge
        self._models: Final = frozenset(models)
        self._on_drift: Final = on_drift
        self._drift: Final = DriftWatch()
        self._started: Final[dict[str, float | None]] = {}  # by replica: its process
        self._sinks: Final[dict[str, dict[int, TokenSink]]] = {}  # by replica and rank
        self._lately: Final[dict[str, _Lately]] = {}
        self._is_stale = False  # of these:
        self._holders: dict[str, list[int]] = {}  # by replica: of its streams that count
        self._mask = 0  # of all these
        self._exact = 0  # of the exact ones

    def sink(self, replica: Replica, rank: int) -> TokenSink:
        """Where the events of a stream go. One that was there before is forgotten."""
        sinks = self._sinks.setdefault(replica.name, {})
        before = sinks.get(rank)
        if before is not None:
            before.close()
        sinks[rank] = sink = TokenSink(
            self.knowledge.index,
            self._changed,
            hashes_are_chain=replica.dialect == _OURS,
            counts_copies=replica.dialect == _VLLM,
        )
        return sink

    def forget(self, replica: str) -> None:
        """The replica is gone: its streams, and all that was learnt of its tokenizer."""
        for sink in self._sinks.pop(replica, {}).values():
            sink.close()
        self._lately.pop(replica, None)
        self._started.pop(replica, None)
        self._drift.forget(replica)

    def streams(self) -> Iterator[tuple[str, int, TokenSink]]:
        """Those that tell something: replica, rank, what took it in. O(streams)."""
        for name, sinks in self._sinks.items():
            for rank, sink in sinks.items():
                if sink.trust is not Trust.BLIND:
                    yield name, rank, sink

    def report_reuse(self, replica: str, *, is_asked: bool) -> None:
        """Its engine is asked to tell again what it reuses, or no more."""
        for sink in self._sinks.get(replica, {}).values():
            sink.report_reuse(is_asked=is_asked)

    def knows(self, model: str) -> bool:
        """Whether prompts of `model` can be tokenised."""
        return model in self._models

    def is_relied_upon(self, model: str, replica: str) -> bool:
        """Whether lookups for `model` go by the events of `replica`."""
        self._refresh()
        is_known = model in self._models and replica in self._holders
        return is_known and not self._drift.is_drifting(model, replica)

    def lookup(self, model: str, chain: list[int], replicas: list[Replica]) -> list[Known | None]:
        """What each of `replicas` holds of a prompt; empty if nothing is known of any.

        Less than `bound_tokens` is all that the replica holds; as much, the least that it does.

        `chain`: of the prompt's text, not empty. O(replicas + distinct depths * log).
        """
        self._refresh()
        if not self._mask or model not in self._models:
            return _NOTHING
        known = self.knowledge.lookup(chain, self._mask)
        if not known:
            return _NOTHING
        return [self._most(known, model, replica.name) for replica in replicas]

    def settled(self, replica: str, stamp: int, now: float) -> None:
        """The first byte of a placement came."""
        lately = self._lately.get(replica)
        if lately is None:
            lately = self._lately[replica] = _Lately()
        lately.add(stamp, now)

    def untold_since(self, replica: str, now: float) -> int:
        """The least stamp of the placements there that events may not have told of yet."""
        lately = self._lately.get(replica)
        return NEVER if lately is None else lately.least(now)

    def compare(self, model: str, replica: Replica, counted: int, reported: int) -> None:
        """A prompt has `counted` tokens by our tokenizer, and `reported` by the replica's."""
        name, started_at = replica.name, replica.started_at
        if self._started.setdefault(name, started_at) != started_at:
            self._started[name] = started_at
            self._drift.forget(name)
        change = self._drift.compare(model, name, counted, reported)
        if change is not None:
            self._on_drift(change)

    def drifting(self) -> list[tuple[str, str]]:
        """Models, and replicas that count their tokens differently. O(models * replicas)."""
        return self._drift.drifting()

    def _most(self, known: dict[int, Known], model: str, replica: str) -> Known | None:
        most: Known | None = None
        for holder in self._holders.get(replica, ()):
            of_rank = known.get(holder)
            if of_rank is not None and not self._exact >> holder & 1:
                told = of_rank.matched_tokens
                of_rank = Known(told, told) if told else None
            if of_rank is not None and (most is None or of_rank > most):
                most = of_rank
        if most is not None and self._drift.is_drifting(model, replica):
            return None
        return most

    def _changed(self) -> None:
        self._is_stale = True

    def _refresh(self) -> None:
        """See anew which streams count, and which holders they have."""
        if not self._is_stale:
            return
        self._is_stale = False
        self._holders, self._mask, self._exact = {}, 0, 0
        for name, sinks in self._sinks.items():
            for sink in sinks.values():
                if sink.trust not in _COUNT:
                    continue
                self._holders.setdefault(name, []).append(sink.holder)
                self._mask |= 1 << sink.holder
                if sink.trust is Trust.EXACT:
                    self._exact |= 1 << sink.holder
