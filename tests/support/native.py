"""What tests of the native kernels need: a C++ compiler, which a machine may lack."""

from __future__ import annotations

import pytest

from roost_kernels import native_build
from roost_kernels.native_build import NativeUnavailableError


def _reason() -> str:
    try:
        native_build.find_compiler()
    except NativeUnavailableError as error:
        return str(error)
    return ""


#: Skips where there is no compiler; the engine computes with torch there.
needs_native = pytest.mark.skipif(bool(_reason()), reason=_reason() or "there is a compiler")
