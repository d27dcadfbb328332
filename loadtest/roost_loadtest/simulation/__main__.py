"""`python -m roost_loadtest.simulation`: soak, or replay one run with its log."""

from __future__ import annotations

import argparse
import sys

from roost_loadtest.simulation.families import FAMILIES, run
from roost_loadtest.simulation.soak import soak


def main() -> int:
    """Return the exit status: 1 if a run broke a promise."""
    parser = argparse.ArgumentParser(prog="python -m roost_loadtest.simulation")
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds to soak for")
    parser.add_argument("--family", choices=FAMILIES, help="only this family")
    parser.add_argument("--seed", type=int, help="replay this run of --family, with its log")
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    if options.seed is not None:
        if options.family is None:
            parser.error("--seed needs --family")
        result = run(options.family, options.seed)
        print("\n".join(result.rendered_log()))
        print("\n".join(f"FOUND {text}" for text in result.findings) or "nothing found")
        return bool(result.findings)
    tally = soak(
        seconds=options.seconds,
        families=[options.family] if options.family else FAMILIES,
        first_seed=options.first_seed,
    )
    for failure in tally.failures:
        print(failure)
    print(tally)
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
