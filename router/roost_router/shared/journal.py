"""What this router has to tell the others: noted while it works, taken in batches. Pure.

The placer notes; who sends (store/link.py) takes a batch every few milliseconds. Nothing is
kept for later: where a batch could not be sent, or there was nobody to send to, the others get a
whole view of each replica instead, which says no less. So the journal is never larger
than what comes between two batches, and at most MAX_NEWS long.

Only a replica's *feeder*, one router at a time, tells what least recent use evicts there: others
have slightly other ideas of its capacity, and all should believe the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from roost_router.index.prefix_index import NO_FLOOR
from roost_router.shared import news
from roost_router.shared.stamps import Stamps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from roost_router.fleet.replica import Replica
    from roost_router.index.prefix_index import Floor, PrefixIndex

#: More than this between two batches: something hangs, and whole views will do.
MAX_NEWS: Final = 20_000


def _nobody() -> None:
    """Nobody asked to be called."""


class _Epoch(NamedTuple):
    """One process of a replica."""

    number: int
    start: float | None


def _epoch(replica: Replica) -> _Epoch:
    return _Epoch(replica.epoch, replica.started_at)


class Journal:
    """Of one router."""

    def __init__(self, router: int, stamps: Stamps) -> None:
        """`router`: 64 bits that no other has."""
        self.router: Final = router
        self.stamps: Final = stamps
        self.feeding: frozenset[str] = frozenset()  # URLs of replicas whose feeder this router is
        self.is_open = False  # others hear; while not, nothing is noted
        self._owes_views = False  # something was not told
        self._on_news: Callable[[], None] = _nobody
        self._news: list[news.News] = []
        self._replicas: list[Replica] = []  # that the news are about
        self._places: dict[str, int] = {}  # of these, by name
        self._changed: dict[str, Replica] = {}  # whose load is another now
        self._expected: dict[int, tuple[Replica, int, list[int]]] = {}  # by request, as noted
        self._epochs: dict[str, _Epoch] = {}  # by replica, as of the last batch
        self._noted: dict[str, _Epoch] = {}  # by replica, that the news are about
        self._num_batches = 0

    def __repr__(self) -> str:
        return f"<Journal {self._num_batches} batches | {len(self._news)} news>"

    def feeds(self, replica: Replica) -> bool:
        """Whether this router says what is evicted there: its feeder, or on its own."""
        return not self.is_open or replica.url in self.feeding

    def call(self, on_news: Callable[[], None]) -> None:
        """`on_news` is called when there is something to take, once for each batch."""
        self._on_news = on_news

    def open(self) -> None:
        """Others hear from now on."""
        self.is_open = True

    def close(self) -> None:
        """They do not, or what was taken last may not have reached them."""
        self.is_open = False
        self._owes_views = True
        self._forget()

    def expected(
        self, request: int, replica: Replica, uncached_tokens: int, chain: list[int]
    ) -> None:
        """`request`, growing with each, was placed."""
        self.changed(replica)
        if chain:
            self._expected[request] = replica, uncached_tokens, chain
            if self.is_open:
                self._note_expected(request)

    def settled(self, request: int, replica: Replica) -> None:
        """It has a first byte, or never will."""
        self.changed(replica)
        if self._expected.pop(request, None) is not None and self.is_open:
            self._note(news.Settled(request))

    def touched(self, replica: Replica, stamp: int, chain: list[int]) -> None:
        """A prompt was computed."""
        if self.is_open:
            self._note(news.Touched(self._place(replica), stamp, news.pack_chain(chain)))
        else:
            self._owes_views = True

    def dropped(self, replica: Replica, floor: Floor) -> None:
        """What lies below `floor` is gone."""
        if self.is_open:
            self._note(news.Dropped(self._place(replica), floor.stamp, floor.keep))
        else:
            self._owes_views = True

    def changed(self, replica: Replica) -> None:
        """Its load is another now."""
        if not self._changed and self.is_open:
            self._on_news()
        self._changed[replica.name] = replica

    def take(
        self, replicas: Iterable[Replica], index: PrefixIndex, *, beat: bool = False
    ) -> news.Batch | None:
        """All there is to tell of `replicas`; None: nothing. The caller sends it, or calls `close`.

        `beat`: say at least that this router lives, and all its loads.
        """
        replicas = list(replicas)
        for replica in replicas:
            self._look_at_epoch(replica, index)
        for replica in self._replicas:
            self._place(replica)
        owes_views, self._owes_views = self._owes_views, False
        if owes_views:
            self._note(news.Anew())
            for replica in replicas:
                self._view(replica, index)
            for request in self._expected:
                self._note_expected(request)
        if beat or owes_views:
            self._changed = {replica.name: replica for replica in replicas}
        for replica in self._changed.values():
            self._note(self._load(replica))
        if not self._news and not beat:
            return None
        batch = news.Batch(
            news.VERSION,
            self.router,
            self._num_batches,
            next(iter(self._expected), 1 << 48),
            [(replica.url, replica.started_at or 0.0) for replica in self._replicas],
            self._news,
        )
        self._num_batches += 1
        self._forget()
        return batch

    def snapshot(self, replica: Replica, index: PrefixIndex) -> news.Batch:
        """What is believed of one replica, as a batch for those who come later. O(its blocks)."""
        floor, touches = index.floor(replica.holder), index.touches(replica.holder)
        packed = [(t.stamp, t.first, news.pack_chain(t.blocks)) for t in touches]
        view = news.View(0, floor.stamp, floor.keep, packed)
        about = [(replica.url, replica.started_at or 0.0)]
        return news.Batch(news.VERSION, self.router, 0, 0, about, [view])

    def _look_at_epoch(self, replica: Replica, index: PrefixIndex) -> None:
        """Tell that its process is gone, which no other start may tell."""
        epoch = _epoch(replica)
        before = self._epochs.get(replica.name)
        self._epochs[replica.name] = epoch
        if before != epoch and index.floor(replica.holder) != NO_FLOOR:
            self.dropped(replica, index.floor(replica.holder))

    def _note_expected(self, request: int) -> None:
        replica, uncached_tokens, chain = self._expected[request]
        blocks = news.pack_chain(chain)
        self._note(news.Expected(request, self._place(replica), uncached_tokens, blocks))

    def _view(self, replica: Replica, index: PrefixIndex) -> None:
        place, view = self._place(replica), self.snapshot(replica, index).news[0]
        assert isinstance(view, news.View)
        self._note(news.View(place, view.stamp, view.keep, view.touches))

    def _load(self, replica: Replica) -> news.Load:
        return news.Load(
            self._place(replica),
            max(0, replica.queued_tokens),
            max(0, replica.queued_prompt_tokens),
            replica.num_in_flight,
            replica.num_decoding,
            replica.kv_release.num_tokens,
        )

    def _place(self, replica: Replica) -> int:
        place = self._places.get(replica.name)
        if place is None:
            place = self._places[replica.name] = len(self._replicas)
            self._replicas.append(replica)
            self._noted[replica.name] = _epoch(replica)
        elif self._noted[replica.name] != _epoch(replica):
            # A batch is about one epoch of each: what was noted of the last one is void.
            self._noted[replica.name] = _epoch(replica)
            self._news = [
                n
                for n in self._news
                if isinstance(n, news.Settled | news.Anew) or n.replica != place
            ]
        return place

    def _note(self, one: news.News) -> None:
        self._news.append(one)
        if len(self._news) > MAX_NEWS:
            self._owes_views = True
            self._forget()

    def _forget(self) -> None:
        self._news, self._replicas, self._places = [], [], {}
        self._changed, self._noted = {}, {}
