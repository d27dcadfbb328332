"""safetensors files, mapped: a JSON directory, then the bytes of the tensors.

    header length u64 | header, a JSON object | data
    header: {name: {"dtype": "BF16", "shape": [576, 576], "data_offsets": [start, end]}, ...}

Offsets count from the start of the data. `__metadata__` is an entry of strings, not a tensor.
Source: github.com/huggingface/safetensors, README.

Why not the safetensors package: it hands out copies and needs torch for bf16; here a tensor is
a view of the mapping, as from gguf.py.

Invariant: lengths, shapes and offsets are checked against the file's size before they are used,
so a damaged file ends in ModelFileError.
"""

from __future__ import annotations

import mmap
from math import prod
from pathlib import Path
from struct import Struct
from typing import Annotated, Final

import msgspec
import numpy as np

from roost_engine.loader.errors import ModelFileError
from roost_engine.loader.stored import Encoding, StoredTensor

_LENGTH: Final = Struct("<Q")
_METADATA: Final = "__metadata__"

# Encoding and bytes of a weight.
_DTYPES: Final[dict[str, tuple[Encoding, int]]] = {
    "F32": ("f32", 4),
    "F16": ("f16", 2),
    "BF16": ("bf16", 2),
}

_Size = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


def read_safetensors(path: Path, *, ignored_suffix: str) -> dict[str, StoredTensor]:
    """The tensors of one file, without those whose name ends in `ignored_suffix`.

    The mapping lives as long as a tensor of it. ModelFileError for a file that is missing or
    damaged, or for weights that are not F32, F16 or BF16.
    """
    if not path.is_file():
        raise ModelFileError(path, "missing (the weights of the model)")
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ModelFileError(path, f"not a readable safetensors file: {error}") from error
    entries, data_start = _read_header(path, data)
    return {
        name: _tensor(path, data, data_start, name, entry)
        for name, entry in entries.items()
        if not name.endswith(ignored_suffix)
    }


def _read_header(path: Path, data: mmap.mmap) -> tuple[dict[str, _Entry], int]:
    """Entries by name, and where the data starts."""
    if len(data) < _LENGTH.size:
        raise ModelFileError(path, "not a readable safetensors file: shorter than its header")
    length: int = _LENGTH.unpack_from(data)[0]
    data_start = _LENGTH.size + length
    if data_start > len(data):
        problem = f"its header of {length} bytes is longer than the file"
        raise ModelFileError(path, f"not a readable safetensors file: {problem}")
    try:
        header = msgspec.json.decode(data[_LENGTH.size : data_start], type=dict[str, msgspec.Raw])
        header.pop(_METADATA, None)
        return {
            name: msgspec.json.decode(entry, type=_Entry) for name, entry in header.items()
        }, data_start
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelFileError(path, f"not a readable safetensors file: {error}") from error


def _tensor(path: Path, data: mmap.mmap, data_start: int, name: str, entry: _Entry) -> StoredTensor:
    if entry.dtype not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise ModelFileError(path, f"tensor {name!r}: {entry.dtype} is not supported, only {known}")
    encoding, weight_bytes = _DTYPES[entry.dtype]
    if not entry.shape or 0 in entry.shape:
        raise ModelFileError(path, f"tensor {name!r} is empty: shape {entry.shape}")
    start, end = entry.data_offsets
    num_bytes = prod(entry.shape) * weight_bytes
    if end - start != num_bytes:
        problem = f"tensor {name!r} has {end - start} bytes, its shape needs {num_bytes}"
        raise ModelFileError(path, f"not a readable safetensors file: {problem}")
    if data_start + end > len(data):
        problem = f"tensor {name!r} ends at byte {data_start + end}, the file at {len(data)}"
        raise ModelFileError(
            path, f"not a readable safetensors file: {problem}; it is cut short or damaged"
        )
    raw = np.frombuffer(data, np.uint8, num_bytes, data_start + start)
    return StoredTensor(encoding, entry.shape, raw.reshape(prod(entry.shape[:-1]), -1))
