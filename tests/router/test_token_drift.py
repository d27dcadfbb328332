from __future__ import annotations

from roost_router.tokens import drift
from roost_router.tokens.drift import DriftWatch


def test_a_replica_that_always_counts_otherwise_drifts_after_eight_prompts():
    watch = DriftWatch()

    changes = [watch.compare("m", "r", 100, 107) for _ in range(40)]

    assert [change is not None for change in changes].index(True) == 7
    assert sum(change is not None for change in changes) == 1
    change = changes[7]
    assert change is not None
    assert (change.is_drifting, change.num_differing, change.num_compared) == (True, 8, 8)
    assert "107 instead of 100" in str(change)
    assert "--tokenizer" in str(change)
    assert watch.is_drifting("m", "r")
    assert not watch.is_drifting("m", "other")
    assert not watch.is_drifting("other", "r")


def test_a_few_prompts_that_differ_are_no_drift():
    watch = DriftWatch()

    changes = [watch.compare("m", "r", 100, 100 + (n % 8 == 0)) for n in range(1, 2000)]

    assert not any(changes)


def test_a_quarter_that_differs_is_drift():
    watch = DriftWatch()

    changes = [watch.compare("m", "r", 100, 100 + (n % 4 == 0)) for n in range(64)]

    assert [change.is_drifting for change in changes if change] == [True]


def test_drift_is_over_once_less_than_an_eighth_differs():
    watch = DriftWatch()
    for _ in range(50):
        watch.compare("m", "r", 10, 11)

    changes = [watch.compare("m", "r", 10, 10) for _ in range(40)]

    [over] = [change for change in changes if change]
    assert changes.index(over) == 28  # 3 of the last 32 differ
    assert not over.is_drifting
    assert "again" in str(over)
    assert not watch.is_drifting("m", "r")


def test_a_replica_that_starts_anew_is_judged_anew():
    watch = DriftWatch()
    for _ in range(9):
        watch.compare("m", "r", 10, 11)
        watch.compare("m", "other", 10, 11)

    watch.forget("r")

    assert not watch.is_drifting("m", "r")
    assert watch.is_drifting("m", "other")


def test_pairs_are_bounded(monkeypatch):
    monkeypatch.setattr(drift, "_MAX_PAIRS", 3)
    watch = DriftWatch()
    for name in "abcd":
        for _ in range(8):
            watch.compare("m", name, 1, 2)

    assert [watch.is_drifting("m", name) for name in "abcd"] == [False, True, True, True]
