"""Files that list replicas: one URL a line. Pure.

    # comments, alone on a line or behind a URL and a space
    http://10.0.0.7:8000
    http://10.0.0.8:8000   # the new one

All of a file is taken, or none of it: a line that cannot be used spoils it, with line and column.
"""

from __future__ import annotations

from typing import Final

from roost_router.discovery.roster import MAX_REPLICAS, Told
from roost_router.replica_url import ReplicaUrlError, check_replica_url, url_key

MAX_FILE_BYTES: Final = 1 << 20


class ReplicasFileError(ValueError):
    """A file that lists no replicas; the message says where, and why."""


def parse_replicas(data: bytes) -> list[Told]:
    """The replicas that a file lists. Raises ReplicasFileError. O(bytes)."""
    if len(data) > MAX_FILE_BYTES:
        raise ReplicasFileError(f"it is larger than {MAX_FILE_BYTES:,} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise ReplicasFileError(f"line {line}, column {column}: not UTF-8") from None
    first_lines: dict[str, int] = {}
    found = []
    for number, written in enumerate(text.split("\n"), 1):
        words = _without_comment(written).split()
        if not words:
            continue
        column = written.index(words[0]) + 1
        if len(words) > 1:
            column = written.index(words[1], column + len(words[0]) - 1) + 1
            raise ReplicasFileError(f"line {number}, column {column}: one URL a line")
        try:
            check_replica_url(words[0])
        except ReplicaUrlError as error:
            raise ReplicasFileError(f"line {number}, column {column}: {error}") from None
        first = first_lines.setdefault(url_key(words[0]), number)
        if first != number:
            raise ReplicasFileError(
                f"line {number}, column {column}: the same replica as in line {first}"
            )
        found.append(Told(words[0]))
    if len(found) > MAX_REPLICAS:
        raise ReplicasFileError(f"it lists {len(found):,} replicas; at most {MAX_REPLICAS:,}")
    return found


def _without_comment(line: str) -> str:
    """A # begins a comment at the start of a line or after a space: URLs have none inside."""
    at = line.find("#")
    while at > 0 and not line[at - 1].isspace():
        at = line.find("#", at + 1)
    return line if at < 0 else line[:at]
