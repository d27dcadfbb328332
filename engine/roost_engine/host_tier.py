"""Host tier, the copying half: blocks of KV cache between device tensors and host memory.

The pool decides (blocks.py), the step carries the orders, this executes them before the step's
computation. Host memory has the layout of the cache (roost_kernels/kv_store.py), so a block is
one contiguous piece on either side, and a restored block is bit-equal to the evicted one.

Cost: a copy moves the KV of `block_size` tokens, 737 KB for SmolLM2 in float32. Orders are
executed in runs that do not depend on each other, two tensor operations a layer and a run.

Not here: which blocks (offload.py), the native runner's own layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from roost_engine.batch import Direction, parallel_runs

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

    Its memory is reserved but not touched until blocks are offloaded; pinned where the cache is
    on a GPU, which makes copies several times faster.
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
        for run in parallel_runs(copies):
            blocks = torch.tensor([copy.block for copy in run])
            host_blocks = torch.tensor([copy.host_block for copy in run])
            for device, host in self._pairs:
                if run[0].direction is Direction.OUT:
                    host[host_blocks] = device[blocks.to(device.device)].to(host.device)
                else:
                    device[blocks.to(device.device)] = host[host_blocks].to(device.device)


def _by_block(tensor: torch.Tensor, block_size: int) -> torch.Tensor:
    """The same memory as (num_blocks, block_size, num_kv_heads, head_dim)."""
    return tensor.view(-1, block_size, *tensor.shape[1:])


def _host_twin(tensor: torch.Tensor, num_host_blocks: int, block_size: int) -> torch.Tensor:
    return torch.empty(
        (num_host_blocks, block_size, *tensor.shape[1:]),
        dtype=tensor.dtype,
        pin_memory=tensor.is_cuda,
    )
