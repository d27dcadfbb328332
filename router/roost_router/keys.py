"""API keys: how one is made, how it is kept, who it belongs to. Pure.

A key is `sk-` and 32 random bytes in base64url: 256 bits, so that nobody guesses one and a plain
SHA-256 is enough to keep it (a password needs a slow hash, a random key does not). The file holds
hashes only, one key a line; a name is what logs and people call it:

    # from `roost keys new --name alice`
    sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 alice rpm=60 tpm=100000

What may follow the name limits it (quotas.py): requests a minute, tokens of prompts a minute. All
keys of one name share its limits.

Invariants: a key itself is never stored, and no message here repeats one. Digests are compared in
constant time.

Not here: reading the file (app.py) and the header (http/service.py).
"""

from __future__ import annotations

import hmac
import re
from base64 import urlsafe_b64encode
from hashlib import sha256

from roost_router.quotas import Limits

#: Random bytes of a key.
KEY_BYTES = 32
_LINE = re.compile(
    r"sha256:([0-9a-f]{64})(?:[ \t]+(?!rpm=|tpm=)(\S+))?((?:[ \t]+[rt]pm=[1-9][0-9]{0,8}){0,2})"
)
_MAX_KEY_BYTES = 512  # with the scheme; more is no key of ours
_PART_BYTES = 8


class KeyFileError(ValueError):
    """A file of keys cannot be used; the message names the line and never shows its content."""


class KeyRing:
    """The keys that open a port."""

    def __init__(self, names: dict[bytes, str], limits: dict[str, Limits] | None = None) -> None:
        """`names`: SHA-256 of each key, and the name of whom it belongs to. `limits`: of names."""
        # Found by a part of the digest, then compared whole in constant time: a dictionary of
        # whole digests would stop comparing at the first byte that differs.
        self._by_part: dict[bytes, list[tuple[bytes, str]]] = {}
        for digest, name in names.items():
            self._by_part.setdefault(digest[:_PART_BYTES], []).append((digest, name))
        self._num_keys = len(names)
        self._names = names
        self.limits = limits or {}

    def __len__(self) -> int:
        return self._num_keys

    def with_those_of(self, other: KeyRing) -> KeyRing:
        """Both rings' keys; one that both have has its name here."""
        return KeyRing(other._names | self._names, other.limits | self.limits)

    def owner(self, authorization: bytes | None) -> str | None:
        """Name behind the value of an Authorization header, or None if it opens nothing. O(1)."""
        if authorization is None or len(authorization) > _MAX_KEY_BYTES:
            return None
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        presented = sha256(key.strip(b" \t")).digest()
        for stored, name in self._by_part.get(presented[:_PART_BYTES], ()):
            if hmac.compare_digest(presented, stored):
                return name
        return None


def make_key(random_bytes: bytes) -> tuple[str, str]:
    """A new key out of KEY_BYTES random bytes, and the hash that goes into the file."""
    if len(random_bytes) != KEY_BYTES:
        raise ValueError(f"a key is made of {KEY_BYTES} random bytes, not {len(random_bytes)}")
    key = "sk-" + urlsafe_b64encode(random_bytes).decode().rstrip("=")
    return key, f"sha256:{sha256(key.encode()).hexdigest()}"


def parse_keys(text: str) -> KeyRing:
    """The keys of a file. Raises KeyFileError, naming the line, for anything that is not one.

    A key without a name is called `key-` and the first 8 digits of its hash.
    """
    names: dict[bytes, str] = {}
    limits: dict[str, Limits] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise KeyFileError(
                f"line {number} is not `sha256:HASH NAME [rpm=N] [tpm=N]`; `roost keys new` prints "
                "such lines"
            )
        digest = bytes.fromhex(found[1])
        if digest in names:
            raise KeyFileError(f"line {number} repeats a key")
        name = names[digest] = found[2] or f"key-{found[1][:8]}"
        limit = _limits(found[3], number)
        if limits.setdefault(name, limit) != limit:
            raise KeyFileError(f"line {number} has other limits than the same name before")
    if not names:
        raise KeyFileError("it holds no key, so nobody could come in; add one: `roost keys new`")
    return KeyRing(names, {name: limit for name, limit in limits.items() if any(limit)})


def _limits(text: str, number: int) -> Limits:
    """What `rpm=N tpm=N` says."""
    pairs = [part.split("=") for part in text.split()]
    given = {kind: int(most) for kind, most in pairs}
    if len(given) != len(pairs):
        raise KeyFileError(f"line {number} has a limit twice")
    return Limits(given.get("rpm", 0), given.get("tpm", 0))
