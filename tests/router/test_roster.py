"""Views of sources in, changes of a fleet out; with a clock of our own."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from roost_router.discovery.registered import registered
from roost_router.discovery.roster import (
    EMPTY_S,
    KEEP_S,
    MAX_REPLICAS,
    Changes,
    Roster,
    Told,
)

A, B, C = (Told(f"http://10.0.0.{number}:8000") for number in (1, 2, 3))
NOTHING = Changes([], [], [])


def answers(_: str) -> bool:
    return True


def silent(_: str) -> bool:
    return False


def opened(*names: str, **options) -> Roster:
    roster = Roster()
    for name in names or ("s",):
        roster.open(name, **options)
    return roster


def test_what_is_told_joins_and_what_is_missing_leaves():
    roster = opened()
    roster.told("s", [A, B], 0.0)
    assert roster.look(0.0, answers) == Changes([A, B], [], [])
    assert roster.look(0.0, answers) == NOTHING

    roster.told("s", [B, C], 1.0)

    assert roster.look(1.0, answers) == Changes([C], [], [A.url])


def test_a_source_that_fails_changes_nothing_however_long_its_replicas_answer():
    roster = opened()
    roster.told("s", [A, B], 0.0)
    roster.look(0.0, answers)

    assert roster.failed("s", "no route", 1.0)
    assert not roster.failed("s", "no route", 2.0)
    assert roster.failed("s", "something else", 3.0)

    assert roster.look(1e6, answers) == NOTHING


def test_replicas_of_a_source_that_failed_for_long_go_if_they_do_not_answer_either():
    roster = opened()
    roster.told("s", [A, B], 0.0)
    roster.look(0.0, answers)
    roster.failed("s", "no route", 1.0)

    assert roster.look(1.0 + KEEP_S - 0.1, silent) == NOTHING
    assert roster.look(1.0 + KEEP_S, lambda url: url == A.url) == Changes([], [], [B.url])


def test_an_answer_in_between_makes_a_failure_short():
    roster = opened()
    roster.told("s", [A], 0.0)
    roster.look(0.0, answers)
    roster.failed("s", "no route", 1.0)
    roster.told("s", [A], 2.0)
    roster.failed("s", "no route", 3.0)

    assert roster.look(2.0 + KEEP_S, silent) == NOTHING


def test_an_empty_answer_is_believed_only_after_a_while():
    roster = opened()
    roster.told("s", [A, B], 0.0)
    roster.look(0.0, answers)

    roster.told("s", [], 1.0)
    assert roster.look(1.0 + EMPTY_S - 0.1, answers) == NOTHING
    roster.told("s", [], 1.0 + EMPTY_S - 0.1)

    assert roster.look(1.0 + EMPTY_S, answers) == Changes([], [], [A.url, B.url])


def test_a_failure_starts_the_time_of_an_empty_answer_anew():
    roster = opened()
    roster.told("s", [A], 0.0)
    roster.look(0.0, answers)
    roster.told("s", [], 1.0)
    roster.failed("s", "no route", 20.0)
    roster.told("s", [], 21.0)

    assert roster.look(21.0 + EMPTY_S - 0.1, answers) == NOTHING
    assert roster.look(21.0 + EMPTY_S, answers) == Changes([], [], [A.url])


def test_a_view_of_urls_that_can_be_no_replicas_is_an_empty_one():
    roster = opened()
    roster.told("s", [A], 0.0)
    roster.look(0.0, answers)

    [note] = roster.told("s", [Told("http://169.254.169.254:80")], 1.0)

    assert "169.254.169.254" in note
    assert roster.look(1.0 + EMPTY_S - 0.1, answers) == NOTHING


def test_a_refused_url_is_told_of_once_for_as_long_as_it_is_told():
    roster = opened()
    bad = Told("http://metadata.google.internal:80")

    assert len(roster.told("s", [A, bad], 0.0)) == 1
    assert roster.told("s", [A, bad], 1.0) == []
    assert roster.told("s", [A], 2.0) == []
    assert len(roster.told("s", [A, bad], 3.0)) == 1
    assert roster.look(3.0, answers).joined == [A]


def test_a_source_whose_answers_are_parts_lets_go_late():
    roster = opened(linger_s=15.0)
    roster.told("s", [A, B], 0.0)
    roster.look(0.0, answers)
    roster.told("s", [A], 5.0)
    roster.told("s", [B], 10.0)
    roster.told("s", [A], 15.0)

    assert roster.look(29.9, answers) == NOTHING
    assert roster.look(30.0, answers) == Changes([], [], [B.url])


def test_the_union_of_sources_counts():
    roster = opened("one", "two")
    roster.told("one", [A, B], 0.0)
    roster.told("two", [Told("http://10.0.0.2:8000/")], 0.0)  # B in another spelling
    assert roster.look(0.0, answers).joined == [A, B]

    roster.told("one", [A], 1.0)
    assert roster.look(1.0, answers) == NOTHING
    roster.told("two", [C], 2.0)

    assert roster.look(2.0, answers) == Changes([C], [], [B.url])


def test_what_was_given_for_good_stays():
    roster = Roster()
    roster.open("command line", is_fixed=True)
    roster.open("s")
    roster.told("command line", [A], 0.0)
    roster.told("s", [A, B], 0.0)
    roster.look(0.0, answers)

    roster.told("s", [C], 1.0)
    roster.told("command line", [], 1.0)

    assert roster.look(1e6, silent) == Changes([C], [], [B.url])
    assert [status.name for status in roster.status()] == ["s"]


def test_a_replica_drains_while_one_source_says_so():
    roster = opened("one", "two")
    drained = A._replace(is_draining=True)
    roster.told("one", [A], 0.0)
    roster.told("two", [A], 0.0)
    roster.look(0.0, answers)

    roster.told("two", [drained], 1.0)
    assert roster.look(1.0, answers) == Changes([], [(A.url, True)], [])
    assert roster.look(1.0, answers) == NOTHING
    roster.told("two", [A], 2.0)

    assert roster.look(2.0, answers) == Changes([], [(A.url, False)], [])


def test_one_that_joins_while_it_drains_says_so():
    roster = opened()
    roster.told("s", [A._replace(is_draining=True, name="pod-1")], 0.0)

    [told] = roster.look(0.0, answers).joined

    assert told == Told(A.url, "pod-1", is_draining=True)


def many(number: int, start: int = 0) -> list[Told]:
    return [Told(f"http://10.1.{n >> 8}.{n & 255}:80") for n in range(start, start + number)]


def test_so_many_replicas_and_no_more_and_members_stay():
    roster = opened("first", "flood")
    roster.told("flood", many(MAX_REPLICAS), 0.0)
    assert len(roster.look(0.0, answers).joined) == MAX_REPLICAS
    assert roster.num_beyond == 0

    roster.told("first", [A], 1.0)
    assert roster.look(1.0, answers) == NOTHING
    assert roster.num_beyond == 1

    roster.told("flood", many(MAX_REPLICAS - 1), 2.0)
    changes = roster.look(2.0, answers)
    assert changes.joined == [A]
    assert len(changes.left) == 1
    assert roster.num_beyond == 0


def test_it_is_told_when_each_source_has_answered_or_failed():
    roster = opened("one", "two")
    assert not roster.is_told
    roster.told("one", [], 0.0)
    assert not roster.is_told
    roster.failed("two", "no route", 0.0)
    assert roster.is_told


def test_those_that_registered_are_there_until_they_expire():
    entries = [(A.url, 10.0), (B.url, 20.0)]

    assert registered(entries, 9.9) == [A, B]
    assert registered(entries, 10.0) == [B]
    assert registered(entries, 20.0) == []


URLS = st.lists(st.sampled_from([A, B, C, *(t._replace(is_draining=True) for t in (A, B))]))
STEPS = st.tuples(st.sampled_from(["one", "two"]), st.one_of(st.none(), URLS), st.integers(0, 20))


@settings(max_examples=300)
@given(st.lists(STEPS, max_size=40), st.booleans())
def test_changes_add_up_and_in_the_end_the_union_is_there(steps, is_answering):
    """A fleet that did what it was told has the members of the roster; after a quiet time these
    are the union of the last views."""
    roster = opened("one", "two")
    fleet: dict[str, bool] = {}
    last: dict[str, list[Told]] = {"one": [], "two": []}
    now = 0.0

    def apply() -> None:
        changes = roster.look(now, lambda _: is_answering)
        for told in changes.joined:
            assert told.url not in fleet
            fleet[told.url] = told.is_draining
        for url, is_draining in changes.draining:
            assert fleet[url] is not is_draining
            fleet[url] = is_draining
        for url in changes.left:
            del fleet[url]

    for source, view, seconds in steps:
        now += seconds
        if view is None:
            roster.failed(source, "no route", now)
        else:
            roster.told(source, view, now)
            last[source] = view
        apply()
    for source, view in last.items():
        roster.told(source, view, now)
    now += EMPTY_S
    apply()

    expected: dict[str, bool] = {}
    for view in last.values():
        first: dict[str, bool] = {}
        for told in view:
            first.setdefault(told.url, told.is_draining)
        for url, is_draining in first.items():
            expected[url] = expected.get(url, False) or is_draining
    assert fleet == expected
