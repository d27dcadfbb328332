"""Runs a step on the CPU kernels: the model's stored tensors packed, chunks in, logits out.

The counterpart of runner.py (torch), with the same `forward`. What it adds is exactness: a
token does not depend on batch, chunking, cache hits or preemption (native/decoder.h).

    `weights`   matrices                                        activations   KV cache
    float32     float32                                         float32       float32
    bfloat16    bfloat16                                        bfloat16      half
    stored      blocks of the file, every number as it is, in   bfloat16      half
                4 bits (Q4_0, Q4_1) or 8 (Q5_0, Q8_0);
                anything else bfloat16

Parts that are fused into one matrix (q, k, v; gate, up) may be stored differently. With `stored`
the matrix is in 4 or 8 bits if all its parts fit that, else in bfloat16.

Not here: what the kernels do (roost_kernels/), reading files (loader/).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

from roost_engine.batch import Direction
from roost_engine.interruption import StepInterruptedError
from roost_engine.loader import shapes
from roost_kernels.cpu_decoder import (
    CpuDecoder,
    DecoderLayer,
    DecoderShape,
    DecoderWeights,
    rotary_tables,
)
from roost_kernels.native_library import instruction_set
from roost_kernels.packed_matrix import (
    GRID_FORMATS,
    Encoding,
    Format,
    PackedMatrix,
    stored_rows,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from roost_engine.batch import BlockCopy, Chunk
    from roost_engine.config import CacheConfig, ModelConfig
    from roost_engine.loader import LoadedModel
    from roost_engine.loader.stored import StoredTensor
    from roost_kernels.packed_matrix import Bytes, Floats

WeightFormat: TypeAlias = Literal["float32", "bfloat16", "stored"]

_ENCODINGS: Final = {
    "f32": Encoding.F32,
    "f16": Encoding.F16,
    "bf16": Encoding.BF16,
    "q8_0": Encoding.Q8_0,
    "q4_1": Encoding.Q4_1,
    "q4_0": Encoding.Q4_0,
    "q5_0": Encoding.Q5_0,
}


class NativeRunner:
    """The model with its KV cache; one step at a time, only `interrupt` is thread-safe.

    Memory: the packed matrices, plus the cache, whose pages become resident as they are used.
    """

    def __init__(
        self,
        model: LoadedModel,
        cache: CacheConfig,
        *,
        weights: WeightFormat,
        max_step_tokens: int,
        num_threads: int,
    ) -> None:
        """ValueError for sizes the kernels do not have; NativeUnavailableError without them."""
        config = model.config
        shape = _decoder_shape(config, cache, weights, max_step_tokens)
        shape.check()
        packer = _Packer(model.weights, weights, num_threads)
        self._decoder = CpuDecoder(shape, packer.pack(config, shape.num_positions), num_threads)
        self._host: list[Bytes | None] = [None] * cache.num_host_blocks

    @property
    def instruction_set(self) -> str:
        """What the kernels were compiled for."""
        return instruction_set()

    def forward(self, chunks: Sequence[Chunk]) -> Floats:
        """Logits (chunks that want them, vocab_size) float32, valid until the next call.

        The chunks' keys and values are left in their blocks. Chunks are independent requests,
        but one may read blocks that another fills in the same step. IndexError for a token,
        position or block that does not exist. StepInterruptedError after `interrupt`: the chunks'
        own positions are to be computed again before they are read.
        """
        logits = self._decoder.step(chunks)
        if logits is None:
            raise StepInterruptedError
        return logits

    def interrupt(self) -> None:
        """End the `forward` that another thread is in, soon; without effect if there is none."""
        self._decoder.interrupt()

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Carry out orders to copy blocks between cache and host memory, in their order."""
        for order in copies:
            if order.direction is Direction.OUT:
                self._host[order.host_block] = self._decoder.read_block(order.block)
            else:
                elements = self._host[order.host_block]
                assert elements is not None, "a block is copied in after it was copied out"
                self._decoder.write_block(order.block, elements)


def _decoder_shape(
    config: ModelConfig, cache: CacheConfig, weights: WeightFormat, max_step_tokens: int
) -> DecoderShape:
    scale = config.attention_scale
    return DecoderShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        num_blocks=cache.num_blocks,
        block_size=cache.block_size,
        # No request can be longer than the model's context or than the whole cache.
        num_positions=min(config.max_position, cache.num_tokens),
        max_tokens=max_step_tokens,
        kv_is_f32=weights == "float32",
        uses_gelu=config.activation == "gelu_tanh",
        sliding_window=config.sliding_window,
        rms_norm_eps=config.rms_norm_eps,
        embedding_scale=config.embedding_scale,
        attention_scale=scale if scale is not None else config.head_dim**-0.5,
    )


class _Packer:
    """Stored tensors to what the kernels read."""

    def __init__(
        self, tensors: dict[str, StoredTensor], weights: WeightFormat, num_threads: int
    ) -> None:
        self._tensors = tensors
        self._format = weights
        self._num_threads = num_threads

    def pack(self, config: ModelConfig, num_positions: int) -> DecoderWeights:
        """All weights of the model."""
        tables = rotary_tables(
            config.head_dim, num_positions, config.rope_theta, config.rope_divisors
        )
        sliding_tables = tables
        if config.sliding_rope_theta is not None:
            sliding_tables = rotary_tables(
                config.head_dim, num_positions, config.sliding_rope_theta
            )
        slides = config.sliding_layers or (False,) * config.num_layers
        layers = [
            self._layer(config, idx, sliding_tables if slides[idx] else tables, slides=slides[idx])
            for idx in range(config.num_layers)
        ]
        embedding = self._tensors[shapes.EMBEDDING]
        head = self._tensors[shapes.EMBEDDING if config.tie_embeddings else shapes.HEAD]
        return DecoderWeights(
            layers=layers,
            head=self._matrix([head]),
            final_norm=self._vector(shapes.FINAL_NORM),
            embedding=embedding.rows,
            embedding_encoding=_ENCODINGS[embedding.encoding],
        )

    def _layer(
        self, config: ModelConfig, idx: int, tables: tuple[Floats, Floats], *, slides: bool
    ) -> DecoderLayer:
        prefix = shapes.layer_prefix(idx)
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        bias = q_norm = k_norm = post_attention = post_mlp = None
        mlp_norm = f"{prefix}post_attention_layernorm.weight"
        if config.attention_bias:
            bias = np.concatenate([self._vector(f"{attention}{part}_proj.bias") for part in "qkv"])
            bias = np.pad(bias, (0, -len(bias) % 16))
        if config.qk_norm:
            q_norm = self._vector(f"{attention}q_norm.weight")
            k_norm = self._vector(f"{attention}k_norm.weight")
        if config.post_norms:
            post_attention = self._vector(mlp_norm)
            mlp_norm = f"{prefix}pre_feedforward_layernorm.weight"
            post_mlp = self._vector(f"{prefix}post_feedforward_layernorm.weight")
        matrix = self._matrix
        return DecoderLayer(
            qkv=matrix([self._tensors[f"{attention}{part}_proj.weight"] for part in "qkv"]),
            o=matrix([self._tensors[f"{attention}o_proj.weight"]]),
            gate_up=matrix(
                [self._tensors[f"{mlp}{part}_proj.weight"] for part in ("gate", "up")],
                interleaves=True,
            ),
            down=matrix([self._tensors[f"{mlp}down_proj.weight"]]),
            attention_norm=self._vector(f"{prefix}input_layernorm.weight"),
            mlp_norm=self._vector(mlp_norm),
            qkv_bias=bias,
            q_norm=q_norm,
            k_norm=k_norm,
            post_attention_norm=post_attention,
            post_mlp_norm=post_mlp,
            cos=tables[0],
            sin=tables[1],
            slides=slides,
        )

    def _vector(self, name: str) -> Floats:
        return np.ascontiguousarray(self._tensors[name].to_numpy().ravel(), np.float32)

    def _matrix(self, parts: list[StoredTensor], *, interleaves: bool = False) -> PackedMatrix:
        """One matrix of all rows of `parts`; `interleaves`: 16 rows of each in turn."""
        encodings = [_ENCODINGS[part.encoding] for part in parts]
        rows = stored_rows(
            *((part.rows, encoding) for part, encoding in zip(parts, encodings, strict=True))
        )
        if interleaves:
            order = np.arange(len(rows)).reshape(len(parts), -1, 16)
            rows = rows.take(order.swapaxes(0, 1).ravel())
        chosen = self._matrix_format(encodings)
        return PackedMatrix(rows, parts[0].shape[1], chosen, self._num_threads)

    def _matrix_format(self, encodings: Sequence[Encoding]) -> Format:
        if self._format == "float32":
            return Format.F32
        grids = {GRID_FORMATS.get(encoding, Format.BF16) for encoding in encodings}
        if self._format == "stored" and len(grids) == 1:
            return grids.pop()
        return Format.BF16
