"""Which code computes a replica's steps: the native CPU kernels, or torch.

    kernels   native   native_runner.py; compiled on this machine at the first start
              torch    runner.py; where there is no compiler, as the slow twin, on a GPU, and for
                       a model that is split over processes (parallel.py)
              auto     native if it can be had for this model on this machine, else torch;
                       torch where a GPU is asked for

Torch is imported only if it computes: a native replica starts in half the time without it.

Not here: what either of them does.
"""

from __future__ import annotations

import os
import sys
from math import prod
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from roost_engine.device import DeviceError, check_gpu_memory, find_device, is_gpu
from roost_engine.native_runner import NativeRunner, WeightFormat
from roost_engine.parallel_plan import ParallelPlan
from roost_engine.sampling import sample_plain
from roost_kernels import native_build
from roost_kernels.cpu_sampling import sample_rows
from roost_kernels.native_build import NativeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from roost_engine.batch import BlockCopy
    from roost_engine.config import CacheConfig, ModelConfig
    from roost_engine.core import Runner
    from roost_engine.loader import LoadedModel
    from roost_engine.sampling import Draw

KernelChoice: TypeAlias = Literal["auto", "native", "torch"]

# Bytes of a weight in memory, scales included; with "stored" by encoding, others as bfloat16.
_WEIGHT_BYTES: dict[WeightFormat, float] = {"float32": 4.0, "bfloat16": 2.0, "stored": 2.0}
_STORED_BYTES = {"q8_0": 34 / 32, "q5_0": 34 / 32, "q4_1": 20 / 32, "q4_0": 20 / 32}


class BackendError(Exception):
    """The kernels asked for cannot compute this model here; the message names the cure."""


class BackendOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How steps are computed."""

    kernels: KernelChoice = "auto"
    device: str = "auto"  # see device.py; a GPU: torch
    weights: WeightFormat = "stored"
    num_threads: int | None = None  # None: one for each core this process may use
    max_step_tokens: int = 512
    plan: ParallelPlan = ParallelPlan()  # more than one process: torch
    source: str = ""  # where the processes of a plan load the model from

    @property
    def needs_torch(self) -> bool:
        """Whether torch computes, whatever can be had here."""
        return self.kernels == "torch" or self.plan.num_processes > 1 or self.is_for_gpu

    @property
    def is_for_gpu(self) -> bool:
        """Whether a GPU is asked for by name. DeviceError for a device that is none."""
        return is_gpu(self.device)

    @property
    def weights_in_memory(self) -> WeightFormat:
        """What the weights become. Torch decodes blocks: it has no fast kernels for them."""
        return "float32" if self.needs_torch and self.weights == "stored" else self.weights


class Backend(msgspec.Struct, frozen=True):
    """What computes a step, what draws its tokens, and what moves its blocks."""

    runner: Runner
    draw: Draw
    copy_blocks: Callable[[Sequence[BlockCopy]], None] | None
    description: str  # for the operator
    close: Callable[[], None] = lambda: None  # ends processes, where there are some


def build_backend(model: LoadedModel, cache: CacheConfig, options: BackendOptions) -> Backend:
    """Load the weights into the kernels; a second, and some 20 s more at the very first time.

    BackendError if `kernels` or `device` cannot be had. With `auto` the reason for torch goes to
    stderr.
    """
    try:
        if options.is_for_gpu and options.kernels == "native":
            raise BackendError("the native kernels compute on the CPU only; use torch on a GPU")
        if options.plan.num_processes > 1:
            return _build_parallel(model, cache, options)
        if options.needs_torch:
            return _build_torch(model, cache, options)
        return _build_native_or_torch(model, cache, options)
    except DeviceError as error:
        raise BackendError(str(error)) from None


def _build_native_or_torch(
    model: LoadedModel, cache: CacheConfig, options: BackendOptions
) -> Backend:
    try:
        return _build_native(model, cache, options)
    except (NativeUnavailableError, ValueError) as error:
        if options.kernels == "native":
            raise BackendError(f"the native kernels cannot be used: {error}") from None
        sys.stderr.write(f"roost engine: computing with torch, which is slower: {error}\n")
    except MemoryError as error:
        raise BackendError(f"not enough memory: {error}; lower kv_tokens") from None
    return _build_torch(model, cache, options)


def kv_bytes_per_token(config: ModelConfig, weights: WeightFormat) -> int:
    """Bytes of KV cache one token takes over all layers, keys and values."""
    elements = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return elements * (4 if weights == "float32" else 2)


def weight_bytes(model: LoadedModel, weights: WeightFormat) -> int:
    """Bytes that the weights take in memory, about."""
    of_encoding = _STORED_BYTES if weights == "stored" else {}
    each = _WEIGHT_BYTES[weights]
    num_bytes = 0.0
    for tensor in model.weights.values():
        is_matrix = len(tensor.shape) > 1  # vectors are float32 always
        num_bytes += prod(tensor.shape) * (
            of_encoding.get(tensor.encoding, each) if is_matrix else 4.0
        )
    return int(num_bytes)


def num_usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _build_native(model: LoadedModel, cache: CacheConfig, options: BackendOptions) -> Backend:
    if not native_build.is_built():
        native_build.find_compiler()
        sys.stderr.write("roost engine: compiling the CPU kernels, once; this takes a minute\n")
    runner = NativeRunner(
        model,
        cache,
        weights=options.weights,
        max_step_tokens=options.max_step_tokens,
        num_threads=options.num_threads or num_usable_cores(),
    )
    copy_blocks = runner.copy_blocks if cache.num_host_blocks else None
    return Backend(runner, sample_rows, copy_blocks, f"{runner.instruction_set} kernels")


def _build_torch(model: LoadedModel, cache: CacheConfig, options: BackendOptions) -> Backend:
    import torch  # noqa: PLC0415 - only where it computes

    from roost_engine.host_tier import HostTier  # noqa: PLC0415
    from roost_engine.runner import ModelRunner  # noqa: PLC0415

    dtype = _torch_dtype(options)
    device = find_device(options.device)
    if device.type == "cuda":
        kv_bytes = cache.num_tokens * kv_bytes_per_token(model.config, dtype)
        check_gpu_memory(device, kv_bytes, weight_bytes(model, dtype))
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    runner = ModelRunner(model, cache, getattr(torch, dtype), device)
    copy_blocks = None
    if cache.num_host_blocks:
        tier = HostTier(runner.cache, cache.num_host_blocks, cache.block_size)
        copy_blocks = tier.execute
    where = "" if device.type == "cpu" else f" on {device}"
    return Backend(runner, sample_plain, copy_blocks, f"torch{where}, {dtype}")


def _build_parallel(model: LoadedModel, cache: CacheConfig, options: BackendOptions) -> Backend:
    from roost_engine.parallel import ParallelError, ParallelRunner  # noqa: PLC0415 - torch

    if options.kernels == "native":
        raise BackendError("the native kernels cannot split a model over processes; use torch")
    if options.is_for_gpu:
        raise BackendError("a model split over processes computes on the CPU only; use cpu")
    plan = options.plan
    try:
        runner = ParallelRunner(
            options.source,
            model,
            cache,
            _torch_dtype(options),
            plan=plan,
            num_threads=options.num_threads,
        )
    except (ValueError, ParallelError) as error:
        raise BackendError(str(error)) from None
    copy_blocks = runner.copy_blocks if cache.num_host_blocks else None
    what = f"torch in {plan.num_processes} processes"
    return Backend(runner, sample_plain, copy_blocks, what, runner.close)


def _torch_dtype(options: BackendOptions) -> Literal["float32", "bfloat16"]:
    return "bfloat16" if options.weights == "bfloat16" else "float32"
