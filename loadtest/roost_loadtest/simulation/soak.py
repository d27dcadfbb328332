"""Many runs: family after family, seed after seed, for a budget of CPU seconds or of runs."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec

from roost_loadtest.simulation.families import FAMILIES, run


class Failure(msgspec.Struct, frozen=True):
    """A run that broke a promise."""

    family: str
    seed: int
    findings: list[str]

    def __str__(self) -> str:
        """What to read, and how to see it happen again."""
        lines = [f"{self.family}, seed {self.seed}:", *(f"  {text}" for text in self.findings[:8])]
        lines.append(f"  replay: {replay_command(self.family, self.seed)}")
        return "\n".join(lines)


class Tally(msgspec.Struct):
    """What a soak has done."""

    num_runs: int = 0
    num_requests: int = 0
    num_legs: int = 0
    num_resumed: int = 0
    cpu_s: float = 0.0
    failures: list[Failure] = []

    def __str__(self) -> str:
        """One line."""
        rate = self.num_requests / max(self.cpu_s, 1e-9)
        return (
            f"{self.num_runs} runs, {self.num_requests} requests, {self.num_legs} legs, "
            f"{self.num_resumed} resumed; {rate:.0f} requests a CPU second; "
            f"{len(self.failures)} runs failed"
        )


def replay_command(family: str, seed: int) -> str:
    """Shows one run with its log."""
    return f"python -m roost_loadtest.simulation --family {family} --seed {seed}"


def soak(
    *,
    seconds: float | None = None,
    rounds: int | None = None,
    families: Iterable[str] = FAMILIES,
    first_seed: int = 0,
    max_failures: int = 5,
) -> Tally:
    """Run all `families` with seed after seed until `seconds` of CPU or `rounds` are over."""
    tally, begun_at = Tally(), time.process_time()
    seed, names = first_seed, list(families)
    while len(tally.failures) < max_failures:
        if rounds is not None and seed >= first_seed + rounds:
            break
        for family in names:
            tally.cpu_s = time.process_time() - begun_at
            if seconds is not None and tally.cpu_s >= seconds:
                return tally
            result = run(family, seed)
            tally.num_runs += 1
            tally.num_requests += len(result.calls)
            tally.num_legs += result.num_legs
            tally.num_resumed += result.num_resumed
            if result.findings:
                tally.failures.append(Failure(family, seed, result.findings))
        seed += 1
    tally.cpu_s = time.process_time() - begun_at
    return tally
