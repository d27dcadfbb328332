"""The native CPU kernels as a shared library: compiled once by the local compiler, then cached.

    native/*.h, *.cpp --c++ -O2 -march=native--> ~/.cache/roost/kernels-<key>.so

`key` is a hash of the sources, the compiler's version and target, and the flags, so a changed
source, another compiler or another processor gets a library of its own. The library is written
beside its place and renamed into it: processes that start at the same time never load half a
file, at worst both compile.

Where there is no compiler, or it fails, `load` raises NativeUnavailableError with the reason, and
the engine computes with torch.

Not here: what the kernels do (native/*.h), how they are called (cpu_decoder.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

_SOURCES: Final = Path(__file__).parent / "native"
_COMPILERS: Final = ("c++", "g++", "clang++")
# -ffp-contract=off: a*b + c written so stays two roundings everywhere, whatever is inlined into
# what; where one is wanted the code says fma.
_FLAGS: Final = (
    *("-std=c++20", "-O2", "-march=native", "-ffp-contract=off"),
    *("-fPIC", "-shared", "-pthread", "-w"),
)
_COMPILE_TIMEOUT_S: Final = 600.0
_CURE: Final = "set HOME to a folder that this user may write"


class NativeUnavailableError(Exception):
    """The native kernels cannot be had on this machine; the message says why."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library, compiled first if it is not in the cache: some 20 s, once a machine.

    A file in the cache that cannot be loaded, say one that a crash cut short, is compiled again.
    NativeUnavailableError if it cannot be had.
    """
    path = build()
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(path))
    with contextlib.suppress(OSError):
        path.unlink()
    path = build()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"{path} cannot be loaded: {error}") from None


def build(flags: tuple[str, ...] = _FLAGS) -> Path:
    """The library's path. NativeUnavailableError if it cannot be compiled."""
    compiler = find_compiler()
    target = cache_directory() / f"kernels-{_key(compiler, flags)}.so"
    if _is_file(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    except OSError as error:
        raise _unwritable(target.parent, error) from None
    os.close(handle)
    try:
        _compile([compiler, *flags, "-o", name, str(_SOURCES / "roost_cpu.cpp")])
        with Path(name).open("rb") as library:
            os.fsync(library)  # a crash must not leave the name with half of the file
        Path(name).replace(target)
    except OSError as error:
        raise _unwritable(target.parent, error) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
    return target


def is_built() -> bool:
    """Whether `load` would find the library in the cache."""
    try:
        key = _key(find_compiler(), _FLAGS)
        return _is_file(cache_directory() / f"kernels-{key}.so")
    except NativeUnavailableError:
        return False


def find_compiler() -> str:
    """Path of a C++ compiler; NativeUnavailableError names those that were looked for."""
    for name in _COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise NativeUnavailableError(f"no C++ compiler ({', '.join(_COMPILERS)}) is installed")


def cache_directory() -> Path:
    """Where libraries are kept. NativeUnavailableError for a user without a home."""
    try:
        return Path.home() / ".cache" / "roost"
    except RuntimeError:
        raise NativeUnavailableError(
            f"no home directory for the compiled kernels; {_CURE}"
        ) from None


def _is_file(path: Path) -> bool:
    """Also False where the folders above may not be entered, as the home of another user."""
    try:
        return path.is_file()
    except OSError:
        return False


def _unwritable(folder: Path, error: OSError) -> NativeUnavailableError:
    return NativeUnavailableError(f"{folder} cannot be written ({error}); {_CURE}")


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.read_bytes())
    digest.update(repr(flags).encode())
    digest.update(_target(compiler, flags))
    return digest.hexdigest()[:20]


@functools.cache
def _target(compiler: str, flags: tuple[str, ...]) -> bytes:
    """The compiler's version and every macro of its target: what -march=native means here."""
    machine = [flag for flag in flags if flag.startswith("-m")]
    command = [compiler, *machine, "-dM", "-E", "-x", "c++", os.devnull]
    try:
        result = subprocess.run(command, capture_output=True, timeout=60, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"{compiler} cannot be run: {error}") from None
    if result.returncode:
        raise NativeUnavailableError(f"{compiler}: {result.stderr.decode(errors='replace')[:400]}")
    return result.stdout


def _compile(command: list[str]) -> None:
    try:
        result = subprocess.run(  # noqa: S603 - a compiler and our own sources
            command, capture_output=True, timeout=_COMPILE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"compiling the CPU kernels failed: {error}") from None
    if result.returncode:
        message = result.stderr.decode(errors="replace").strip()[:2000]
        raise NativeUnavailableError(f"compiling the CPU kernels failed: {message}")


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{build()}\n")
    except NativeUnavailableError as error:
        sys.exit(str(error))
