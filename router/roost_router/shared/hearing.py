"""What other routers tell is taken in: residency, work on its way, who lives. Pure.

    hear     a batch came
    expire   time passes: a router that is not heard of for LEASE_S holds nothing any more

What others have on a replica is counted beside this router's own (`Replica.shared`), what they
compute there is expected, and what they computed is held, in the same index. A batch is about one
epoch of each replica: news of an older one is void, and of a newer one says that the replica has
started anew, which this router's next poll will tell, too.

Batches may come late, twice, or not at all. Touches and floors can be merged in any order; a load
is told whole; requests that are settled are named by the oldest that is not. A touch that was
missed is in the next view or snapshot.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from roost_router.fleet.replica import Membership
from roost_router.index.prefix_index import Floor, Touch
from roost_router.shared import news

if TYPE_CHECKING:
    from roost_router.fleet.fleet import Fleet
    from roost_router.fleet.replica import Replica
    from roost_router.index.prefix_index import PrefixIndex
    from roost_router.shared.stamps import Stamps

#: Seconds without a word after which a router's reservations are void.
LEASE_S: Final = 2.0
#: Seconds between two batches of a router that has nothing to tell.
BEAT_S: Final = 0.5
#: Start times that differ by less are the same: pages round them.
_SAME_START_S: Final = 0.5
#: A prompt of more blocks is not one of ours.
_MAX_BLOCKS: Final = 4096


class _Peer:
    """Another router."""

    def __init__(self, number: int, now: float) -> None:
        self.next_number = number
        self.heard_at = now
        self.loads: dict[str, news.Load] = {}  # by replica
        #: By request: the replica, its epoch, the chain, and how much was held there.
        self.expected: dict[int, tuple[Replica, int, list[int], int]] = {}


class Hearing:
    """All that one router heard of the others."""

    def __init__(self, fleet: Fleet, index: PrefixIndex, router: int, stamps: Stamps) -> None:
        """`router`: this one's id, whose own batches say nothing new."""
        self._fleet: Final = fleet
        self._index: Final = index
        self._router: Final = router
        self._stamps: Final = stamps
        self._peers: Final[dict[int, _Peer]] = {}
        fleet.watch(self)
        self.num_batches = 0
        self.num_missed = 0  # batches of others that never came
        self.num_void: Final[Counter[str]] = Counter()  # news not taken in, by why

    def __repr__(self) -> str:
        return f"<Hearing {len(self._peers)} routers | {self.num_batches} batches>"

    @property
    def num_peers(self) -> int:
        """Other routers that live."""
        return len(self._peers)

    def hear(self, batch: news.Batch, now: float) -> None:
        """Take in what another router told. Raises NewsError. O(blocks)."""
        if batch.router == self._router:
            return
        peer = self._peers.get(batch.router)
        if peer is None:
            peer = self._peers[batch.router] = _Peer(batch.number, now)
        if batch.number < peer.next_number:
            self.num_void["twice"] += 1
            return
        self.num_missed += batch.number - peer.next_number
        peer.next_number = batch.number + 1
        peer.heard_at = now
        self.num_batches += 1
        replicas = [self._replica(url, start) for url, start in batch.replicas]
        for one in batch.news:
            if isinstance(one, news.Settled):
                self._settle(peer, one.request)
                continue
            if isinstance(one, news.Anew):
                self._settle_all(peer)
                continue
            replica = replicas[one.replica]
            if replica is not None:
                self._take_in(peer, replica, one, now)
        for request in list(peer.expected):
            if request >= batch.oldest:
                break
            self._settle(peer, request)

    def read_snapshot(self, batch: news.Batch) -> None:
        """Take in what was written down of replicas. Raises NewsError. O(blocks)."""
        replicas = [self._replica(url, start) for url, start in batch.replicas]
        for one in batch.news:
            if isinstance(one, news.View):
                replica = replicas[one.replica]
                if replica is not None:
                    self._view(replica, one)

    def expire(self, now: float) -> None:
        """Void what routers have that are not heard of any more. O(routers)."""
        for router, peer in list(self._peers.items()):
            if now - peer.heard_at > LEASE_S:
                self._void(peer)
                del self._peers[router]

    def forget(self) -> None:
        """Nothing can be heard for now: void what all of them have."""
        for peer in self._peers.values():
            self._void(peer)
        self._peers.clear()

    def joined(self, replica: Replica) -> None:
        """A replica was added to the fleet: nothing was told of it yet."""

    def gone(self, replica: Replica) -> None:
        """It was removed."""
        for peer in self._peers.values():
            peer.loads.pop(replica.name, None)
            for request, entry in list(peer.expected.items()):
                if entry[0] is replica:
                    del peer.expected[request]

    def _take_in(self, peer: _Peer, replica: Replica, one: news.News, now: float) -> None:
        if isinstance(one, news.Load):
            before = peer.loads.get(replica.name, _NO_LOAD)
            peer.loads[replica.name] = one
            replica.shared.add(one, before)
            released = one.released_tokens - before.released_tokens
            if before is not _NO_LOAD and released > 0:
                replica.kv_release.released(released, now)
        elif isinstance(one, news.Expected):
            self._expect(peer, replica, one, now)
        elif isinstance(one, news.Touched):
            self._stamps.saw(one.stamp)
            self._index.add(replica.holder, _chain(one.chain), one.stamp)
        elif isinstance(one, news.Dropped):
            self._stamps.saw(one.stamp)
            self._index.drop_below(replica.holder, Floor(one.stamp, one.keep))
        elif isinstance(one, news.View):
            self._view(replica, one)

    def _view(self, replica: Replica, view: news.View) -> None:
        touches = [Touch(stamp, first, _chain(blocks)) for stamp, first, blocks in view.touches]
        for touch in touches:
            if touch.first + len(touch.blocks) > _MAX_BLOCKS:
                raise news.NewsError(f"a prompt of {touch.first + len(touch.blocks)} blocks")
            self._stamps.saw(touch.stamp)
        self._index.merge(replica.holder, touches, Floor(view.stamp, view.keep))

    def _expect(self, peer: _Peer, replica: Replica, one: news.Expected, now: float) -> None:
        chain, holder = _chain(one.chain), replica.holder
        replica.placed_elsewhere(one.uncached_tokens, now)
        if one.request in peer.expected:
            return
        num_held = self._index.num_held(holder, chain, len(chain))
        self._index.expect(holder, chain, num_held)
        peer.expected[one.request] = replica, replica.epoch, chain, num_held

    def _settle(self, peer: _Peer, request: int) -> None:
        entry = peer.expected.pop(request, None)
        if entry is not None:
            replica, epoch, chain, num_held = entry
            if replica.epoch == epoch:
                self._index.unexpect(replica.holder, chain, num_held)

    def _settle_all(self, peer: _Peer) -> None:
        for request in list(peer.expected):
            self._settle(peer, request)

    def _void(self, peer: _Peer) -> None:
        self._settle_all(peer)
        for replica in (*self._fleet.replicas, *self._fleet.leaving):
            load = peer.loads.get(replica.name)
            if load is not None:
                replica.shared.add(_NO_LOAD, load)
        peer.loads.clear()

    def _replica(self, url: str, started_at: float) -> Replica | None:
        """The replica in question, if news of that epoch of it counts."""
        replica = self._fleet.find(url)
        if replica is None or replica.membership is Membership.LEAVING:
            self.num_void["replica not known"] += 1
            return None
        ours = replica.started_at
        if started_at and ours is not None and abs(started_at - ours) > _SAME_START_S:
            if started_at < ours:
                self.num_void["epoch over"] += 1
                return None
            self._fleet.started_anew(replica, started_at)
        return replica


_NO_LOAD: Final = news.Load(0)


def _chain(data: bytes) -> list[int]:
    chain = news.unpack_chain(data)
    if len(chain) > _MAX_BLOCKS:
        raise news.NewsError(f"a chain of {len(chain)} blocks")
    return chain
