"""Each fuzz target on its seeds and a few thousand mutations of them, the same every time."""

from __future__ import annotations

from itertools import islice
from random import Random

import pytest
from fuzz_mutations import mutations
from fuzz_targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_input_is_taken_or_refused(name):
    run, seeds = TARGETS[name]

    for data in islice(mutations(seeds, Random(name)), 3000):
        run(data)
