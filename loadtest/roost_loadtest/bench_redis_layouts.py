"""Four ways to keep in Redis who holds which blocks: ours, and what peers do.

    ours            roost_router/store/scripts: packed buckets, one call with bisection
    llm-d           a HASH for each block, its fields JSON of who holds it, and a ZSET for each of
                    the engine's hashes; a lookup is a pipeline of HKEYS, a command for each block
    sglang, old     a HASH for each block, replica to tiers; a script reads one after the other
    bits, MGET      a STRING for each block, a bit for each replica; a lookup is one MGET

A layout makes commands; what sends and times them is bench_redis.py. Blocks are ids of 8 bytes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import sha1
from typing import Any

from roost_router.store import scripts
from roost_router.store.index import CHUNK_IDS, LOOKUP_IDS, MAX_PROBES, TTL_S
from roost_router.store.masks import MAX_BUCKET_BLOCKS, depth_classes, thinned

NUM_REPLICAS = 16
Command = tuple[bytes | str | int, ...]
_PREFIX = b"roost:{1a2b3c4d}:"


class Layout(ABC):
    """Commands for one index, a pipeline by each method. `ids` are a chain's first, packed."""

    name: str

    def prepare(self) -> list[Command]:
        """What comes first."""
        return []

    def prepared(self, replies: Sequence[Any]) -> None:  # noqa: ARG002  some keep nothing of it
        """What was replied to that."""
        return

    @abstractmethod
    def add(self, replica: int, ids: bytes) -> list[Command]:
        """A replica has these blocks."""

    @abstractmethod
    def remove(self, replica: int, ids: bytes) -> list[Command]:
        """It has them no more."""

    @abstractmethod
    def lookup(self, ids: bytes) -> list[Command]:
        """Who holds how much of a chain."""

    def usual_lookup(self, ids: bytes) -> list[Command]:
        """The same as it is really asked, if that is something else."""
        return self.lookup(ids)


class Ours(Layout):
    """The scripts of the router's index."""

    name = "ours"

    def __init__(self) -> None:
        self._holders: list[tuple[int, bytes]] = []

    def prepare(self) -> list[Command]:
        """Scripts and holders."""
        load: list[Command] = [("SCRIPT", "LOAD", script.source) for script in scripts.ALL]
        return load + [
            _call(scripts.OPEN_HOLDER, b"http://10.0.0.%d:8000" % n, b"device", 1, 1, 0, TTL_S)
            for n in range(NUM_REPLICAS)
        ]

    def prepared(self, replies: Sequence[Any]) -> None:
        """Numbers and serials of the holders."""
        self._holders = [(reply[1], reply[2]) for reply in replies[len(scripts.ALL) :]]

    def add(self, replica: int, ids: bytes) -> list[Command]:
        """A call for each chunk."""
        holder = (*self._holders[replica], 1, TTL_S, MAX_BUCKET_BLOCKS)
        return [
            _call(scripts.ADD, *holder, depth_classes(range(at, at + len(chunk) // 8)), chunk)
            for at, chunk in _chunks(ids, CHUNK_IDS)
        ]

    def remove(self, replica: int, ids: bytes) -> list[Command]:
        """A call for each chunk."""
        holder = (*self._holders[replica], 1, TTL_S)
        return [_call(scripts.REMOVE, *holder, chunk) for _, chunk in _chunks(ids, CHUNK_IDS)]

    def lookup(self, ids: bytes) -> list[Command]:
        """One call."""
        return [_call(scripts.LOOKUP, ids, MAX_PROBES)]

    def usual_lookup(self, ids: bytes) -> list[Command]:
        """Of a long chain not every block is asked for."""
        return self.lookup(thinned(ids, LOOKUP_IDS)[0])


class LlmD(Layout):
    """As llm-d's `redis.go` (facts of its source): block keys in decimal, JSON fields."""

    name = "llm-d"

    def add(self, replica: int, ids: bytes) -> list[Command]:
        """Two commands for each block."""
        pod = _pod(replica)
        commands: list[Command] = []
        for number in _numbers(ids):
            commands.append(("ZADD", f"engine:{number ^ 0x5555}", 0, number))
            commands.append(("HSET", number, pod, ""))
        return commands

    def remove(self, replica: int, ids: bytes) -> list[Command]:
        """Two commands for each block."""
        pod = _pod(replica)
        commands: list[Command] = []
        for number in _numbers(ids):
            commands.append(("HDEL", number, pod))
            commands.append(("ZREM", f"engine:{number ^ 0x5555}", number))
        return commands

    def lookup(self, ids: bytes) -> list[Command]:
        """A command for each block."""
        return [("HKEYS", number) for number in _numbers(ids)]


class OldSglang(Layout):
    """As the Redis index that SGLang's router had once: a HASH for each block, replica to tiers."""

    name = "sglang, old"
    _LOOKUP = """
        local depths = {}
        for at = 1, #KEYS do
          local holders, is_held = redis.call('HGETALL', KEYS[at]), false
          for i = 1, #holders, 2 do
            if (depths[holders[i]] or 0) == at - 1 then
              depths[holders[i]], is_held = at, true
            end
          end
          if not is_held then break end
        end
        local reply = {}
        for replica, depth in pairs(depths) do
          reply[#reply + 1] = replica
          reply[#reply + 1] = depth
        end
        return reply"""

    def prepare(self) -> list[Command]:
        """The script."""
        return [("SCRIPT", "LOAD", self._LOOKUP)]

    def add(self, replica: int, ids: bytes) -> list[Command]:
        """A command for each block."""
        return [("HSET", key, f"http://10.0.0.{replica}:8000", 1) for key in self._names(ids)]

    def remove(self, replica: int, ids: bytes) -> list[Command]:
        """A command for each block."""
        return [("HDEL", key, f"http://10.0.0.{replica}:8000") for key in self._names(ids)]

    def lookup(self, ids: bytes) -> list[Command]:
        """One call with a key for each block."""
        keys = self._names(ids)
        return [("EVALSHA", _sha(self._LOOKUP), len(keys), *keys)]

    def _names(self, ids: bytes) -> list[str]:
        return [f"kvidx:{number}:p" for number in _numbers(ids)]


class Bits(Layout):
    """A bit for each replica in a string for each block, written in a script, as ours is."""

    name = "bits, MGET"
    _WRITE = """
        local ids, replica, bit = ARGV[1], ARGV[2], ARGV[3]
        for at = 1, #ids, 8 do
          redis.call('SETBIT', 'm:' .. string.sub(ids, at, at + 7), replica, bit)
        end"""

    def prepare(self) -> list[Command]:
        """The script."""
        return [("SCRIPT", "LOAD", self._WRITE)]

    def add(self, replica: int, ids: bytes) -> list[Command]:
        """A call for each chunk."""
        return self._write(replica, ids, 1)

    def remove(self, replica: int, ids: bytes) -> list[Command]:
        """A call for each chunk; strings without bits stay."""
        return self._write(replica, ids, 0)

    def lookup(self, ids: bytes) -> list[Command]:
        """One command with a key for each block."""
        return [("MGET", *(b"m:" + ids[at : at + 8] for at in range(0, len(ids), 8)))]

    def _write(self, replica: int, ids: bytes, bit: int) -> list[Command]:
        sha = _sha(self._WRITE)
        return [("EVALSHA", sha, 0, chunk, replica, bit) for _, chunk in _chunks(ids, CHUNK_IDS)]


def _call(script: scripts.Script, *args: bytes | int) -> Command:
    return ("EVALSHA", script.sha, 1, _PREFIX + b"holders", *args)


def _chunks(ids: bytes, count: int) -> list[tuple[int, bytes]]:
    return [(at // 8, ids[at : at + 8 * count]) for at in range(0, len(ids), 8 * count)]


def _numbers(ids: bytes) -> Sequence[int]:
    return memoryview(ids).cast("Q")


def _pod(replica: int) -> str:
    return json.dumps({"podIdentifier": f"10.0.0.{replica}:8000", "deviceTier": "gpu"})


def _sha(source: str) -> str:
    return sha1(source.encode(), usedforsecurity=False).hexdigest()
