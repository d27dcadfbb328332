"""A tensor as its file stores it: the bytes, in the file's own encoding.

Nothing is converted while a model is loaded. Whoever computes chooses a form: the torch decoder
asks for tensors of one dtype, the native one packs the blocks as they are. `rows` is a view of
the mapped file where that is possible, so the bytes are read when they are first needed.

    encoding   bytes of one row of n weights
    f32        4 n
    f16, bf16  2 n
    q8_0       34 for each 32: scale f16, 32 signed bytes              w = scale · q
    q5_0       22 for each 32: scale f16, 32 fifth bits, 32 half bytes w = scale · (q - 16)
    q4_1       20 for each 32: scale f16, min f16, 32 half bytes       w = scale · q + min
    q4_0       18 for each 32: scale f16, 32 half bytes                w = scale · (q - 8)

All little-endian; the layout of the blocks is ggml's (ggml-common.h).

Not here: which tensors a model has (shapes.py), reading files (gguf.py, safetensors.py).
"""

from __future__ import annotations

from math import gcd, prod
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

if TYPE_CHECKING:
    import torch

Encoding: TypeAlias = Literal["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q8_0"]

QUANT_TYPES: Final[dict[Encoding, GGMLQuantizationType]] = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
    "q4_0": GGMLQuantizationType.Q4_0,
    "q4_1": GGMLQuantizationType.Q4_1,
    "q5_0": GGMLQuantizationType.Q5_0,
    "q8_0": GGMLQuantizationType.Q8_0,
}
_ROWS_PER_DEQUANT: Final = 8  # see dequantised


class StoredTensor(msgspec.Struct, frozen=True):
    """One tensor. `rows` is (num_rows, row_bytes) uint8, each row contiguous, not to be written.

    There is a row for each index of all axes but the last; a tensor of one axis is one row.
    The bytes have no alignment: safetensors promises none.
    """

    encoding: Encoding
    shape: tuple[int, ...]  # of the weights, slowest axis first
    rows: npt.NDArray[np.uint8]

    @property
    def num_bytes(self) -> int:
        """Bytes in this encoding."""
        return self.rows.nbytes

    def to_numpy(self) -> npt.NDArray[np.float32]:
        """The weights as float32, in memory of their own; about 4 ns each if quantised."""
        return dequantised(self.rows, QUANT_TYPES[self.encoding]).reshape(self.shape)

    def to_torch(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights in `dtype`, in memory of their own."""
        import torch  # noqa: PLC0415 - a replica with the native decoder runs without torch

        if self.encoding not in ("f16", "bf16"):
            return torch.from_numpy(self.to_numpy()).to(dtype)
        halves = torch.from_numpy(self.rows.copy()).view(
            torch.float16 if self.encoding == "f16" else torch.bfloat16
        )
        return halves.view(self.shape).to(dtype)


def stored_floats(weights: npt.NDArray[np.float32]) -> StoredTensor:
    """Weights that were computed rather than read, as a tensor of encoding f32."""
    rows = np.ascontiguousarray(weights).view(np.uint8).reshape(prod(weights.shape[:-1]), -1)
    return StoredTensor("f32", weights.shape, rows)


def dequantised(
    rows: npt.NDArray[np.uint8], quant_type: GGMLQuantizationType
) -> npt.NDArray[np.float32]:
    """Rows of any ggml encoding as float32 (num_rows, row length), in memory of their own.

    NotImplementedError for an encoding that `gguf` cannot decode. `dequantize` works through 16
    rows at a time, so handing it 8 rows as one saves most of its calls (0.69 to 0.53 s for
    SmolLM2) while its temporaries still fit in the cache; 64 rows as one take 1.1 s.
    """
    num_rows = rows.shape[0]
    packed = np.ascontiguousarray(rows).reshape(num_rows // gcd(num_rows, _ROWS_PER_DEQUANT), -1)
    # A damaged scale may be infinite; numpy's warning about it would name no file.
    with np.errstate(all="ignore"):
        weights: npt.NDArray[np.float32] = dequantize(packed, quant_type)
    # float32 comes back as a view of the rows, everything else as a new array.
    owned = weights.copy() if np.shares_memory(weights, rows) else weights
    return owned.reshape(num_rows, -1)
