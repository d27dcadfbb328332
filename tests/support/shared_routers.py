"""Several routers that tell each other what they do, played at random: the pure parts, real ones.

Batches travel late and unequally late, each router's in order, as through a stream that everybody
reads at a pace of its own. Requests are placed, answered, refused; replicas restart, and routers
notice at different times; feeders change; a router loses the store for a while, and what it had
sent may be lost with it; routers die and new ones start from snapshots.
"""

from __future__ import annotations

import contextlib
from random import Random

from roost_router.errors import NoReplicaError
from roost_router.fleet.fleet import NO_HOLDER, Fleet
from roost_router.fleet.replica import Replica
from roost_router.index.prefix_index import PrefixIndex
from roost_router.openai_request import RoutingFields
from roost_router.placement import Placement, Placer
from roost_router.policy.cost import CostPolicy
from roost_router.shared import news
from roost_router.shared.hearing import LEASE_S, Hearing
from roost_router.shared.journal import Journal
from roost_router.shared.stamps import Stamps
from roost_wire.load_report import LoadReport

URLS = [f"http://127.0.0.1:{8101 + number}" for number in range(3)]
#: So small that prompts are evicted all the time.
CAPACITY_TOKENS = 700
MODEL = "m"


class OneRouter:
    """The brain of a router, what it tells and hears."""

    def __init__(self, number: int, seed: str, *, skew_s: float = 0.0) -> None:
        self.number = number
        self.index = PrefixIndex()
        self.fleet = Fleet(self.index, URLS)
        self.journal = Journal(number, Stamps(number, skew_s))
        self.hearing = Hearing(self.fleet, self.index, number, self.journal.stamps)
        self.placer = Placer(self.index, self.fleet, CostPolicy, Random(seed), journal=self.journal)
        self.running: list[Placement] = []
        self.position = 0  # of the stream, that it has read

    def poll(self, replica: Replica, started_at: float) -> None:
        report = LoadReport(kv_capacity_tokens=CAPACITY_TOKENS, started_at=started_at)
        self.fleet.answered(replica, [MODEL], report)

    def blocks(self) -> dict[str, set[tuple[int, int]]]:
        """By replica: blocks that are believed there, with their stamps."""
        return {
            replica.url: {
                (block, touch.stamp)
                for touch in self.index.touches(replica.holder)
                for block in touch.blocks
            }
            for replica in self.fleet.replicas
            if replica.holder != NO_HOLDER
        }

    def expected(self) -> int:
        return sum(len(held.expected) for held in self.index._held.values())

    def own_load(self) -> list[tuple[int, int, int, int]]:
        return [
            (r.queued_tokens, r.queued_prompt_tokens, r.num_in_flight, r.num_decoding)
            for r in self.fleet.replicas
        ]

    def shared_load(self) -> list[tuple[int, int, int, int]]:
        return [
            (s.queued_tokens, s.queued_prompt_tokens, s.num_in_flight, s.num_decoding)
            for s in (r.shared for r in self.fleet.replicas)
        ]


class Cluster:
    """Routers, the stream between them, replicas that restart."""

    def __init__(self, seed: int, num_routers: int = 3) -> None:
        self.rng = Random(seed)
        self.seed = seed
        self.now = 0.0
        self.stream: list[tuple[float, bytes]] = []
        self.snapshots: dict[str, bytes] = {}
        self.started_at = dict.fromkeys(URLS, 1000.0)
        self.routers: list[OneRouter] = []
        self.num_started = 0
        for _ in range(num_routers):
            self.start_router()

    def start_router(self) -> None:
        """A router starts: polls, then snapshots, then the stream."""
        number = self.num_started
        self.num_started += 1
        skew_s = self.rng.uniform(-0.01, 0.01)
        router = OneRouter(number, f"{self.seed}/{number}", skew_s=skew_s)
        for replica in router.fleet.replicas:
            router.poll(replica, self.started_at[replica.url])
        for data in self.snapshots.values():
            router.hearing.read_snapshot(news.unpack(data))
        self.read(router, len(self.stream))
        router.journal.open()
        self.routers.append(router)

    def feed(self) -> None:
        """Each replica has one feeder."""
        fed = {url: self.rng.randrange(len(self.routers)) for url in URLS}
        for place, router in enumerate(self.routers):
            router.journal.feeding = frozenset(url for url in URLS if fed[url] == place)

    def tell(self, router: OneRouter, *, beat: bool = False) -> None:
        if router.journal.is_open:
            batch = router.journal.take(router.fleet.replicas, router.index, beat=beat)
            if batch is not None:
                self.stream.append((self.now, news.pack(batch)))

    def read(self, router: OneRouter, end: int) -> None:
        for at, data in self.stream[router.position : end]:
            # Who reads late hears what was told then.
            router.hearing.hear(news.unpack(data), at)
        router.position = max(router.position, end)

    def lose_the_store(self, router: OneRouter) -> None:
        """What it took last was sent, or was not."""
        batch = router.journal.take(router.fleet.replicas, router.index)
        if batch is not None and self.rng.random() < 0.5:
            self.stream.append((self.now, news.pack(batch)))
        router.journal.close()
        router.hearing.forget()

    def regain_the_store(self, router: OneRouter) -> None:
        for data in self.snapshots.values():
            router.hearing.read_snapshot(news.unpack(data))
        self.read(router, len(self.stream))
        router.journal.open()

    def write_snapshots(self) -> None:
        for router in self.routers:
            self.tell(router)  # nothing is written down that was not told
            for replica in router.fleet.replicas:
                if router.journal.is_open and replica.url in router.journal.feeding:
                    batch = router.journal.snapshot(replica, router.index)
                    self.snapshots[replica.url] = news.pack(batch)

    def prompt(self) -> bytes:
        """A few conversations, each some turns deep."""
        conversation = self.rng.randrange(4)
        num_blocks = self.rng.randint(0, 10)
        return bytes([conversation]) * 256 * num_blocks + b"tail"

    def step(self) -> None:
        rng = self.rng
        self.now += rng.expovariate(100.0)
        router = rng.choice(self.routers)
        kind = rng.random()
        if kind < 0.3:
            fields = RoutingFields(MODEL, stream=True, prompt=self.prompt())
            with contextlib.suppress(NoReplicaError):  # all refused
                router.running.append(router.placer.place(fields, self.now))
        elif kind < 0.55 and router.running:
            self.answer(router, rng.choice(router.running))
        elif kind < 0.7:
            self.tell(router, beat=rng.random() < 0.3)
        elif kind < 0.9:
            self.read(router, rng.randint(router.position, len(self.stream)))
        else:
            self.happen(router, 10.0 * (kind - 0.9))

    def happen(self, router: OneRouter, kind: float) -> None:
        """What happens now and then; `kind`: 0 to 1."""
        rng = self.rng
        replica = rng.choice(router.fleet.replicas)
        if kind < 0.2:
            self.started_at[replica.url] += rng.randint(2, 10)
        elif kind < 0.4:
            router.poll(replica, self.started_at[replica.url])
        elif kind < 0.5:
            self.feed()
        elif kind < 0.6:
            self.write_snapshots()
        elif kind < 0.75:
            if router.journal.is_open:
                self.lose_the_store(router)
            else:
                self.regain_the_store(router)
        elif kind < 0.8:
            router.fleet.refused(replica)
        elif kind < 0.85:
            self.routers.remove(router)  # dead, whatever it had
            self.start_router()

    def answer(self, router: OneRouter, placement: Placement) -> None:
        """The next moment of a request."""
        placer, rng = router.placer, self.rng
        if placement.first_byte_at is None and rng.random() < 0.8:
            placer.first_byte(placement, self.now, streamed=True)
            prompt_tokens = max(1, placement.prompt_bytes // 4)
            cached = prompt_tokens if rng.random() < 0.8 else rng.randint(0, prompt_tokens)
            placer.learn(placement, prompt_tokens, cached)
        else:
            placer.finish(placement, self.now, num_events=3)
            router.running.remove(placement)

    def settle(self) -> None:
        """Quiet: all is polled, told and heard; who is dead is noticed."""
        for router in self.routers:
            for replica in router.fleet.replicas:
                router.poll(replica, self.started_at[replica.url])
            if not router.journal.is_open:
                self.regain_the_store(router)
        for _ in range(2):
            self.now += LEASE_S
            for router in self.routers:
                self.tell(router, beat=True)
            for router in self.routers:
                self.read(router, len(self.stream))
        for router in self.routers:
            router.hearing.expire(self.now)
