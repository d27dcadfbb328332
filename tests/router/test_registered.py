"""Lives of those that registered themselves, as one router counts them."""

from __future__ import annotations

from roost_router.discovery.registered import Register, Registration

A, B = "http://a", "http://b"
LIFE_S = 10.0


def entry(
    url: str = A, mark: int = 0, *, left_s: float = LIFE_S, is_here: bool = True, process: str = "p"
) -> Registration:
    """What the store has of a member after beat `mark`."""
    member = f"{process} {url}".encode()
    return Registration(member, b"%d" % mark, url, LIFE_S, left_s, is_here)


class Hearing:
    """A register, and the URLs it tells."""

    def __init__(self) -> None:
        self.register = Register()

    def __call__(self, now: float, *there: Registration) -> list[str]:
        return [told.url for told in self.register.hear(there, now)]


def test_who_is_renewed_stays():
    hear = Hearing()

    for now in range(30):
        assert hear(float(now), entry(mark=now)) == [A]


def test_a_life_is_over_at_its_end_and_not_before():
    hear = Hearing()
    hear(0.0, entry(left_s=7.0))

    assert hear(6.9, entry(left_s=0.1)) == [A]
    assert hear(7.0, entry(left_s=0.1)) == []


def test_a_store_whose_clock_was_set_back_keeps_nobody_alive():
    hear = Hearing()
    for now in range(60):
        told = hear(float(now), entry(left_s=1e6))
        assert told == ([A] if now < LIFE_S else [])


def test_who_is_not_in_the_store_for_a_moment_stays():
    hear = Hearing()
    hear(0.0, entry(A), entry(B))

    assert hear(1.0) == [A, B]  # flushed
    assert hear(2.0, entry(B, mark=1)) == [A, B]  # one was faster than the other
    assert hear(10.0, entry(B, mark=1)) == [B]


def test_goodbye_counts_at_once():
    hear = Hearing()
    hear(0.0, entry(A), entry(B))

    assert hear(1.0, entry(A, mark=1, is_here=False), entry(B)) == [B]
    assert hear(1.5, entry(B)) == [B]
    assert hear(2.0, entry(A, mark=2), entry(B)) == [A, B]


def test_a_replica_is_here_while_one_process_says_so():
    hear = Hearing()
    hear(0.0, entry(process="old"), entry(process="new"))

    told = hear(1.0, entry(process="old", mark=1, is_here=False), entry(process="new", mark=1))

    assert told == [A]


def test_after_the_store_was_away_everybody_has_a_life_to_be_heard_again():
    hear = Hearing()
    hear(0.0, entry(A), entry(B))

    hear.register.reprieve(100.0)

    assert hear(100.0) == [A, B]
    assert hear(101.0, entry(B, mark=1)) == [A, B]
    assert hear(109.9, entry(B, mark=2)) == [A, B]
    assert hear(110.0, entry(B, mark=3)) == [B]


def test_a_reprieve_shortens_no_life_and_wakes_nobody_who_left():
    hear = Hearing()
    hear(0.0, entry(A), entry(B, is_here=False))

    hear.register.reprieve(-5.0)

    assert hear(9.9) == [A]
    hear.register.reprieve(9.9)
    assert hear(9.9) == [A]


def test_nothing_is_kept_of_the_dead():
    hear = Hearing()
    for number in range(100):
        hear(float(number), entry(f"http://h{number}"))

    assert len(hear.register._heard) <= LIFE_S + 1
