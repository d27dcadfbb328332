"""How long a client's connection may take: every limit at its edge."""

from __future__ import annotations

import pytest

from roost_router.config import RouterConfig
from roost_router.http.patience import LINGER_S, MIN_BODY_BYTES_PER_S, For, Patience, Waiting

LIMITS = RouterConfig(
    replicas=("http://127.0.0.1:1",),
    head_timeout_s=10.0,
    keepalive_s=75.0,
    body_stall_s=30.0,
    write_stall_s=20.0,
)


@pytest.mark.parametrize(
    ("what", "limit_s"),
    [
        (For.FIRST, 10.0),
        (For.HEAD, 10.0),
        (For.IDLE, 75.0),
        (For.BODY, 30.0),
        (For.WRITE, 20.0),
        (For.LINGER, LINGER_S),
    ],
)
def test_each_wait_ends_at_its_limit_and_not_before(what, limit_s):
    patience, waiting = Patience(), Waiting(what, 3, 7)

    assert not patience.is_over(waiting, LIMITS, 100.0)
    assert not patience.is_over(waiting, LIMITS, 100.0 + limit_s - 0.001)
    assert patience.is_over(waiting, LIMITS, 100.0 + limit_s)


def test_an_answer_is_waited_for_without_end():
    patience, waiting = Patience(), Waiting(For.ANSWER, 1, 0)

    assert not patience.is_over(waiting, LIMITS, 0.0)
    assert not patience.is_over(waiting, LIMITS, 1e9)


@pytest.mark.parametrize("what", [For.WRITE, For.BODY])
def test_bytes_are_progress(what):
    patience = Patience()

    for second in range(0, 1000, 10):
        waiting = Waiting(what, 0, second * MIN_BODY_BYTES_PER_S)
        assert not patience.is_over(waiting, LIMITS, float(second))


@pytest.mark.parametrize("what", list(For))
def test_another_request_or_another_wait_starts_anew(what):
    patience = Patience()

    for number in range(100):
        assert not patience.is_over(Waiting(what, number, 0), LIMITS, number * 60.0)
        assert not patience.is_over(Waiting(For.ANSWER, number, 0), LIMITS, number * 60.0 + 30)


def test_a_body_that_trickles_ends_by_its_average():
    """slowhttptest -B sends a few bytes every few seconds, for ever."""
    patience, ended_at = Patience(), None
    for second in range(200):
        num_bytes = second * (MIN_BODY_BYTES_PER_S // 4)
        if patience.is_over(Waiting(For.BODY, 0, num_bytes), LIMITS, float(second)):
            ended_at = second
            break

    assert ended_at == 40  # 30 s + 40 s * 128 B/s / 512 B/s


def test_a_head_that_trickles_has_no_more_time():
    """Bytes of a head are no progress: its wait is the same however many came."""
    patience = Patience()
    over = [patience.is_over(Waiting(For.HEAD, 0, 0), LIMITS, float(s)) for s in range(12)]

    assert over == [False] * 10 + [True] * 2
