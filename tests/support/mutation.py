"""Import the router with one line changed, in memory, and the simulation on top of it.

All modules of the router and the simulation are imported anew, so that every reference leads to
the changed code; afterwards the real ones are back.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

_PACKAGES = frozenset({"roost_router", "roost_wire", "roost_loadtest"})


class Mutant(NamedTuple):
    """A one-line bug."""

    module: str
    old: str  # the line as it stands, without its indentation
    new: str
    families: tuple[str, ...]  # of the simulation that should notice, the quickest first
    under: str = ""  # a line before it, where `old` stands in more than one place

    @property
    def path(self) -> Path:
        """The file of its module."""
        spec = importlib.util.find_spec(self.module)
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin)

    def apply(self, source: str) -> str:
        """`source` with the line changed. LookupError unless it stands there exactly once."""
        lines = source.split("\n")
        start = 0
        if self.under:
            start = next((i for i, line in enumerate(lines) if line.strip() == self.under), -1) + 1
            if not start:
                raise LookupError(f"{self.module} has no line {self.under!r}")
        found = [i for i in range(start, len(lines)) if lines[i].strip() == self.old]
        if not found or (len(found) > 1 and not self.under):
            raise LookupError(f"{self.module} has {len(found)} times the line {self.old!r}")
        line = lines[found[0]]
        lines[found[0]] = line[: len(line) - len(line.lstrip())] + self.new
        return "\n".join(lines)


class _Loader(importlib.machinery.SourceFileLoader):
    mutant: Mutant

    def get_code(self, fullname: str) -> CodeType:
        source = self.mutant.apply(Path(self.path).read_text())
        return compile(source, self.path, "exec", dont_inherit=True)


class _Finder:
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant
        self.has_loaded = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._mutant.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None
        assert spec.origin is not None
        loader = _Loader(fullname, spec.origin)
        loader.mutant = self._mutant
        spec.loader = loader
        self.has_loaded = True
        return spec


@contextmanager
def mutated(mutant: Mutant) -> Iterator[ModuleType]:
    """The module `families` of a simulation of the changed router."""
    finder = _Finder(mutant)
    real = _taken_out()
    sys.meta_path.insert(0, finder)
    try:
        yield importlib.import_module("roost_loadtest.simulation.families")
        assert finder.has_loaded
    finally:
        sys.meta_path.remove(finder)
        _taken_out()
        sys.modules.update(real)


def _taken_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]
    return {name: sys.modules.pop(name) for name in names}
