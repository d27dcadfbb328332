"""A device that is not the CPU, for machines that have none: torch's "meta", watched.

A tensor on "meta" has a shape and no numbers. `Watch` sees each operation under it: one that mixes
devices, which a GPU would refuse, raises, and copies from one device to another are counted. So
what forgets to put a tensor on its device is found without a GPU; what is computed is not.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class MixedDevicesError(Exception):
    """An operation on tensors of different devices."""


class Watch(TorchDispatchMode):
    """`copies`: how many from (device type) to (device type)."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # In inference mode an operation comes whole that is otherwise seen as its parts.
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = [tensor.device.type for tensor in tensors]
        if func not in _COPIES:
            if len(set(devices)) > 1:
                raise MixedDevicesError(f"{func} on {devices}")
            return func(*args, **kwargs)
        if func is torch.ops.aten.copy_.default:
            target, source = devices
        else:
            source, target = devices[0], torch.device(kwargs.get("device") or devices[0]).type
        if source == target:
            return func(*args, **kwargs)
        self.copies[source, target] += 1
        if source == "meta":  # its numbers come from nowhere
            return args[0].zero_() if func is torch.ops.aten.copy_.default else _zeros(args[0])
        return func(*args, **kwargs)


def _zeros(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(like.shape, dtype=like.dtype)
