"""A weight matrix on the CPU: rows as a model file stores them, panels as the kernels read them.

    stored rows --pack--> PackedMatrix --multiply--> products

A file's numbers are kept or rounded to bfloat16, never quantised: INT8 and INT4 take only the
encodings whose grid they hold exactly, number for number.

    INT8   scale * q             Q8_0; Q5_0 (q - 16 in -16 .. 15)
    INT4   scale * q + minimum   Q4_1; Q4_0 (minimum = -8 * scale)

Not here: the layout of a panel (native/weights.h), the decoder (cpu_decoder.py).
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from roost_kernels.native_library import library

Floats: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]

#: Columns of a panel; positions of a run of keys.
LANES: Final = 16
_GROUP: Final = 32  # weights that share a scale


class Encoding(IntEnum):
    """How a model file stores a row; native/weights.h."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q8_0 = 3
    Q4_1 = 4
    Q4_0 = 5
    Q5_0 = 6


_GROUP_BYTES: Final = {  # stored bytes of 32 weights
    Encoding.F32: 128,
    Encoding.F16: 64,
    Encoding.BF16: 64,
    Encoding.Q8_0: 34,
    Encoding.Q4_1: 20,
    Encoding.Q4_0: 18,
    Encoding.Q5_0: 22,
}


class Format(IntEnum):
    """How a kernel reads a matrix; native/weights.h."""

    F32 = 0
    BF16 = 1
    INT8 = 2  # 32 weights share a scale
    INT4 = 3  # 32 weights share a scale and a minimum


#: The format that holds every number of a quantised encoding.
GRID_FORMATS: Final = {
    Encoding.Q8_0: Format.INT8,
    Encoding.Q5_0: Format.INT8,
    Encoding.Q4_1: Format.INT4,
    Encoding.Q4_0: Format.INT4,
}


class MatrixStruct(c.Structure):
    """`Matrix` of native/weights.h."""

    _fields_ = [
        ("n", c.c_int32),
        ("k", c.c_int32),
        ("format", c.c_int32),
        ("unused", c.c_int32),
        ("data", c.c_void_p),
    ]


@dataclass(frozen=True)
class StoredRows:
    """Rows of a matrix, each where it lies and as it is stored; that memory must outlive this."""

    addresses: npt.NDArray[np.uint64]  # (n,); 0 stands for a row of zeros
    encodings: npt.NDArray[np.int32]  # (n,), of Encoding

    def __len__(self) -> int:
        return len(self.addresses)

    def take(self, order: npt.NDArray[np.intp]) -> StoredRows:
        """The rows with these indices, in this order."""
        return StoredRows(self.addresses[order], self.encodings[order])


def stored_rows(*tensors: tuple[Bytes, Encoding]) -> StoredRows:
    """The rows of all tensors (n, row_bytes) after one another, in the tensors' encodings."""
    return StoredRows(
        np.concatenate([_row_addresses(rows) for rows, _ in tensors]),
        np.repeat(
            np.array([encoding for _, encoding in tensors], np.int32),
            [len(rows) for rows, _ in tensors],
        ),
    )


def row_bytes(encoding: Encoding, k: int) -> int:
    """Bytes of a stored row of k weights."""
    return _GROUP_BYTES[encoding] * k // _GROUP


class _NativeBuffer:
    """Zeroed memory in huge pages, freed with the object. MemoryError if there is none."""

    def __init__(self, num_bytes: int) -> None:
        self._library = library()
        self._handle = self._library.roost_allocate(num_bytes)
        if not self._handle:
            raise MemoryError(f"{num_bytes} bytes cannot be allocated")
        self.num_bytes = num_bytes
        self.address: int = self._library.roost_address(self._handle) or 0

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.roost_free(self._handle)


class PackedMatrix:
    """A weight matrix (n, k) in the order in which its kernel reads it.

    `rows`: n stored rows of k weights. They may come from several tensors, each in its own
    encoding, which is how matrices are fused. They are not needed afterwards.

    F32 and BF16 take every encoding. INT8 and INT4 take those that GRID_FORMATS gives them and
    keep every number; ValueError for others, and for a Q4_0 scale so large (8192) that the
    minimum is beyond what a half holds.
    """

    def __init__(
        self,
        rows: StoredRows,
        k: int,
        format: Format,  # noqa: A002 - the field's word
        num_threads: int = 1,
    ) -> None:
        check_threads(num_threads)
        encodings = [Encoding(number) for number in np.unique(rows.encodings)]
        _check_format(encodings, k, format)
        native = library()
        self.n, self.k, self.format = len(rows), k, format
        self._buffer = _NativeBuffer(native.roost_packed_bytes(self.n, k, format))
        fits = native.roost_pack(
            rows.addresses.ctypes.data,
            rows.encodings.ctypes.data,
            self.n,
            k,
            format,
            self._buffer.address,
            num_threads,
        )
        if not fits:
            raise ValueError(
                "a scale of Q4_0 weights is 8192 or more, so INT4 cannot hold them; the file may "
                "be damaged, or take its weights as bfloat16"
            )

    @property
    def num_bytes(self) -> int:
        """Size in memory, padding included."""
        return self._buffer.num_bytes

    def multiply(self, x: Floats) -> Floats:
        """x (rows, k) times the transposed matrix, (rows, n) float32; on one thread.

        Activations are rounded to bfloat16 first unless the format is F32.
        """
        x = np.ascontiguousarray(x, np.float32)
        if x.ndim != 2 or x.shape[1] != self.k:
            raise ValueError(f"x has shape {x.shape}, expected (rows, {self.k})")
        out = np.empty((x.shape[0], padded(self.n)), np.float32)
        library().roost_multiply(
            c.byref(self.struct()), x.ctypes.data, x.shape[0], out.ctypes.data, out.shape[1]
        )
        return out[:, : self.n]

    def struct(self) -> MatrixStruct:
        """For the native side; valid as long as this object."""
        return MatrixStruct(self.n, self.k, self.format, 0, self._buffer.address)


def decode_rows(rows: Bytes, k: int, encoding: Encoding) -> Floats:
    """Stored rows (n, row_bytes) as float32 (n, k), as ggml decodes them."""
    out = np.empty((rows.shape[0], k), np.float32)
    addresses = _row_addresses(rows)
    library().roost_decode_rows(addresses.ctypes.data, len(rows), k, encoding, out.ctypes.data)
    return out


def padded(size: int) -> int:
    """`size` in whole panels."""
    return -(-size // LANES) * LANES


def check_threads(num_threads: int) -> None:
    """ValueError for a team of no threads."""
    if num_threads < 1:
        raise ValueError(f"{num_threads} threads; at least 1 computes")


def _check_format(encodings: Sequence[Encoding], k: int, kind: Format) -> None:
    """ValueError unless the format keeps what these encodings hold, and rows are whole."""
    for encoding in encodings:
        grid = GRID_FORMATS.get(encoding)
        if kind in (Format.INT8, Format.INT4) and grid is not kind:
            raise ValueError(
                f"{kind.name} does not keep the numbers of {encoding.name}; pack as BF16 or F32"
            )
        unit = LANES if grid is None else _GROUP
        if k % unit:
            raise ValueError(f"rows of {k} weights do not fit {encoding.name} to {kind.name}")


def _row_addresses(rows: Bytes) -> npt.NDArray[np.uint64]:
    """Where each row of `rows` (n, row_bytes) begins."""
    if rows.ndim != 2 or rows.strides[1] != 1:
        raise ValueError("rows must be a two-dimensional array of contiguous rows")
    first = np.uint64(rows.ctypes.data)
    return first + np.arange(rows.shape[0], dtype=np.uint64) * np.uint64(rows.strides[0])
