"""Host tier, the copying half: blocks of KV cache between device tensors and host memory.

The pool decides (blocks.py), the step carries the orders, this executes them before the step's
computation. Host memory has the layout of the cache (roost_kernels/kv_store.py), so a block is
one contiguous piece on either side, and a restored block is bit-equal to the evicted one.

Cost: a copy moves the KV of `block_size` tokens, 737 KB for SmolLM2 in float32, as two pieces a
layer.

Not here: which blocks (offload.py), the native runner's own layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from roost_engine.batch import Direction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from roost_engine.batch import BlockCopy


class LayerTensors(Protocol):
    """Keys and values of one layer, each (num_slots, num_kv_heads, head_dim)."""

    @property
    def k(self) -> torch.Tensor:
        """Keys by slot."""
        ...

    @property
    def v(self) -> torch.Tensor:
        """Values by slot."""
        ...


class HostTier:
    """Host memory for `num_host_blocks` blocks of every layer, beside the device's cache.

    Its memory is reserved but not touched until blocks are offloaded. Beside a GPU it is pinned:
    all of it is resident at once, and the GPU copies by itself, in the order of its stream, so
    that nobody waits here.
    """

    def __init__(
        self, layers: Sequence[LayerTensors], num_host_blocks: int, block_size: int
    ) -> None:
        self._pairs = [
            (_by_block(tensor, block_size), _host_twin(tensor, num_host_blocks, block_size))
            for layer in layers
            for tensor in (layer.k, layer.v)
        ]

    @torch.inference_mode()
    def execute(self, copies: Sequence[BlockCopy]) -> None:
        """Do all copies, as if one after the other in their order."""
        for copy in copies:
            for device, host in self._pairs:
                block, host_block = device[copy.block], host[copy.host_block]
                if copy.direction is Direction.OUT:
                    host_block.copy_(block, non_blocking=True)
                else:
                    block.copy_(host_block, non_blocking=True)


def _by_block(tensor: torch.Tensor, block_size: int) -> torch.Tensor:
    """The same memory as (num_blocks, block_size, num_kv_heads, head_dim)."""
    return tensor.view(-1, block_size, *tensor.shape[1:])


def _host_twin(tensor: torch.Tensor, num_host_blocks: int, block_size: int) -> torch.Tensor:
    return torch.empty(
        (num_host_blocks, block_size, *tensor.shape[1:]),
        dtype=tensor.dtype,
        device="cpu",
        pin_memory=tensor.is_cuda,
    )
