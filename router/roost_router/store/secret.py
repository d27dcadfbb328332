"""A cluster's secret, and what follows from it. Pure.

    namespace   names of keys in Redis: routers of one secret meet, those of another never do
    seal key    for what only routers read (seal.py)
    names       keyed hashes of names that stand in keys
    block ids   keyed hashes of block hashes, for what Redis itself looks up

All are keyed BLAKE2b (RFC 7693) of the secret, told apart by `person`. A block hash is a plain
function of its prompt: whoever can guess the prompt can compute it. An id cannot be computed, or
tested against a guess, without the secret. Another secret is another namespace, empty at first.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

#: Shorter ones could be guessed.
MIN_SECRET_BYTES: Final = 32
#: More than BLAKE2b takes as a key is hashed first.
_MAX_KEY_BYTES: Final = 64
ID_BYTES: Final = 8


class SecretError(ValueError):
    """This cannot be a cluster's secret; the message says why."""


class ClusterSecret:
    """What follows from a secret."""

    def __init__(self, secret: bytes) -> None:
        """Raises SecretError for less than MIN_SECRET_BYTES."""
        if len(secret) < MIN_SECRET_BYTES:
            raise SecretError(
                f"{len(secret)} bytes are too few for a secret, it needs {MIN_SECRET_BYTES}"
            )
        if len(secret) > _MAX_KEY_BYTES:
            secret = blake2b(secret).digest()
        self.namespace: Final = blake2b(key=secret, digest_size=6, person=b"namespace").hexdigest()
        #: Before all keys; the braces keep them in one slot of a Redis Cluster.
        self.prefix: Final = b"roost:{%s}:" % self.namespace.encode()
        self.seal_key: Final = blake2b(key=secret, digest_size=32, person=b"seal").digest()
        self._names: Final = blake2b(key=secret, digest_size=12, person=b"name")
        self._ids: Final = blake2b(key=secret, digest_size=ID_BYTES, person=b"block id")

    def __repr__(self) -> str:
        return f"<ClusterSecret of namespace {self.namespace}>"

    def keyed_name(self, name: str) -> bytes:
        """What stands for a name in a key: 24 hexadecimal digits."""
        keyed = self._names.copy()
        keyed.update(name.encode())
        return keyed.hexdigest().encode()

    def block_ids(self, chain: Sequence[int]) -> bytes:
        """ID_BYTES for each block hash (64 bits) of `chain`. O(blocks), about 0.6 us each."""
        ids = []
        for block_hash in chain:
            keyed = self._ids.copy()
            keyed.update(block_hash.to_bytes(8, "little"))
            ids.append(keyed.digest())
        return b"".join(ids)
