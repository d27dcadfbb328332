"""Whether this router was compiled when it was installed (deploy/compile_router.py)."""

from __future__ import annotations

from roost_router import placement


def is_compiled() -> bool:
    """Whether the data path runs as machine code; if not it does the same for more CPU."""
    return not placement.__file__.endswith(".py")
