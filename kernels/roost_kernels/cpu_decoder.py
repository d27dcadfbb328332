"""A decoder on the CPU: the native kernels behind numpy arrays.

    packed matrices (packed_matrix.py) --+
    norms, biases, rotary tables --------+--> CpuDecoder --step--> logits

The native side (native/decoder.h) computes a whole step in one call, which releases the GIL. It
reads weights and tables where they lie, so this side keeps them alive, and checks everything that
a kernel would take on trust: sizes, tokens, positions, blocks.

Its slow twin is the engine's torch decoder; tests compare them.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from roost_kernels.native_library import library
from roost_kernels.packed_matrix import (
    LANES,
    Bytes,
    Encoding,
    Floats,
    MatrixStruct,
    PackedMatrix,
    check_threads,
    padded,
    row_bytes,
)

_CONFIG_SIZES: Final = (
    *("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("vocab_size", "num_blocks", "block_size", "num_positions", "max_tokens"),
    *("kv_is_f32", "uses_gelu", "sliding_window"),
)
_CONFIG_NUMBERS: Final = ("rms_norm_eps", "embedding_scale", "attention_scale")


class _Config(c.Structure):
    _fields_ = [
        *((name, c.c_int32) for name in _CONFIG_SIZES),
        *((name, c.c_float) for name in _CONFIG_NUMBERS),
        ("unused", c.c_int32),
    ]


_LAYER_MATRICES: Final = ("qkv", "o", "gate_up", "down")
_LAYER_VECTORS: Final = (
    *("attention_norm", "mlp_norm", "qkv_bias", "q_norm", "k_norm"),
    *("post_attention_norm", "post_mlp_norm", "cos", "sin"),
)


class _Layer(c.Structure):
    _fields_ = [
        *((name, MatrixStruct) for name in _LAYER_MATRICES),
        *((name, c.c_void_p) for name in _LAYER_VECTORS),
        ("slides", c.c_int32),
        ("unused", c.c_int32),
    ]


class _Model(c.Structure):
    _fields_ = [
        ("layers", c.POINTER(_Layer)),
        ("head", MatrixStruct),
        ("final_norm", c.c_void_p),
        ("embedding", c.c_void_p),
        ("embedding_row_bytes", c.c_int64),
        ("embedding_encoding", c.c_int32),
        ("unused", c.c_int32),
    ]


_CHUNK: Final = np.dtype(
    {
        "names": ["row", "start", "num_tokens", "wants_logits", "block_table"],
        "formats": [np.int32, np.int32, np.int32, np.int32, np.uint64],
    },
    align=True,
)


def rotary_tables(
    head_dim: int, num_positions: int, theta: float, divisors: Sequence[float] = ()
) -> tuple[Floats, Floats]:
    """Cosines and sines, each (num_positions, head_dim / 2); formulas in rope.py.

    In float32 throughout, as the models were trained.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.float32(theta) ** exponents
    if divisors:
        frequencies /= np.asarray(divisors, np.float32)
    angles = np.outer(np.arange(num_positions, dtype=np.float32), frequencies)
    return np.cos(angles), np.sin(angles)


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Sizes of a decoder and of its cache. Lengths in tokens.

    hidden_size, intermediate_size, head_dim and block_size are multiples of 16.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_blocks: int
    block_size: int
    num_positions: int  # rows of the rotary tables
    max_tokens: int  # of a step
    kv_is_f32: bool  # else half
    uses_gelu: bool  # else silu
    sliding_window: int  # of layers that slide
    rms_norm_eps: float
    embedding_scale: float
    attention_scale: float

    def check(self) -> None:
        """ValueError for sizes that the kernels do not have."""
        for name in ("hidden_size", "intermediate_size", "head_dim", "block_size"):
            size = getattr(self, name)
            if size < LANES or size % LANES:
                raise ValueError(f"{name} is {size}; the CPU kernels need a multiple of {LANES}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads over {self.num_kv_heads} key/value heads")


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """Weights of one layer. Vectors are float32, contiguous.

    `qkv`: rows of q, k, v after one another. `gate_up`: 16 rows of gate, 16 of up, and so on.
    """

    qkv: PackedMatrix
    o: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix
    attention_norm: Floats
    mlp_norm: Floats
    qkv_bias: Floats | None = None
    q_norm: Floats | None = None
    k_norm: Floats | None = None
    post_attention_norm: Floats | None = None
    post_mlp_norm: Floats | None = None
    cos: Floats  # (num_positions, head_dim / 2)
    sin: Floats
    slides: bool = False


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """All weights. The embedding stays as stored: only a few rows a step are read."""

    layers: Sequence[DecoderLayer]
    head: PackedMatrix
    final_norm: Floats
    embedding: Bytes  # (vocab_size, row_bytes)
    embedding_encoding: Encoding


class StepChunk(Protocol):
    """Consecutive tokens of one request, from position `start` on; the engine's Chunk."""

    @property
    def token_ids(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def start(self) -> int: ...  # noqa: D102
    @property
    def block_table(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def wants_logits(self) -> bool: ...  # noqa: D102


class CpuDecoder:
    """A model with its paged KV cache. One step at a time; only `interrupt` is thread-safe."""

    def __init__(self, shape: DecoderShape, weights: DecoderWeights, num_threads: int) -> None:
        """MemoryError if the cache cannot be allocated, ValueError for sizes that do not fit."""
        shape.check()
        check_threads(num_threads)
        _check_ends(weights, shape)
        self.shape = shape
        self._library = library()
        self._weights = weights  # read by the native side for as long as it lives
        layers = (_Layer * shape.num_layers)(
            *(_layer_struct(layer, shape) for layer in weights.layers)
        )
        model = _Model(
            layers,
            weights.head.struct(),
            weights.final_norm.ctypes.data,
            weights.embedding.ctypes.data,
            weights.embedding.strides[0],
            weights.embedding_encoding,
        )
        config = _Config(*(getattr(shape, name) for name in _CONFIG_SIZES + _CONFIG_NUMBERS))
        self._handle = self._library.roost_decoder_new(c.byref(config), c.byref(model), num_threads)
        if not self._handle:
            raise MemoryError("the KV cache cannot be allocated")
        self._logits_width = padded(shape.vocab_size)
        self._logits = np.empty((0, self._logits_width), np.float32)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.roost_decoder_free(self._handle)

    @property
    def block_bytes(self) -> int:
        """Size of one block over all layers, keys and values."""
        shape = self.shape
        elements = 2 * shape.num_layers * shape.block_size * shape.num_kv_heads * shape.head_dim
        return elements * (4 if shape.kv_is_f32 else 2)

    def step(self, chunks: Sequence[StepChunk]) -> Floats | None:
        """Compute the chunks; logits (chunks that want them, vocab_size) in their order.

        The array is valid until the next step. None: the step was interrupted, and keys and
        values of the chunks' own positions are undefined; the rest of the cache is as it was.
        IndexError for a token, position or block that does not exist.
        """
        counts = [len(chunk.token_ids) for chunk in chunks]
        tokens = np.empty(sum(counts), np.int32)
        tables = np.empty(sum(len(chunk.block_table) for chunk in chunks), np.int32)
        rows = np.empty(len(chunks), _CHUNK)
        row = entry = num_logits = 0
        base = tables.ctypes.data
        for index, chunk in enumerate(chunks):
            num_tokens, table = counts[index], chunk.block_table
            end = chunk.start + num_tokens
            if num_tokens < 1 or chunk.start < 0:
                raise IndexError(f"a chunk of {num_tokens} tokens from position {chunk.start}")
            if end > self.shape.num_positions or end > len(table) * self.shape.block_size:
                raise IndexError(f"position {end - 1} is beyond the rotary table or the blocks")
            tokens[row : row + num_tokens] = chunk.token_ids
            tables[entry : entry + len(table)] = table
            rows[index] = (row, chunk.start, num_tokens, chunk.wants_logits, base + 4 * entry)
            row += num_tokens
            entry += len(table)
            num_logits += chunk.wants_logits
        self._check(tokens, tables)
        if num_logits > len(self._logits):
            self._logits = np.empty((num_logits, self._logits_width), np.float32)
        is_complete = self._library.roost_decoder_step(
            self._handle,
            tokens.ctypes.data,
            len(tokens),
            rows.ctypes.data,
            len(rows),
            self._logits.ctypes.data,
            self._logits_width,
        )
        return self._logits[:num_logits, : self.shape.vocab_size] if is_complete else None

    def interrupt(self) -> None:
        """Make the step under way return within a few milliseconds, with None.

        To be called from another thread. A step that has not begun, or is all but done, does not
        hear of it.
        """
        self._library.roost_decoder_interrupt(self._handle)

    def read_block(self, block: int) -> Bytes:
        """A copy of one block's keys and values, (block_bytes,)."""
        elements = np.empty(self.block_bytes, np.uint8)
        self._copy(block, elements, into_cache=False)
        return elements

    def write_block(self, block: int, elements: Bytes) -> None:
        """Put back what `read_block` gave, into this block or another."""
        if elements.shape != (self.block_bytes,) or not elements.flags.c_contiguous:
            raise ValueError(f"a block has {self.block_bytes} bytes, contiguous")
        self._copy(block, elements, into_cache=True)

    def _copy(self, block: int, elements: Bytes, *, into_cache: bool) -> None:
        if not 0 <= block < self.shape.num_blocks:
            raise IndexError(f"block {block} of {self.shape.num_blocks}")
        self._library.roost_decoder_copy_block(
            self._handle, block, elements.ctypes.data, into_cache
        )

    def _check(self, tokens: npt.NDArray[np.int32], tables: npt.NDArray[np.int32]) -> None:
        if len(tokens) > self.shape.max_tokens:
            raise IndexError(f"{len(tokens)} tokens in a step of at most {self.shape.max_tokens}")
        for what, values, end in (
            ("token", tokens, self.shape.vocab_size),
            ("block", tables, self.shape.num_blocks),
        ):
            if values.size and (values.min() < 0 or values.max() >= end):
                raise IndexError(f"{what} ids {values.min()} .. {values.max()} of {end}")


def _check_matrix(name: str, matrix: PackedMatrix, size: tuple[int, int]) -> None:
    if (matrix.n, matrix.k) != size:
        raise ValueError(f"{name} is {(matrix.n, matrix.k)}, expected {size}")


def _check_vector(name: str, vector: Floats, shape: tuple[int, ...]) -> None:
    if vector.shape != shape or vector.dtype != np.float32 or not vector.flags.c_contiguous:
        raise ValueError(f"{name} is {vector.dtype} {vector.shape}, expected float32 {shape}")


def _check_ends(weights: DecoderWeights, shape: DecoderShape) -> None:
    """ValueError unless what is outside the layers is as large as the kernels will read."""
    if len(weights.layers) != shape.num_layers:
        raise ValueError(f"{len(weights.layers)} layers, expected {shape.num_layers}")
    if any(layer.slides for layer in weights.layers) and shape.sliding_window < 1:
        raise ValueError(f"layers slide over a window of {shape.sliding_window}")
    _check_matrix("head", weights.head, (shape.vocab_size, shape.hidden_size))
    _check_vector("final_norm", weights.final_norm, (shape.hidden_size,))
    rows = (shape.vocab_size, row_bytes(weights.embedding_encoding, shape.hidden_size))
    if weights.embedding.shape != rows:
        raise ValueError(f"embedding is {weights.embedding.shape} bytes, expected {rows}")


def _layer_struct(layer: DecoderLayer, shape: DecoderShape) -> _Layer:
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    expected = {
        "qkv": (q_size + 2 * kv_size, shape.hidden_size),
        "o": (shape.hidden_size, q_size),
        "gate_up": (2 * shape.intermediate_size, shape.hidden_size),
        "down": (shape.hidden_size, shape.intermediate_size),
    }
    for name, size in expected.items():
        _check_matrix(name, getattr(layer, name), size)
    table = (shape.num_positions, shape.head_dim // 2)
    vectors: dict[str, tuple[int, ...]] = {
        "attention_norm": (shape.hidden_size,),
        "mlp_norm": (shape.hidden_size,),
        "qkv_bias": (padded(q_size + 2 * kv_size),),
        "q_norm": (shape.head_dim,),
        "k_norm": (shape.head_dim,),
        "post_attention_norm": (shape.hidden_size,),
        "post_mlp_norm": (shape.hidden_size,),
        "cos": table,
        "sin": table,
    }
    for name, wanted in vectors.items():
        vector = getattr(layer, name)
        if vector is not None:
            _check_vector(name, vector, wanted)
    matrices = [getattr(layer, name).struct() for name in _LAYER_MATRICES]
    addresses = [_address(getattr(layer, name)) for name in _LAYER_VECTORS]
    return _Layer(*matrices, *addresses, layer.slides)


def _address(array: Floats | None) -> int | None:
    return None if array is None else array.ctypes.data
