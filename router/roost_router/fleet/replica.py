"""One replica as the router sees it: is it up, what does it serve, what has it to do. Pure.

Load is counted here at decision time, in tokens, and released as the stream shows progress:

    place        queued_tokens += uncached          (prefill not yet seen to be done)
    first byte   queued_tokens -= uncached, num_decoding += 1
    end          num_decoding -= 1

`recent_uncached_tokens` is the prefill work placed lately, fading with RECENT_S. It breaks ties
between idle replicas: without it, paced traffic finds every count at zero, always takes the
first replica, and that replica's cache then re-elects it for ever (seen in AMD Infera's field
trace).
"""

from __future__ import annotations

from enum import Enum
from math import exp, inf

from roost_router.fleet.health import Health
from roost_router.fleet.kept import Kept
from roost_router.fleet.kv_release import KvRelease
from roost_router.fleet.speed import Speed
from roost_router.index.unseen import salt
from roost_router.shared.news import Load
from roost_wire.load_report import LoadReport

RECENT_S = 60.0
#: News that is late by less is as good as fresh.
MIN_LAG_S = 0.01
#: The least time of a dial is forgotten by so much with each: a replica may move away.
_DIAL_GROWTH = 1.05
_MIN_DIAL_S = 1e-4
#: Failed polls in a row before a replica that merely answers late counts as down.
MAX_FAILED_POLLS = 3


class ReplicaState(Enum):
    """What the router may do with a replica."""

    JOINING = "joining"  # never answered yet
    UP = "up"
    DOWN = "down"


class Membership(Enum):
    """Whether a replica is one of the fleet's; see fleet.py."""

    MEMBER = "member"
    DRAINING = "draining"  # a member, but it is to get no new requests for now
    LEAVING = "leaving"  # removed; what runs there goes on to its end
    GONE = "gone"  # nothing of it is kept


class Shared:
    """What other routers have on a replica, as they tell (shared/hearing.py)."""

    def __init__(self) -> None:
        self.queued_tokens = 0
        self.queued_prompt_tokens = 0
        self.num_in_flight = 0
        self.num_decoding = 0

    def add(self, now: Load, before: Load) -> None:
        """One of them has `now` what was `before`."""
        self.queued_tokens += now.queued_tokens - before.queued_tokens
        self.queued_prompt_tokens += now.queued_prompt_tokens - before.queued_prompt_tokens
        self.num_in_flight += now.num_in_flight - before.num_in_flight
        self.num_decoding += now.num_decoding - before.num_decoding


class Replica:
    """State and load of one replica; changed only by fleet.py and placement.py."""

    def __init__(self, name: str, url: str, holder: int) -> None:
        self.name = name
        self.url = url
        self.salt = salt(url)
        self.holder = holder  # its current epoch in the prefix index
        self.epoch = 0  # how many there were before; numbers of holders come back
        self.state = ReplicaState.JOINING
        self.membership = Membership.MEMBER
        self.models: tuple[str, ...] = ()
        self.adapters: frozenset[str] = frozenset()  # of the models: those that are adapters
        self.kv_capacity_tokens: int | None = None
        self.started_at: float | None = None
        self.report = LoadReport()  # its own figures, as of the last poll or what it told since
        self.num_failed_polls = 0
        self.speed = Speed()
        self.kept = Kept()
        #: Of this epoch in the index, too: prompts of requests that ended; see kept.py.
        self.ended_holder: int | None = None
        self.health = Health()
        self.kv_release = KvRelease()
        self.last_event_at = 0.0  # when any stream of it last showed a token
        self.dialect = ""  # which server it is, as `owned_by` in its /v1/models says
        self.queued_tokens = 0
        self.queued_prompt_tokens = 0  # of the same requests, what is believed cached included
        self.num_in_flight = 0
        self.num_decoding = 0
        self.shared = Shared()
        self.num_others = 0  # requests of who does not tell, as of its last report
        self._others_tokens = 0  # of their prompts, to be computed here, as told ...
        self._others_since: float | None = None  # ... and since when they are taken to drain
        self.tells_queue = False
        self._recent_tokens = 0.0
        self._recent_at = 0.0
        self._draining_tokens = 0.0  # of queued_tokens, taken to be left at _draining_at
        self._draining_at = 0.0
        self._dial_s = inf  # the least lately
        self.news_lag_s = 0.0  # how long it takes until the router sees what happened there

    def __repr__(self) -> str:
        return (
            f"<Replica {self.name} {self.state.value} | {self.num_in_flight} in flight, "
            f"{self.num_decoding} decoding, {self.queued_tokens} tokens queued>"
        )

    @property
    def is_up(self) -> bool:
        """Whether it answers."""
        return self.state is ReplicaState.UP

    @property
    def is_open(self) -> bool:
        """Whether requests may be placed here."""
        return self.state is ReplicaState.UP and self.membership is Membership.MEMBER

    @property
    def condition(self) -> str:
        """For people: its state, or `draining` where it answers and is to get no new requests."""
        if self.is_up and self.membership is not Membership.MEMBER:
            return "draining"
        return self.state.value

    def recent_uncached_tokens(self, now: float) -> float:
        """Prefill work placed here, faded to `now` (seconds)."""
        return self._recent_tokens * exp(-max(0.0, now - self._recent_at) / RECENT_S)

    def others_told(self, queued_tokens: int | None, tokens_ours: int) -> None:
        """It has so many tokens of prompts to compute, and so many of ours; None: it tells not."""
        self.tells_queue = queued_tokens is not None
        self._others_tokens = max(0, (queued_tokens or 0) - tokens_ours)
        self._others_since = None

    def others_tokens(self, tokens_per_s: float, now: float) -> int:
        """What is left of the prompts of others, taken to be computed since it was told.

        That was before it is first looked at, by as much as news takes: moments, mostly, and who
        tells has no clock of ours.
        """
        if not self._others_tokens:
            return 0
        if self._others_since is None:
            self._others_since = now - self.news_lag_s
        return max(0, int(self._others_tokens - tokens_per_s * (now - self._others_since)))

    def slot_wait_s(self) -> float:
        """Seconds until one more request can run; 0 where there is room, or it is not told.

        Answers are taken to end one after the other, each as long as they are lately.
        """
        slots = self.report.max_running
        if slots is None:
            return 0.0
        num_before = self.num_in_flight + self.shared.num_in_flight + self.num_others - slots
        return (num_before + 1) * self.speed.answer_s / slots if num_before >= 0 else 0.0

    def undrained_tokens(self, tokens_per_s: float, now: float) -> float:
        """Of queued_tokens, what is left if they were computed at that speed since the news."""
        elapsed_s = max(0.0, now - self._draining_at)
        return max(0.0, self._draining_tokens - tokens_per_s * elapsed_s)

    def dialled(self, took_s: float) -> None:
        """A connection was made: there and back, so news is late by as much as dials at best take.

        News of a first byte is under way for half of it, as was the request before.
        """
        least_s = min(took_s, self._dial_s * _DIAL_GROWTH)
        self._dial_s = max(least_s, _MIN_DIAL_S)
        self.news_lag_s = least_s if least_s >= MIN_LAG_S else 0.0

    def reserve(
        self, uncached_tokens: int, prompt_tokens: int, tokens_per_s: float, now: float
    ) -> None:
        """Count a request that was just placed here."""
        self._draining_tokens = self.undrained_tokens(tokens_per_s, now) + uncached_tokens
        self._draining_at = now
        self.placed_elsewhere(uncached_tokens, now)
        self.queued_tokens += uncached_tokens
        self.queued_prompt_tokens += prompt_tokens
        self.num_in_flight += 1

    def placed_elsewhere(self, uncached_tokens: int, now: float) -> None:
        """Some router placed a request here: it counts among the recent ones."""
        self._recent_tokens = self.recent_uncached_tokens(now) + uncached_tokens
        self._recent_at = now

    def start_decoding(self, uncached_tokens: int, prompt_tokens: int, at: float) -> None:
        """The first byte came: the prefill is done, a stream is running. `at`: when it came."""
        self.queued_tokens -= uncached_tokens
        self.queued_prompt_tokens -= prompt_tokens
        self._draining_tokens = float(self.queued_tokens)
        self._draining_at = at
        self.num_decoding += 1

    def release(self, uncached_tokens: int, prompt_tokens: int, *, decoding: bool) -> None:
        """The request left, either while decoding or still queued."""
        if decoding:
            self.num_decoding -= 1
        else:
            self.queued_tokens -= uncached_tokens
            self.queued_prompt_tokens -= prompt_tokens
            self._draining_tokens = max(0.0, self._draining_tokens - uncached_tokens)
        self.num_in_flight -= 1
