"""Who belongs to the fleet, by what sources tell: views in, changes out. Pure.

A *source* (a file, DNS, Kubernetes, a registry) tells its whole *view* each time: the replicas that
there are, by URL. The union of all views counts; a replica drains as soon as one source says so.

A source that is wrong for a moment must not empty a fleet:

    it fails            nothing changes: that it is silent says nothing of replicas, and polls and
                        requests see for themselves who is down. After KEEP_S without an answer
                        those of its replicas go that do not answer either: their addresses may be
                        others' by then. Those that answer stay for as long as it takes.
    it tells nobody     believed once it was repeated for EMPTY_S: a name that is not there for a
                        moment, a file that is being written, a service made anew. A failure in
                        between starts that time anew.
    one is missing      gone at once, or after the source's own `linger_s` where its answers may be
                        parts (DNS)

What was given on the command line (`is_fixed`) never leaves. URLs that can be no replica's
(replica_url.py) are left out, and told of once; so are those beyond MAX_REPLICAS.

Not here: where views come from (the sources beside this file), what a fleet does with changes
(fleet/fleet.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from roost_router.replica_url import ReplicaUrlError, check_replica_url, url_key

#: Seconds for which a source must tell nobody before it is believed.
EMPTY_S: Final = 30.0
#: Seconds for which replicas of a failing source stay although they do not answer.
KEEP_S: Final = 900.0
#: Each is polled, and has a bit in the prefix index: beyond, something is wrong with a source.
MAX_REPLICAS: Final = 1024


class Told(NamedTuple):
    """A replica as a source tells of it."""

    url: str  # base URL, without /v1
    name: str = ""  # what people call it there: of a pod, for instance
    is_draining: bool = False  # it takes no new requests, and may be finishing others


class Changes(NamedTuple):
    """What a fleet has to do: in this order."""

    joined: list[Told]
    draining: list[tuple[str, bool]]  # URL, and whether it drains from now on
    left: list[str]  # URLs


class SourceStatus(NamedTuple):
    """How a source does."""

    name: str
    num_told: int  # replicas that it is believed to tell of
    failing_since: float | None  # None: its last word was an answer, or none is due yet
    reason: str  # why it fails


class _Seen:
    """A replica of one source."""

    __slots__ = ("missing_since", "told")

    def __init__(self, told: Told) -> None:
        self.told = told
        self.missing_since: float | None = None


class _Source:
    def __init__(self, linger_s: float, *, is_fixed: bool) -> None:
        self.linger_s: Final = linger_s
        self.is_fixed: Final = is_fixed
        self.seen: dict[str, _Seen] = {}  # by key of the URL
        self.refused: frozenset[str] = frozenset()  # URLs, of its last view
        self.has_told = False
        self.is_empty = False  # its last view
        self.failing_since: float | None = None
        self.reason = ""


class Roster:
    """All sources of one router."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}
        self._members: dict[str, Told] = {}  # by key: as the fleet was told
        self.num_beyond = 0  # left out by MAX_REPLICAS, at the last look

    def open(self, source: str, *, linger_s: float = 0.0, is_fixed: bool = False) -> None:
        """A source, by a name of its own. `linger_s`, `is_fixed`: see the module."""
        self._sources[source] = _Source(linger_s, is_fixed=is_fixed)

    @property
    def is_told(self) -> bool:
        """Whether each source has answered, or failed, at least once."""
        every = self._sources.values()
        return all(source.has_told or source.failing_since is not None for source in every)

    def told(self, source: str, view: Iterable[Told], now: float) -> list[str]:
        """A source answered. Returns why some of its view are left out, as far as that is new.

        O(view + replicas of the source).
        """
        of = self._sources[source]
        refused: dict[str, str] = {}
        usable: dict[str, Told] = {}
        for told in view:
            try:
                check_replica_url(told.url)
            except ReplicaUrlError as error:
                refused[told.url] = str(error)
                continue
            usable.setdefault(url_key(told.url), told)
        notes = [why for url, why in refused.items() if url not in of.refused]
        of.refused = frozenset(refused)
        of.has_told, of.is_empty, of.failing_since = True, not usable, None
        for key, told in usable.items():
            of.seen[key] = _Seen(told)
        for key, seen in of.seen.items():
            if key not in usable and seen.missing_since is None:
                seen.missing_since = now
        return notes

    def failed(self, source: str, reason: str, now: float) -> bool:
        """A source could not answer; whether it did so before, or fails for another reason now."""
        of = self._sources[source]
        is_new = of.failing_since is None or of.reason != reason
        if of.failing_since is None:
            of.failing_since = now
        of.reason = reason
        for seen in of.seen.values():
            seen.missing_since = None
        return is_new

    def look(self, now: float, answers: Callable[[str], bool]) -> Changes:
        """What has changed since the last look. O(replicas of all sources).

        `answers`: whether the replica at that URL does.
        """
        for source in self._sources.values():
            self._let_go(source, now, answers)
        wanted = self._wanted()
        members = self._members
        joined = [told for key, told in wanted.items() if key not in members]
        draining = [
            (members[key].url, told.is_draining)
            for key, told in wanted.items()
            if key in members and members[key].is_draining is not told.is_draining
        ]
        left = [told.url for key, told in members.items() if key not in wanted]
        self._members = {
            key: told._replace(url=members[key].url) if key in members else told
            for key, told in wanted.items()
        }
        return Changes(joined, draining, left)

    def status(self) -> list[SourceStatus]:
        """Of all sources but those that are fixed."""
        return [
            SourceStatus(name, len(source.seen), source.failing_since, source.reason)
            for name, source in self._sources.items()
            if not source.is_fixed
        ]

    def _let_go(self, source: _Source, now: float, answers: Callable[[str], bool]) -> None:
        if source.is_fixed:
            return
        if source.failing_since is not None:
            if now - source.failing_since >= KEEP_S:
                gone = [key for key, seen in source.seen.items() if not answers(seen.told.url)]
                for key in gone:
                    del source.seen[key]
            return
        limit_s = max(source.linger_s, EMPTY_S if source.is_empty else 0.0)
        for key, seen in list(source.seen.items()):
            if seen.missing_since is not None and now - seen.missing_since >= limit_s:
                del source.seen[key]

    def _wanted(self) -> dict[str, Told]:
        """The union by key, members first, so that a flood of others takes the place of none."""
        union: dict[str, Told] = {}
        for source in self._sources.values():
            for key, seen in source.seen.items():
                before = union.get(key)
                if before is None:
                    union[key] = seen.told
                else:
                    name = before.name or seen.told.name
                    is_draining = before.is_draining or seen.told.is_draining
                    union[key] = Told(before.url, name, is_draining)
        order = sorted(union, key=lambda key: key not in self._members)
        self.num_beyond = max(0, len(order) - MAX_REPLICAS)
        return {key: union[key] for key in order[:MAX_REPLICAS]}
