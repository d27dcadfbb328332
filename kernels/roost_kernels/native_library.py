"""The native library with the types of its functions; the C side is native/roost_cpu.cpp.

Not here: compiling it (native_build.py), what stands behind the functions (packed_matrix.py,
cpu_decoder.py, cpu_sampling.py).
"""

from __future__ import annotations

import ctypes as c
from typing import Any, Final

from roost_kernels import native_build

_POINTER, _I32, _I64 = c.c_void_p, c.c_int32, c.c_int64

#: Function -> result, arguments.
_SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "roost_instruction_set": (_I32, []),
    "roost_allocate": (_POINTER, [_I64]),
    "roost_address": (_POINTER, [_POINTER]),
    "roost_free": (None, [_POINTER]),
    "roost_packed_bytes": (_I64, [_I32, _I32, _I32]),
    "roost_pack": (_I32, [_POINTER, _POINTER, _I32, _I32, _I32, _POINTER, _I32]),
    "roost_decode_rows": (None, [_POINTER, _I32, _I32, _I32, _POINTER]),
    "roost_multiply": (None, [_POINTER, _POINTER, _I32, _POINTER, _I32]),
    "roost_decoder_new": (_POINTER, [_POINTER, _POINTER, _I32]),
    "roost_decoder_free": (None, [_POINTER]),
    "roost_decoder_step": (
        _I32,
        [_POINTER, _POINTER, _I32, _POINTER, _I32, _POINTER, _I32],
    ),
    "roost_decoder_interrupt": (None, [_POINTER]),
    "roost_decoder_copy_block": (None, [_POINTER, _I32, _POINTER, _I32]),
    "roost_sample": (None, [_POINTER, _I32, _I64, _I32, _POINTER, _POINTER]),
}


def library() -> Any:
    """The shared library. NativeUnavailableError if it cannot be had."""
    loaded = native_build.load()
    if not getattr(loaded, "is_typed", False):
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
        loaded.is_typed = True  # type: ignore[attr-defined]
    return loaded


def instruction_set() -> str:
    """What the kernels were compiled for: avx512_bf16, avx512, avx2 or generic."""
    return ("generic", "avx2", "avx512", "avx512_bf16")[library().roost_instruction_set()]
