"""The weights of one decoder layer, converted and fused; the whole layer or one process's share.

Q, K, V and gate, up are fused into one matrix each: one large product is faster than three small
ones. Tensor parallelism (Shoeybi et al., "Megatron-LM", 2019) gives each of n processes a share
that needs one sum over processes after attention and one after the MLP:

    q, k, v, gate, up   their rows: whole heads, 1/n of the intermediate size
    o, down             the columns that belong to those rows; the products are to be summed
    norms               all of it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from roost_engine.config import ModelConfig
from roost_engine.loader import shapes
from roost_engine.loader.stored import StoredTensor


@dataclass(frozen=True, slots=True)
class Share:
    """The part `rank` of `size` equal parts."""

    rank: int = 0
    size: int = 1

    def of(self, length: int) -> slice:
        """This share of `length` rows or columns; uneven lengths differ by one."""
        return slice(length * self.rank // self.size, length * (self.rank + 1) // self.size)


WHOLE = Share()
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. What a model does not have is None."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor  # (q_size + 2 * kv_size, hidden)
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None  # (head_dim,)
    k_norm: torch.Tensor | None
    o: torch.Tensor
    attention_post_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor  # (2 * intermediate, hidden)
    down: torch.Tensor
    mlp_post_norm: torch.Tensor | None


def read_layer(
    config: ModelConfig,
    weights: Mapping[str, StoredTensor],
    layer_idx: int,
    dtype: torch.dtype,
    share: Share = WHOLE,
    *,
    device: torch.device = CPU,
) -> Layer:
    """Convert one layer to `dtype`, on `device`. `weights` has been checked by the loader."""
    prefix = shapes.layer_prefix(layer_idx)

    def read(name: str) -> torch.Tensor:
        return weights[prefix + name].to_torch(dtype).to(device)

    def stack(*names: str) -> torch.Tensor:
        """This share of the rows of several tensors, one under the other."""
        parts = [read(name) for name in names]
        return torch.cat([part[share.of(part.shape[0])] for part in parts])

    def columns(name: str) -> torch.Tensor:
        matrix = read(name)
        return matrix[:, share.of(matrix.shape[1])].contiguous()

    qkv = [f"self_attn.{letter}_proj" for letter in "qkv"]
    post, mlp_norm = config.post_norms, "post_attention_layernorm.weight"
    if post:
        mlp_norm = "pre_feedforward_layernorm.weight"
    return Layer(
        attention_norm=read("input_layernorm.weight"),
        qkv=stack(*[f"{name}.weight" for name in qkv]),
        qkv_bias=stack(*[f"{name}.bias" for name in qkv]) if config.attention_bias else None,
        q_norm=read("self_attn.q_norm.weight") if config.qk_norm else None,
        k_norm=read("self_attn.k_norm.weight") if config.qk_norm else None,
        o=columns("self_attn.o_proj.weight"),
        attention_post_norm=read("post_attention_layernorm.weight") if post else None,
        mlp_norm=read(mlp_norm),
        gate_up=stack("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        down=columns("mlp.down_proj.weight"),
        mlp_post_norm=read("post_feedforward_layernorm.weight") if post else None,
    )
