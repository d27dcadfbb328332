"""Where the torch decoder computes: the CPU, or one GPU with CUDA.

    auto      the first GPU where torch finds one, else the CPU
    cpu       the CPU
    cuda      the first GPU; cuda:1 the second, and so on

The native kernels and a model that is split over processes compute on the CPU only.

Not here: what is placed where (runner.py, step_layout.py), who chooses torch (backend.py).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_GPU: Final = re.compile(r"cuda(?::(\d+))?", re.ASCII)


class DeviceError(Exception):
    """The device asked for is not to be had; the message names the cure."""


def is_gpu(name: str) -> bool:
    """Whether `name` asks for a GPU. DeviceError if it names no device at all."""
    if name in ("auto", "cpu"):
        return False
    if _GPU.fullmatch(name) is None:
        raise DeviceError(f"device {name!r} is not known; it is auto, cpu, cuda or cuda:N")
    return True


def find_device(name: str) -> torch.device:
    """The device that `name` stands for, as torch calls it. DeviceError if it is not there.

    Imports torch, and asks the driver unless it is the CPU.
    """
    import torch  # noqa: PLC0415 - a replica with the native decoder runs without torch

    if not is_gpu(name) and (name == "cpu" or not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(f"device {name}: torch finds no GPU with CUDA here; use cpu")
    match = _GPU.fullmatch(name)
    index = int(match[1] or 0) if match else 0
    count = torch.cuda.device_count()
    if index >= count:
        raise DeviceError(f"device {name}: there are {count} GPUs here, the first is cuda:0")
    return torch.device("cuda", index)


def check_gpu_memory(device: torch.device, kv_cache_bytes: int, weights_bytes: int) -> None:
    """DeviceError if KV cache and weights do not fit what is free on a GPU.

    What a step needs beside them is not counted.
    """
    import torch  # noqa: PLC0415

    free_bytes, _ = torch.cuda.mem_get_info(device)
    if kv_cache_bytes + weights_bytes > free_bytes:
        raise DeviceError(
            f"the KV cache would take {kv_cache_bytes / 1e9:.1f} GB beside weights of "
            f"{weights_bytes / 1e9:.1f} GB, {device} has {free_bytes / 1e9:.1f} GB free; "
            f"lower kv_tokens"
        )
