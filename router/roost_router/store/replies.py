"""What replies of Redis say, or StoreError (NONSENSE) where they are of another shape. Pure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

from roost_router.store.address import Node
from roost_router.store.errors import StoreError, StoreFault

#: The field of a stream's entry that holds its blob.
FIELD: Final = b"b"

Entries = list[tuple[bytes, bytes]]


def bytes_of(reply: Any) -> bytes:
    """A reply that is bytes."""
    if isinstance(reply, bytes):
        return reply
    raise StoreError(StoreFault.NONSENSE, f"a reply of type {type(reply).__name__}")


def entries_of(reply: Any) -> tuple[Entries, int]:
    """Ids and blobs of a stream's entries, and how many have other fields: those have no blob."""
    entries = []
    num_foreign = 0
    for entry_id, fields in reply:
        is_ours = len(fields) == 2 and fields[0] == FIELD
        num_foreign += not is_ours
        entries.append((bytes_of(entry_id), bytes_of(fields[1]) if is_ours else b""))
    return entries, num_foreign


def redirection(text: str, node: Node) -> Node:
    """The node that `MOVED slot host:port` or `ASK ...` of `node` names; no host means the same."""
    with expecting():
        _, _, place = text.split(" ")
        host, _, port = place.rpartition(":")
        return Node(host or node.host, int(port))


@contextlib.contextmanager
def expecting() -> Iterator[None]:
    """Within it a reply is taken apart."""
    try:
        yield
    except (TypeError, ValueError, IndexError, AttributeError):
        raise StoreError(StoreFault.NONSENSE, "a reply of another shape than expected") from None
