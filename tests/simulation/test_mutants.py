"""The simulation notices bugs: each of a list of one-line bugs is found within a few runs."""

from __future__ import annotations

import pytest
from mutants import MUTANTS
from mutation import Mutant, mutated

pytestmark = pytest.mark.simulation

#: Runs of each family that a mutant may take until it is noticed.
_MAX_SEEDS = 40


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.module}: {m.old} -> {m.new}")
def test_each_planted_bug_is_noticed(mutant):
    assert _seeds_until_noticed(mutant) is not None


def _seeds_until_noticed(mutant: Mutant) -> int | None:
    with mutated(mutant) as families:
        for seed in range(_MAX_SEEDS):
            for family in mutant.families:
                if families.run(family, seed).findings:
                    return seed
    return None


def test_there_are_enough_of_them():
    assert len(set(MUTANTS)) == len(MUTANTS) >= 30
