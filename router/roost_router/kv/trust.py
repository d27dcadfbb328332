"""How far what KV events told of a replica can be relied upon, and why not further.

EXACT         every event since the replica's cache was empty has been applied, in order.
CATCHING_UP   batches are missing and have been asked for; later ones wait. What is known is old.
APPROXIMATE   events are applied, some were lost: stored blocks are missing, removed ones are not.
BLIND         nothing was heard, or nothing lately where heartbeats are due.
"""

from __future__ import annotations

import enum


class Trust(enum.Enum):
    """How far what is known of a replica's blocks can be relied upon."""

    EXACT = "exact"
    CATCHING_UP = "catching_up"
    APPROXIMATE = "approximate"
    BLIND = "blind"


class Reason(enum.Enum):
    """Why trust is not EXACT."""

    NONE = "none"
    NOT_HEARD = "not_heard"  # nothing came yet
    SILENT = "silent"  # heartbeats are missing
    LATE_JOIN = "late_join"  # the first batches were before our time
    GAP = "gap"  # batches are missing
    UNDECODABLE = "undecodable"  # a batch could not be read
    DIGEST = "digest"  # what was told does not add up to what the engine has
