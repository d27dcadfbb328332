"""Drives an engine without a server and times it: one loop and one clock for every engine.

A program of its own, run by path under the interpreter of the engine it measures, so that a peer
with its own dependencies needs nothing of ours: only the standard library is imported here before
the engine itself. It reads commands from stdin, one JSON object a line, and answers each on stdout:

    {"op": "prefill", "tokens": 512, "seed": 1}              {"tokens": 512, "seconds": 0.31}
    {"op": "decode", "batch": 16, "prompt_tokens": 32,
     "new_tokens": 64, "seed": 1}                            {"tokens": 1024, "seconds": 0.98}

The first line it writes is {"ready": {...}} with what it drives. Whatever libraries print goes to
stderr. The prompts are random token ids, new in every measurement: no prefix cache can help.

What is timed:
    prefill  from handing over one prompt to its first token
    decode   from the step after which every request has a token, to the last token. Only tokens
             of that window are counted; computing the prompts is outside of it.

Not here: how often, in which order, beside whom (bench_engine.py).
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

_LOWEST_ID, _HIGHEST_ID = 1000, 30_000  # ordinary tokens in every vocabulary that we measure


class Driven(Protocol):
    """An engine, stepped by hand."""

    def info(self) -> dict[str, Any]:
        """What is driven: versions, sizes."""
        ...

    def add(self, request_id: str, prompt_ids: list[int], max_tokens: int) -> None:
        """Queue a greedy request that goes on after an end-of-sequence token."""
        ...

    def step(self) -> list[str]:
        """Compute one step; the request's id once for each token that came out."""
        ...


def measure_prefill(engine: Driven, *, tokens: int, seed: int) -> dict[str, float]:
    """Seconds from one prompt of `tokens` to its first token."""
    prompt = _prompts(1, tokens, seed)[0]
    started = time.perf_counter()
    engine.add(f"prefill-{seed}", prompt, 1)
    while not engine.step():
        pass
    return {"tokens": tokens, "seconds": time.perf_counter() - started}


def measure_decode(
    engine: Driven, *, batch: int, prompt_tokens: int, new_tokens: int, seed: int
) -> dict[str, float]:
    """Tokens and seconds of the window in which all of `batch` requests decode."""
    for number, prompt in enumerate(_prompts(batch, prompt_tokens, seed)):
        engine.add(f"decode-{seed}-{number}", prompt, new_tokens + 1)
    counts: Counter[str] = Counter()
    while len(counts) < batch:
        counts.update(engine.step())
    before, started = counts.total(), time.perf_counter()
    while counts.total() < batch * (new_tokens + 1):
        counts.update(engine.step())
    return {"tokens": counts.total() - before, "seconds": time.perf_counter() - started}


def serve_commands(engine: Driven, commands: TextIO, answers: TextIO) -> None:
    """Answer commands until stdin ends."""
    operations: dict[str, Callable[..., dict[str, float]]] = {
        "prefill": measure_prefill,
        "decode": measure_decode,
    }
    _write(answers, {"ready": engine.info()})
    for line in commands:
        command = json.loads(line)
        _write(answers, operations[command.pop("op")](engine, **command))


class VllmEngine:
    """vLLM's offline engine, as its LLM class drives it, without turning tokens into text."""

    def __init__(self, model: str, dtype: str) -> None:
        import vllm  # noqa: PLC0415 - only where vLLM is what runs this file

        self._version = vllm.__version__
        self._params = vllm.SamplingParams
        # The prefix cache stays on, as in production; no prompt comes twice.
        self._engine = vllm.LLM(model=model, dtype=dtype, max_model_len=4096).llm_engine
        self._num_tokens: dict[str, int] = {}

    def info(self) -> dict[str, Any]:
        """Version of vLLM."""
        return {"version": self._version}

    def add(self, request_id: str, prompt_ids: list[int], max_tokens: int) -> None:
        """See Driven."""
        params = self._params(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        self._engine.add_request(request_id, {"prompt_token_ids": prompt_ids}, params)
        self._num_tokens[request_id] = 0

    def step(self) -> list[str]:
        """See Driven; outputs are cumulative, so what is new is the difference."""
        grown: list[str] = []
        for output in self._engine.step():
            length = len(output.outputs[0].token_ids)
            grown += [output.request_id] * (length - self._num_tokens[output.request_id])
            self._num_tokens[output.request_id] = length
        return grown


def _prompts(count: int, length: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(_LOWEST_ID, _HIGHEST_ID) for _ in range(length)] for _ in range(count)]


def _write(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _build(kind: str, options: dict[str, Any]) -> Driven:
    if kind == "vllm":
        return VllmEngine(**options)
    # Ours is imported only where it is installed: under vLLM's interpreter it is not.
    from roost_loadtest import engine_driver_roost as ours  # noqa: PLC0415

    return ours.SteppedEngine(**options) if kind == "roost" else ours.SteppedRunner(**options)


def main() -> None:
    """`engine_driver.py KIND OPTIONS`, the options as one JSON object."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve_commands(_build(sys.argv[1], json.loads(sys.argv[2])), sys.stdin, answers)


if __name__ == "__main__":
    main()
