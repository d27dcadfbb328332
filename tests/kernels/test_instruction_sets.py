"""The kernels compiled for other processors: the same logits, the same independence of rows."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import numpy as np
import pytest
from native import needs_native
from tiny_models import VOCAB, hf_model, load_saved, stored_as

from roost_engine.batch import Chunk
from roost_engine.config import CacheConfig
from roost_engine.loader import LoadedModel
from roost_engine.native_runner import NativeRunner, WeightFormat
from roost_engine.request import SamplingParams
from roost_engine.sampling import sample_plain
from roost_kernels import native_build
from roost_kernels.cpu_sampling import sample_rows
from roost_kernels.native_library import instruction_set

pytestmark = [pytest.mark.model, needs_native]  # compiling takes some seconds for each

PROMPT = [(11 * i + i * i) % VOCAB for i in range(60)]
#: -march -> what a processor must have to run it, and what the kernels call it.
MACHINES = {
    "x86-64-v2": ("ssse3", "generic"),
    "x86-64-v3": ("avx2", "avx2"),
    "x86-64-v4": ("avx512vl", "avx512"),
}


def _compiled_for(machine: str) -> ctypes.CDLL:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.exists() else []
    if platform.machine() != "x86_64" or MACHINES[machine][0] not in flags:
        pytest.skip(f"this processor does not run {machine}")
    replaced = {"-march=native": f"-march={machine}", "-O2": "-O1"}
    return ctypes.CDLL(
        str(native_build.build(tuple(replaced.get(flag, flag) for flag in native_build._FLAGS)))
    )


def _logits(model: LoadedModel, weights: WeightFormat, size: int) -> np.ndarray:
    """After the prompt, computed in chunks of `size`."""
    cache = CacheConfig(num_blocks=8)
    runner = NativeRunner(model, cache, weights=weights, max_step_tokens=64, num_threads=2)
    for start in range(0, len(PROMPT), size):
        chunk = Chunk(PROMPT[start : start + size], start, [5, 2, 7, 0], True)
        logits = runner.forward([chunk])
    return logits[0].copy()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_other_processors_compute_the_same(
    machine: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_saved(hf_model(name, head_dim=32, intermediate_size=128), tmp_path)
    formats: dict[str, tuple[LoadedModel, WeightFormat]] = {
        "float32": (model, "float32"),
        "bfloat16": (model, "bfloat16"),
        "8 bits": (stored_as(model, "q8_0"), "stored"),
        "4 bits": (stored_as(model, "q4_1"), "stored"),
    }
    expected = {name: _logits(*each, 60) for name, each in formats.items()}

    library = _compiled_for(machine)
    monkeypatch.setattr(native_build, "load", lambda: library)

    assert instruction_set() == MACHINES[machine][1]
    for what, each in formats.items():
        whole = _logits(*each, 60)
        assert np.abs(whole - expected[what]).max() < 0.02 * np.abs(whole).max(), what
        assert np.array_equal(_logits(*each, 7), whole), what
        assert np.array_equal(_logits(*each, 1), whole), what
    np.testing.assert_allclose(_logits(model, "float32", 60), expected["float32"], atol=1e-4)


@pytest.mark.parametrize("machine", MACHINES)
def test_other_processors_draw_the_same_tokens(
    machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = np.random.default_rng(5).normal(0, 4, (40, 3000)).astype(np.float32)
    requests = [
        SamplingParams(max_tokens=1, temperature=0.1 * i, seed=i, top_p=1.0 - 0.01 * i)
        for i in range(40)
    ]
    expected = sample_plain(logits, requests, range(40))

    library = _compiled_for(machine)
    monkeypatch.setattr(native_build, "load", lambda: library)

    assert sample_rows(logits, requests, range(40)) == expected
