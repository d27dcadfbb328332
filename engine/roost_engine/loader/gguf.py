"""GGUF container: metadata, tensor directory and stored tensors of one file.

    "GGUF" | version u32 | num_tensors u64 | num_metadata u64
    metadata   key string, type u32, value                        (string = length u64, UTF-8)
    directory  name string, num_dims u32, dims u64[], type u32, offset u64
    padding to `general.alignment` (32 unless said), then tensor data

Everything is little-endian. `dims` run from the fastest axis, so a torch shape is their
reverse. Quantised blocks never cross a row.

Why not gguf.GGUFReader: it makes several numpy arrays for each of the 98,000 tokenizer strings
and takes 2.7 s for SmolLM2, this reader 0.07 s.

Tensors keep their encoding where stored.py has it. Any other that `gguf.quants` can decode
(Q4_K, Q6_K, IQ4_XS, ...) becomes float32 in memory; it follows ggml bit for bit.

Invariants: every length, count and offset of the file is checked against the file's size before
it is used, so a damaged file ends in ModelFileError and memory is bounded by the file's size.

Not here: what the metadata means for a model (gguf_model.py) or for a tokenizer
(gguf_tokenizer.py).
"""

from __future__ import annotations

import mmap
from math import prod
from pathlib import Path
from struct import Struct
from typing import Final, NoReturn, TypeAlias

import msgspec
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from roost_engine.loader.errors import ModelFileError
from roost_engine.loader.stored import QUANT_TYPES, StoredTensor, dequantised, stored_floats

Scalar: TypeAlias = str | int | float | bool
Value: TypeAlias = Scalar | list[Scalar]

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_HEADER: Final = Struct("<4sIQQ")
_U32: Final = Struct("<I")
_U64: Final = Struct("<Q")

# Value types by their number in the file; string and array have no fixed size.
_SCALARS: Final = {
    0: Struct("<B"),
    1: Struct("<b"),
    2: Struct("<H"),
    3: Struct("<h"),
    4: Struct("<I"),
    5: Struct("<i"),
    6: Struct("<f"),
    7: Struct("<?"),
    10: Struct("<Q"),
    11: Struct("<q"),
    12: Struct("<d"),
}
_STRING: Final = 8
_ARRAY: Final = 9

_MIN_METADATA_BYTES: Final = 8 + 4 + 1  # empty key, one-byte value
_MIN_TENSOR_BYTES: Final = 8 + 4 + 4 + 8  # empty name, no dimensions
_MAX_DIMS: Final = 4  # ggml's GGML_MAX_DIMS
_MAX_ALIGNMENT: Final = 1 << 20

_ENCODINGS: Final = {quant_type: encoding for encoding, quant_type in QUANT_TYPES.items()}


class TensorInfo(msgspec.Struct, frozen=True):
    """Where one tensor lies in the file; checked to be inside it."""

    name: str
    shape: tuple[int, ...]  # slowest axis first, as torch counts
    quant_type: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    num_bytes: int


class GgufFile:
    """One GGUF file, mapped: `metadata` and `tensors` are read at once, data on demand.

    The mapping lives as long as the object. The file must not shrink meanwhile (the kernel
    answers that with SIGBUS, for any program that maps files).

    Raises ModelFileError for a file that is missing, is not GGUF or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = _map_file(path)
        magic, version, num_tensors, num_metadata = _HEADER.unpack_from(self._data)
        if magic != _MAGIC:
            raise ModelFileError(path, "not a GGUF file (it does not start with 'GGUF')")
        if version not in _VERSIONS:
            raise ModelFileError(path, f"GGUF version {version} is not supported, only 2 and 3")
        cursor = _Cursor(path, self._data, _HEADER.size)
        self.metadata = _read_metadata(cursor, num_metadata)
        self.tensors = _read_directory(cursor, num_tensors, self._alignment())

    def read(self, name: str) -> StoredTensor:
        """The tensor `name`: a view of the file, or float32 in memory for other encodings.

        ModelFileError for a quantisation that `gguf` cannot decode.
        """
        info = self.tensors[name]
        raw = np.frombuffer(self._data, np.uint8, info.num_bytes, info.offset)
        rows = raw.reshape(prod(info.shape[:-1]), -1)
        encoding = _ENCODINGS.get(info.quant_type)
        if encoding is not None:
            return StoredTensor(encoding, info.shape, rows)
        try:
            return stored_floats(dequantised(rows, info.quant_type).reshape(info.shape))
        except NotImplementedError:
            problem = f"tensor {name!r}: {info.quant_type.name} weights are not supported"
            raise ModelFileError(self.path, problem) from None

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", 32)
        is_power_of_two = isinstance(value, int) and value > 0 and value & (value - 1) == 0
        if not is_power_of_two or not isinstance(value, int) or value > _MAX_ALIGNMENT:
            raise ModelFileError(self.path, f"general.alignment is {value!r}")
        return value


class _Cursor:
    """A position in the file that cannot leave it."""

    def __init__(self, path: Path, data: mmap.mmap, offset: int) -> None:
        self.path = path
        self.data = data
        self.offset = offset
        self.size = len(data)

    def fail(self, problem: str) -> NoReturn:
        raise ModelFileError(self.path, f"{problem} (at byte {self.offset} of {self.size})")

    def take(self, num_bytes: int) -> int:
        """Pass over `num_bytes`; return where they start."""
        start = self.offset
        if num_bytes > self.size - start:
            self.fail(f"the file ends inside its header: {num_bytes} more bytes expected")
        self.offset = start + num_bytes
        return start

    def u32(self) -> int:
        value: int = _U32.unpack_from(self.data, self.take(4))[0]
        return value

    def u64(self) -> int:
        value: int = _U64.unpack_from(self.data, self.take(8))[0]
        return value

    def string(self) -> str:
        length = self.u64()
        start = self.take(length)
        try:
            return self.data[start : self.offset].decode()
        except UnicodeDecodeError:
            self.fail("a string is not UTF-8")

    def value(self) -> Value:
        kind = self.u32()
        return self._array() if kind == _ARRAY else self._scalar(kind)

    def check_count(self, count: int, min_bytes: int, what: str) -> None:
        """Refuse a count that the rest of the file could not hold, before making room for it."""
        if count > (self.size - self.offset) // min_bytes:
            self.fail(f"{count} {what} announced, more than the file can hold")

    def _scalar(self, kind: int) -> Scalar:
        if kind == _STRING:
            return self.string()
        layout = self._layout(kind)
        value: Scalar = layout.unpack_from(self.data, self.take(layout.size))[0]
        return value

    def _array(self) -> list[Scalar]:
        kind = self.u32()
        count = self.u64()
        if kind == _STRING:
            return self._strings(count)
        layout = self._layout(kind)
        self.check_count(count, layout.size, "array elements")
        start = self.take(count * layout.size)
        return list(Struct(f"<{count}{layout.format[1:]}").unpack_from(self.data, start))

    def _strings(self, count: int) -> list[Scalar]:
        """An array of strings: `string()` written out, as 100,000 of them are most of a header."""
        self.check_count(count, 8, "strings")
        data, size, offset, unpack = self.data, self.size, self.offset, _U64.unpack_from
        strings: list[Scalar] = []
        try:
            for _ in range(count):
                start = offset + 8
                offset = start + unpack(data, offset)[0] if start <= size else size + 1
                if offset > size:
                    self.fail("the file ends inside an array of strings that starts here")
                strings.append(data[start:offset].decode())
        except UnicodeDecodeError:
            self.fail("a string of the array that starts here is not UTF-8")
        self.offset = offset
        return strings

    def _layout(self, kind: int) -> Struct:
        layout = _SCALARS.get(kind)
        if layout is None:
            what = "nested arrays are" if kind == _ARRAY else f"value type {kind} is"
            self.fail(f"{what} not supported")
        return layout


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if path.stat().st_size < _HEADER.size:
                raise ModelFileError(path, "not a GGUF file (shorter than a GGUF header)")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror}") from error


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Value]:
    cursor.check_count(count, _MIN_METADATA_BYTES, "metadata entries")
    metadata: dict[str, Value] = {}
    for _ in range(count):
        key = cursor.string()
        if key in metadata:
            cursor.fail(f"metadata key {key!r} appears twice")
        metadata[key] = cursor.value()
    return metadata


def _read_directory(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    """Tensor infos with absolute offsets, each checked to lie inside the file."""
    cursor.check_count(count, _MIN_TENSOR_BYTES, "tensors")
    relative = [_read_tensor_info(cursor) for _ in range(count)]
    data_start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for info in relative:
        if info.name in tensors:
            cursor.fail(f"tensor {info.name!r} appears twice")
        if info.offset % alignment:
            cursor.fail(f"tensor {info.name!r} is not aligned to {alignment} bytes")
        start = data_start + info.offset
        if start + info.num_bytes > cursor.size:
            problem = f"tensor {info.name!r} ends at byte {start + info.num_bytes}"
            raise ModelFileError(
                cursor.path, f"{problem}, the file at {cursor.size}: it is cut short or damaged"
            )
        tensors[info.name] = msgspec.structs.replace(info, offset=start)
    return tensors


def _read_tensor_info(cursor: _Cursor) -> TensorInfo:
    name = cursor.string()
    num_dims = cursor.u32()
    if not 1 <= num_dims <= _MAX_DIMS:
        cursor.fail(f"tensor {name!r} has {num_dims} dimensions")
    shape = tuple(cursor.u64() for _ in range(num_dims))[::-1]
    type_number = cursor.u32()
    offset = cursor.u64()
    if 0 in shape:
        cursor.fail(f"tensor {name!r} is empty: shape {shape}")
    try:
        quant_type = GGMLQuantizationType(type_number)
    except ValueError:
        cursor.fail(f"tensor {name!r} has the unknown type {type_number}")
    weights_per_block, bytes_per_block = GGML_QUANT_SIZES[quant_type]
    if shape[-1] % weights_per_block:
        cursor.fail(f"tensor {name!r}: rows of {shape[-1]} do not fit {quant_type.name} blocks")
    num_bytes = prod(shape) // weights_per_block * bytes_per_block
    return TensorInfo(name, shape, quant_type, offset, num_bytes)
