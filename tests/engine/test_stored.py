"""StoredTensor and safetensors files: every encoding against its library, every damage refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

from roost_engine.loader import ModelFileError
from roost_engine.loader.safetensors import read_safetensors
from roost_engine.loader.stored import QUANT_TYPES, StoredTensor, stored_floats

SHAPE = (6, 64)
FLOATS = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def _stored(encoding: Any) -> StoredTensor:
    packed = quantize(FLOATS, QUANT_TYPES[encoding])
    return StoredTensor(encoding, SHAPE, packed.view(np.uint8).reshape(SHAPE[0], -1))


@pytest.mark.parametrize("encoding", QUANT_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_converts_to_what_the_library_decodes(encoding: str, dtype: torch.dtype) -> None:
    stored = _stored(encoding)
    quant_type = QUANT_TYPES[stored.encoding]
    expected = torch.from_numpy(dequantize(quantize(FLOATS, quant_type), quant_type).copy())

    assert torch.equal(expected.to(dtype), stored.to_torch(dtype))
    np.testing.assert_array_equal(expected.numpy(), stored.to_numpy())


@pytest.mark.parametrize("encoding", QUANT_TYPES)
def test_a_converted_tensor_has_memory_of_its_own(encoding: str) -> None:
    stored = _stored(encoding)
    before = stored.rows.copy()
    stored.rows.flags.writeable = False

    stored.to_torch(torch.bfloat16).zero_()
    stored.to_torch(torch.float32).zero_()
    stored.to_numpy()[:] = 0

    np.testing.assert_array_equal(before, stored.rows)


def test_one_axis_is_one_row_and_more_axes_have_a_row_each() -> None:
    assert stored_floats(FLOATS[0]).rows.shape == (1, 64 * 4)
    assert stored_floats(FLOATS.reshape(2, 3, 64)).rows.shape == (6, 64 * 4)
    assert stored_floats(FLOATS).num_bytes == FLOATS.nbytes
    assert torch.equal(stored_floats(FLOATS[0]).to_torch(torch.float32), torch.tensor(FLOATS[0]))


def test_bytes_need_no_alignment() -> None:
    for encoding in QUANT_TYPES:
        stored = _stored(encoding)
        shifted = np.empty(stored.num_bytes + 1, np.uint8)[1:].reshape(stored.rows.shape)
        shifted[:] = stored.rows
        moved = StoredTensor(stored.encoding, SHAPE, shifted)

        assert torch.equal(stored.to_torch(torch.float32), moved.to_torch(torch.float32))


def test_safetensors_are_views_with_their_own_encoding(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.randn(2, 3, 4).to(torch.float16),
        "d.inv_freq": torch.ones(4),
    }
    save_file(tensors, path, metadata={"format": "pt"})

    stored = read_safetensors(path, ignored_suffix=".inv_freq")

    assert {name: tensor.encoding for name, tensor in stored.items()} == {
        "a": "f32",
        "b": "bf16",
        "c": "f16",
    }
    for name, tensor in stored.items():
        assert tensor.shape == tuple(tensors[name].shape)
        assert torch.equal(tensors[name].float(), tensor.to_torch(torch.float32))
        assert not tensor.rows.flags.writeable


def _file(header: Any, num_bytes: int = 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


def _entry(**changes: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} | changes}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "cannot mmap an empty file"),
        (b"1234567", "shorter than its header"),
        (struct.pack("<Q", 2**63), "longer than the file"),
        (_file(b"{"), "truncated"),
        (_file(b"[]"), "Expected `object`"),
        (_file(b'{"\xff": 1}'), "not a readable"),
        (_file({"t": 1}), "Expected `object`"),
        (_file({"t": {"dtype": "F32"}}), "missing required field"),
        (_file(_entry(dtype="F8_E4M3")), "F8_E4M3 is not supported, only F32, F16, BF16"),
        (_file(_entry(shape=[4, -4])), "Expected `int` >= 0"),
        (_file(_entry(shape=[4, 0], data_offsets=[0, 0])), "is empty"),
        (_file(_entry(shape=[])), "is empty"),
        (_file(_entry(data_offsets=[0, 63])), "has 63 bytes, its shape needs 64"),
        (_file(_entry(data_offsets=[64, 0])), "has -64 bytes"),
        (_file(_entry(), 63), "cut short or damaged"),
        (_file(_entry(data_offsets=[1, 65])), "cut short or damaged"),
        (_file(_entry(data_offsets=[2**62, 2**62 + 64])), "cut short or damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_safetensors_are_refused_with_the_file_named(
    tmp_path: Path, data: bytes, problem: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)

    with pytest.raises(ModelFileError, match=problem) as caught:
        read_safetensors(path, ignored_suffix=".inv_freq")

    assert str(caught.value).startswith(str(path))


def test_a_file_that_ends_with_its_last_tensor_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(_file(_entry(), 64))

    assert read_safetensors(path, ignored_suffix="x")["t"].shape == (4, 4)


@pytest.mark.model
def test_a_model_is_loaded_without_torch() -> None:
    """A replica with the native decoder never imports it."""
    code = (
        "import sys; from roost_engine.loader import load_model; model = load_model('smollm2'); "
        "model.tokenizer.encode('x'); model.weights['model.norm.weight'].to_numpy(); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", code], check=True)
