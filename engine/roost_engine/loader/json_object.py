"""One JSON object of a model folder, with typed access and errors that name file and key."""

from __future__ import annotations

import json
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn

from roost_engine.loader.errors import ModelFileError


class JsonObject:
    """The settings in `path`. A key whose value is null counts as absent, as in transformers."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self._values = values

    @classmethod
    def read(cls, path: Path, *, required: bool = True) -> JsonObject:
        """Read a file; one that is missing is empty unless `required`."""
        if not path.is_file() and not required:
            return cls(path, {})
        try:
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise ModelFileError(path, f"cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ModelFileError(path, f"not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ModelFileError(path, "not a JSON object")
        return cls(path, values)

    def get(self, key: str, kind: type | UnionType, default: Any = None) -> Any:
        """The value of `key`, which must be of `kind`; an absent key needs a default.

        An integer is accepted where a float is asked for; a boolean is no integer.
        """
        value = self._values.get(key)
        if value is None:
            if default is None:
                self.fail(f"{key!r} is missing")
            return default
        if kind is float and type(value) is int:
            return float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.fail(f"{key!r} is {value!r:.80}, expected {getattr(kind, '__name__', kind)}")
        return value

    def fail(self, problem: str) -> NoReturn:
        """Raise ModelFileError for this file."""
        raise ModelFileError(self.path, problem)
