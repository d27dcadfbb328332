"""A short soak of every family; `make simulation` and `make soak` run for longer."""

from __future__ import annotations

import pytest

from roost_loadtest.simulation import soak
from roost_loadtest.simulation.families import FAMILIES, run
from roost_loadtest.simulation.judge import Outcome

#: Seeds of each family in the quick loop.
_NUM_SEEDS = 8


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_promised_and_not_kept(family):
    tally = soak.soak(rounds=_NUM_SEEDS, families=[family])

    assert not tally.failures, "\n".join(map(str, tally.failures))


def test_the_families_do_what_they_are_for():
    """A simulation in which nothing happens would pass as well."""
    resuming = ("broken_mid_stream", "clean_end", "error_event", "silent_mid_stream", "killed")
    others = ("leaving", "all_failing", "draining", "calm", "refused")
    runs = {
        family: [run(family, seed) for seed in range(_NUM_SEEDS)] for family in resuming + others
    }
    ends = {
        family: {call.outcome for result in results for call in result.calls}
        for family, results in runs.items()
    }

    for family in resuming:
        assert sum(result.num_resumed for result in runs[family]) > 0
        assert Outcome.OK in ends[family]
    assert Outcome.GONE in ends["leaving"]
    assert {Outcome.LOST, Outcome.ERROR} <= ends["all_failing"]
    assert Outcome.UNREACHED in ends["draining"]
    assert ends["calm"] == ends["refused"] == {Outcome.OK}


def test_a_failure_says_how_to_see_it_again():
    failure = soak.Failure("calm", 5, ["something"])

    assert "calm, seed 5" in str(failure)
    assert "python -m roost_loadtest.simulation --family calm --seed 5" in str(failure)


def test_a_soak_ends_when_its_time_is_over():
    tally = soak.soak(seconds=0.0)

    assert tally.num_runs == 0
