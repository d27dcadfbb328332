"""Options of a replica that cannot work: told before seconds or memory are spent on them."""

from __future__ import annotations

import pytest
from shapes import SMOLLM2

from roost_engine import serve
from roost_engine.chat import ChatTemplate
from roost_engine.loader import LoadedModel
from roost_engine.serve import ServeConfig, ServeError, build_replica
from roost_engine.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of SmolLM2's shape, without weights."""
    loaded = LoadedModel("tiny", SMOLLM2, {}, Tokenizer.__new__(Tokenizer), ChatTemplate(None))
    monkeypatch.setattr(serve, "load_model", lambda *_: loaded)


def test_the_defaults_are_those_of_the_command_line() -> None:
    config = ServeConfig(model="x")

    assert (config.host, config.port) == ("127.0.0.1", 8101)


@pytest.mark.parametrize(("weights", "size"), [("float32", "46080000.0"), ("stored", "23040000.0")])
def test_a_kv_cache_larger_than_the_machine_is_refused_before_it_is_allocated(
    weights: str, size: str
) -> None:
    config = ServeConfig(model="x", kv_tokens=10**12, weights=weights)  # type: ignore[arg-type]

    with pytest.raises(ServeError, match=f"KV cache would take {size} GB .* lower kv_tokens"):
        build_replica(config)


def test_on_a_gpu_the_machine_need_only_hold_the_host_tier() -> None:
    gpu = {"model": "x", "kv_tokens": 10**12, "device": "cuda"}

    with pytest.raises(ServeError, match=r"torch finds no GPU|cuda:0 has .* free; lower kv_tokens"):
        build_replica(ServeConfig(**gpu))  # type: ignore[arg-type]
    with pytest.raises(ServeError, match=r"this process may use .* lower kv_tokens or host_kv_tok"):
        build_replica(ServeConfig(**gpu, host_kv_tokens=10**12))  # type: ignore[arg-type]


def test_where_the_system_does_not_tell_its_memory_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve, "usable_memory_bytes", lambda: None)

    serve._check_memory(10**18, 0)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_model_len": -1}, "max_model_len must be at least 1"),
        ({"max_model_len": 8193}, "exceeds the model's 8192 tokens"),
        ({"max_running": 0}, "max_running must be at least 1"),
        ({"max_waiting": -1}, "max_waiting must not be negative"),
        ({"kv_tokens": 999}, "cannot hold one request"),
    ],
)
def test_limits_that_contradict_each_other_are_the_operators_fault(
    options: dict[str, int], problem: str
) -> None:
    with pytest.raises(ServeError, match=problem):
        build_replica(ServeConfig(model="x", **options))  # type: ignore[arg-type]
