"""Fuzz one target or all of them: `python tests/fuzz/fuzz.py SECONDS [TARGET ...]`.

With atheris (pip install atheris) inputs are guided by coverage; without it they are random
mutations of the seeds. Each target runs in a process of its own, so that one that hangs or eats
memory ends there. What breaks is written to build/fuzz and printed; it becomes a test.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

atheris = None
if sys.argv[1:2] == ["--one"]:  # the parent process needs no coverage
    with contextlib.suppress(ImportError):
        import atheris

from fuzz_mutations import mutations
from fuzz_targets import TARGETS

OUT = Path("build/fuzz")
_MAX_INPUT_BYTES = 4096
_MAX_INPUT_S = 10  # for one input
_MAX_RSS_MB = 1024


def fuzz(name: str, seconds: int) -> None:
    """Never returns with atheris: libFuzzer ends the process, with a code for what it found."""
    run, seeds = TARGETS[name]
    corpus = OUT / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed{number}").write_bytes(seed)
    if atheris is not None:
        limits = [f"-max_total_time={seconds}", f"-max_len={_MAX_INPUT_BYTES}"]
        limits += [f"-timeout={_MAX_INPUT_S}", f"-rss_limit_mb={_MAX_RSS_MB}"]
        quiet = ["-print_final_stats=1", "-verbosity=0"]
        found = [f"-artifact_prefix={OUT}/{name}-"]
        atheris.Setup([sys.argv[0], *limits, *quiet, *found, str(corpus)], run)
        atheris.Fuzz()
    deadline, num_inputs = time.monotonic() + seconds, 0
    for data in mutations(seeds, Random()):
        try:
            run(data)
        except BaseException:
            (OUT / f"{name}-crash").write_bytes(data)
            raise
        num_inputs += 1
        if time.monotonic() > deadline:
            break
    print(f"stat::number_of_executed_units: {num_inputs}")


def main(seconds: int, names: list[str]) -> int:
    """Fuzz each of `names` for so many seconds; the number of those that broke."""
    num_broken = 0
    for name in names:
        command = [sys.executable, __file__, "--one", name, str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        shown = done.stdout + done.stderr
        inputs = [line.split()[-1] for line in shown.splitlines() if "number_of_executed" in line]
        verdict = "no defect" if done.returncode == 0 else f"BROKE\n{shown[-3000:]}"
        print(f"{name}: {' '.join(inputs)} inputs in {seconds} s, {verdict}", flush=True)
        num_broken += done.returncode != 0
    return num_broken


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        fuzz(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(main(int(sys.argv[1]), sys.argv[2:] or list(TARGETS)))
