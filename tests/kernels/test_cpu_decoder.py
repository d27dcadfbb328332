"""The native decoder's sizes and tables, and how its library is built and found.

The decoder as a whole is compared with its torch twin in tests/engine/test_native_runner.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from native import needs_native

from roost_kernels import native_build
from roost_kernels.cpu_decoder import DecoderShape, rotary_tables

pytestmark = needs_native


def test_rotary_tables_are_the_formula() -> None:
    cos, sin = rotary_tables(8, 5, 100.0, divisors=(1.0, 1.0, 2.0, 4.0))

    angles = np.outer(np.arange(5), 100.0 ** (-np.arange(4) / 4) / np.array([1, 1, 2, 4]))
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)


@pytest.mark.parametrize(
    "change", [{"head_dim": 24}, {"hidden_size": 0}, {"block_size": 8}, {"num_heads": 5}]
)
def test_sizes_the_kernels_do_not_have_are_refused(change: dict[str, int]) -> None:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 10,
        "num_blocks": 4,
        "block_size": 16,
        "num_positions": 64,
        "max_tokens": 16,
        "sliding_window": 0,
    } | change

    with pytest.raises(ValueError, match=r"need a multiple|over"):
        DecoderShape(
            **sizes,
            kv_is_f32=True,
            uses_gelu=False,
            rms_norm_eps=1e-5,
            embedding_scale=1.0,
            attention_scale=1.0,
        ).check()


def test_a_compiler_that_fails_is_told_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "_SOURCES", native_build._SOURCES / "nowhere")
    monkeypatch.setattr(native_build, "_key", lambda *_: "of-a-test")

    with pytest.raises(native_build.NativeUnavailableError, match=r"compiling .* failed"):
        native_build.build()

    assert not list(native_build.cache_directory().glob("*of-a-test*"))


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "_COMPILERS", ("no-such-compiler",))

    with pytest.raises(native_build.NativeUnavailableError, match="no C\\+\\+ compiler"):
        native_build.build()
    assert not native_build.is_built()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own, and a compiler that takes no time: it copies the library."""
    library = native_build.build()
    monkeypatch.setattr(native_build, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(native_build, "_compile", lambda command: shutil.copy(library, command[-2]))
    return tmp_path


@pytest.mark.parametrize("left_by_a_crash", [b"", b"\x7fELF", b"no library"])
def test_a_damaged_library_in_the_cache_is_compiled_again(
    cache: Path, left_by_a_crash: bytes
) -> None:
    path = native_build.build()
    path.write_bytes(left_by_a_crash)

    library = native_build.load.__wrapped__()

    assert library.roost_instruction_set() in range(4)
    assert list(cache.iterdir()) == [path]


def test_a_library_that_cannot_be_loaded_is_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_build, "_compile", lambda _: None)  # leaves an empty file

    with pytest.raises(native_build.NativeUnavailableError, match="cannot be loaded"):
        native_build.load.__wrapped__()


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)

    with pytest.raises(native_build.NativeUnavailableError, match=r"no home .* set HOME"):
        native_build.build()
    assert not native_build.is_built()


def test_a_home_that_cannot_be_looked_into_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = tmp_path / ("x" * 300)  # no such name can exist: like a locked one, but also for root
    monkeypatch.setattr(native_build, "cache_directory", lambda: nowhere)

    assert not native_build.is_built()
    with pytest.raises(native_build.NativeUnavailableError, match=r"cannot be written .* set HOME"):
        native_build.build()


def test_a_system_that_refuses_threads_gets_a_smaller_team() -> None:
    # Address space for some stacks of 8 MB, not for 256. In a process of its own, as the limit
    # stays.
    program = """
import resource
import numpy as np
from roost_kernels.packed_matrix import Encoding, Format, PackedMatrix, stored_rows

weights = np.random.default_rng(0).normal(size=(1000, 32)).astype(np.float32)
rows = stored_rows((weights.view(np.uint8), Encoding.F32))
x = np.ones((1, 32), np.float32)
expected = PackedMatrix(rows, 32, Format.F32).multiply(x)
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (300 << 20),) * 2)
few = PackedMatrix(rows, 32, Format.F32, num_threads=256).multiply(x)
assert np.array_equal(few, expected)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
