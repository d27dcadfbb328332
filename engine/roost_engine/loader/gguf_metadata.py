"""Typed access to GGUF metadata: a missing or mistyped key is a ModelFileError that names it."""

from __future__ import annotations

from typing import TypeVar

from roost_engine.loader.errors import ModelFileError
from roost_engine.loader.gguf import GgufFile

_T = TypeVar("_T")


class GgufMetadata:
    """The metadata of `file`. Each getter raises ModelFileError unless a default is given."""

    def __init__(self, file: GgufFile) -> None:
        self._path = file.path
        self._values = file.metadata

    def string(self, key: str, default: str | None = None) -> str:
        """A string."""
        return self._get(key, str, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer of any width; booleans are not integers here."""
        return self._get(key, int, default)

    def number(self, key: str, default: float | None = None) -> float:
        """A float of either width."""
        return self._get(key, float, default)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """A boolean."""
        return self._get(key, bool, default)

    def strings(self, key: str) -> list[str]:
        """An array of strings."""
        return self._get_list(key, str)

    def integers(self, key: str) -> list[int]:
        """An array of integers."""
        return self._get_list(key, int)

    def numbers(self, key: str) -> list[float]:
        """An array of floats."""
        return self._get_list(key, float)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def _get(self, key: str, kind: type[_T], default: _T | None) -> _T:
        value = self._values.get(key, default)
        if value is None:
            raise ModelFileError(self._path, f"metadata key {key!r} is missing")
        # Exact types: bool is a subclass of int.
        if not isinstance(value, kind) or type(value) is not kind:
            raise ModelFileError(self._path, f"{key} is not of type {kind.__name__}: {value!r:.80}")
        return value

    def _get_list(self, key: str, kind: type[_T]) -> list[_T]:
        value = self._values.get(key)
        if value is None:
            raise ModelFileError(self._path, f"metadata key {key!r} is missing")
        # Arrays are homogeneous, so the first element tells.
        if not isinstance(value, list) or (value and type(value[0]) is not kind):
            raise ModelFileError(self._path, f"{key} is not an array of {kind.__name__}")
        return [item for item in value if isinstance(item, kind)]
