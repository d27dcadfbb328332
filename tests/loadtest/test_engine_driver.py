"""The driver's clock and commands, on an engine whose steps are written down."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from roost_loadtest.engine_driver import measure_decode, measure_prefill, serve_commands


class ScriptedEngine:
    """Gives one token a step to every request, the first of each only after its own delay."""

    def __init__(self, delays: tuple[int, ...] = (0,)) -> None:
        self._delays = delays
        self.added: list[tuple[str, list[int], int]] = []
        self._left: dict[str, int] = {}
        self._wait: dict[str, int] = {}

    def info(self) -> dict[str, Any]:
        return {"version": "scripted"}

    def add(self, request_id: str, prompt_ids: list[int], max_tokens: int) -> None:
        self._left[request_id] = max_tokens
        self._wait[request_id] = self._delays[len(self.added) % len(self._delays)]
        self.added.append((request_id, prompt_ids, max_tokens))

    def step(self) -> list[str]:
        grown = [name for name, wait in self._wait.items() if wait == 0 and self._left[name]]
        for name in grown:
            self._left[name] -= 1
        self._wait = {name: max(0, wait - 1) for name, wait in self._wait.items()}
        return grown


def test_decode_counts_only_tokens_after_every_request_has_one() -> None:
    engine = ScriptedEngine(delays=(0, 3))

    measured = measure_decode(engine, batch=2, prompt_tokens=8, new_tokens=10, seed=1)

    # 2 x 11 in all; when the late one had its first, the early one had 4: 5 came before.
    assert measured["tokens"] == 22 - 5


def test_decode_asks_for_the_sizes_it_was_told() -> None:
    engine = ScriptedEngine()

    measure_decode(engine, batch=3, prompt_tokens=8, new_tokens=10, seed=1)

    assert [(len(prompt), tokens) for _, prompt, tokens in engine.added] == [(8, 11)] * 3


def test_prefill_waits_for_the_first_token() -> None:
    engine = ScriptedEngine(delays=(5,))

    measured = measure_prefill(engine, tokens=100, seed=1)

    assert measured["tokens"] == 100
    assert engine.step() == []  # the one token it asked for is out


def test_prompts_differ_between_measurements_and_requests() -> None:
    engine = ScriptedEngine()

    for seed in (1, 2):
        measure_decode(engine, batch=2, prompt_tokens=8, new_tokens=1, seed=seed)

    assert len({tuple(prompt) for _, prompt, _ in engine.added}) == 4


def test_commands_are_answered_in_order_after_the_ready_line() -> None:
    commands = [
        {"op": "prefill", "tokens": 16, "seed": 1},
        {"op": "decode", "batch": 1, "prompt_tokens": 4, "new_tokens": 2, "seed": 2},
    ]
    answers = io.StringIO()

    lines = io.StringIO("".join(json.dumps(command) + "\n" for command in commands))
    serve_commands(ScriptedEngine(), lines, answers)

    ready, prefill, decode = map(json.loads, answers.getvalue().splitlines())
    assert ready == {"ready": {"version": "scripted"}}
    assert (prefill["tokens"], decode["tokens"]) == (16, 2)


@pytest.mark.model
@pytest.mark.parametrize("kind", ["SteppedRunner", "SteppedEngine"])
def test_both_depths_of_ours_compute_what_is_asked(kind: str) -> None:
    """600 prompt tokens take two steps of 512; the requests end, so the next ones fit again."""
    from roost_loadtest import engine_driver_roost as ours

    engine = getattr(ours, kind)(model="smollm2", weights="stored", threads=2)
    for seed in range(2):
        prefill = measure_prefill(engine, tokens=600, seed=seed)
        decode = measure_decode(engine, batch=4, prompt_tokens=40, new_tokens=3, seed=seed)

        assert (prefill["tokens"], decode["tokens"]) == (600, 12)
    assert engine.info()["weight_bytes"] == 96_576_768
