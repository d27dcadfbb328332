"""The scripts that run inside Redis: name, source, SHA-1. What they keep there is drawn here.

    <prefix>holders               HASH: who may hold blocks, and the state of the sweep
        r<number>                 "<serial> <fence> <epoch> <tier> <replica>" of a live holder
        n<tier> <replica>         its number
        s<number>                 when it was last written for: seconds since 1970
        live, dead, going         masks: alive; retired; retired before this round of the sweep
        at, gen, cursor           version; generation of the buckets; the sweep's next bucket
    <prefix>b:<generation><2 B>   HASH: one of 32,768 buckets, packed (ziplist, listpack)
        6 bytes of an id          1 header byte, 16 * skip + depth class; mask of holders
    <prefix>leases, <prefix>router:<id>      see scripts/lease.lua
    <prefix>members                          see scripts/register.lua
    <prefix>quota:<name>                     see scripts/spend.lua

A *holder* is one epoch of one replica in one tier; its *number* is a bit in masks. A mask is
little-endian, without its first 4 * skip bytes and without trailing bytes, all of them zero: one
set has one value. The *depth class* is floor(log2(depth + 1)), at most 15. An *id* is 8 bytes: 15
bits are the bucket (the first bit is left out), the other 6 bytes the field.

Why so (Redis CPU on 6.2, on a shared machine; docs/decisions/0024):

- 32,768 buckets: 17 B a block at 1 M blocks, 15 at 3 M. With 65,536 it is 21 and 16; with 16,384
  it is 15 and 14, but at 3 M blocks a write costs half as much again.
- A hash, no string of packed records: that saves 4 B a block, but a read costs 2.1 us instead of
  1.6, each write sends a whole bucket to Redis' replicas, and all masks need one width.
- HSETNX first, then HLEN: a new block, the usual one, costs two commands; the size is exact.

Invariants:

- A number is given away again only when a whole round of the sweep has begun and ended after its
  retirement. Whoever writes says number and *serial*, which no two holders share: who missed the
  change is refused.
- Serials, versions and fences come from Redis' clock, and grow: they are new in a table that was
  lost, too. So is the generation in each bucket's key: bits of a lost table are never read with the
  numbers of another.
- Redis does not undo what a script wrote before an error. So nothing is written before arguments
  are checked, each id's write is whole by itself, and what is of a wrong type or shape is skipped
  and counted: a call that ends early is a shorter call, and may be made again.
- Each call's work is bounded by its arguments: index.py makes them small.
- One key is declared; the others share its hash tag, hence its slot in a cluster.

Not here: who calls (index.py, leases.py, members.py), how (client.py), where ids come from
(secret.py).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_FOLDER: Final = Path(__file__).parent / "scripts"


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script: EVALSHA takes `sha`, and SCRIPT LOAD `source` where Redis does not know it."""

    name: str
    source: str
    sha: str


def _script(name: str, *parts: str) -> Script:
    source = "\n".join((_FOLDER / f"{part}.lua").read_text("utf-8") for part in (*parts, name))
    sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
    return Script(name, source, sha)


OPEN_HOLDER: Final = _script("open_holder", "common")
RETIRE_HOLDER: Final = _script("retire_holder", "common")
LIST_HOLDERS: Final = _script("list_holders", "common")
ADD: Final = _script("add", "common")
REMOVE: Final = _script("remove", "common")
LOOKUP: Final = _script("lookup", "common")
SWEEP: Final = _script("sweep", "common")
LEASE: Final = _script("lease")
RELEASE: Final = _script("release")
REGISTER: Final = _script("register")
LIST_MEMBERS: Final = _script("list_members")
SPEND: Final = _script("spend")
ALL: Final = (
    OPEN_HOLDER, RETIRE_HOLDER, LIST_HOLDERS, ADD, REMOVE, LOOKUP, SWEEP, LEASE, RELEASE,
    REGISTER, LIST_MEMBERS, SPEND,
)  # fmt: skip
