"""How much memory this process may use: what the machine has, or less if a control group says so.

A container's limit is its control group's (Linux, version 2: `memory.max` of the group and of each
group above it; version 1: `memory/memory.limit_in_bytes`). Beyond it the process is killed without
a word, so what is reserved must be checked against it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_CGROUPS: Final = Path("/sys/fs/cgroup")
_OWN_CGROUP: Final = Path("/proc/self/cgroup")


def usable_memory_bytes(root: Path = _CGROUPS, own: Path = _OWN_CGROUP) -> int | None:
    """The least of the machine's memory and the limits on this process; None if nobody tells."""
    limits = [_physical_memory_bytes(), *(_read_limit(path) for path in _limit_files(root, own))]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit_files(root: Path, own: Path) -> Iterator[Path]:
    """Files that may hold a limit. In a container the root is the container's own group."""
    yield root / "memory.max"
    yield root / "memory" / "memory.limit_in_bytes"
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        if not line.startswith("0::/"):
            continue
        group = root / line.removeprefix("0::/")
        while group != root and root in group.parents:
            yield group / "memory.max"
            group = group.parent


def _read_limit(path: Path) -> int | None:
    """None for no file and for "max", which is no limit."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None


def _physical_memory_bytes() -> int | None:
    try:
        num_pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return num_pages * page_bytes if num_pages > 0 and page_bytes > 0 else None
