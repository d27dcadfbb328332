"""Traces: what was asked when, with block ids instead of text.

A trace is a file of JSON objects, one a line, plain or gzip:

    t          arrival in ms
    in, out    prompt tokens, generated tokens
    hash_ids   ids of the prompt's blocks from its start; equal ids: equal blocks, equal prefixes
    block      tokens of a block, the same in the whole file
    sid        session (closed-loop traces): its first request comes at t, each further one
    think      ms after the answer to the one before it

The last block may be a part of one. Blocks at the end that have no id are taken to be unique.

Not here: how fast a trace is played (load.py).
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path

import msgspec

_GZIP = b"\x1f\x8b"
_MAX_TOKENS = 1 << 32


class TraceError(Exception):
    """A trace that cannot be read; names file, line and cause."""


class Request(msgspec.Struct, frozen=True, gc=False):
    """One request of a trace."""

    prompt_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]
    arrives_s: float  # since the first; of no meaning after the first request of a session
    session: int | str | None = None
    think_s: float = 0.0


class Trace(msgspec.Struct, frozen=True):
    """All requests in order of arrival."""

    name: str
    block_tokens: int
    requests: list[Request]

    def num_blocks(self, request: Request) -> int:
        """Blocks that prompt and answer take together."""
        return -(-(request.prompt_tokens + request.output_tokens) // self.block_tokens)

    def num_private(self, request: Request) -> int:
        """Those of them that have no id."""
        return self.num_blocks(request) - len(request.block_ids)


class _Line(msgspec.Struct):
    block: int
    prompt: int = msgspec.field(name="in")
    out: int = msgspec.field()
    hash_ids: tuple[int, ...] = msgspec.field()
    t: float | None = None
    sid: int | str | None = None
    think: float = 0.0


def read_trace(path: Path, limit: int | None = None) -> Trace:
    """Read the trace at `path`, its first `limit` lines if given.

    Raises TraceError. O(tokens / block size), all of it in memory.
    """
    requests: list[Request] = []
    sessions: set[int | str] = set()
    block_tokens, decoder = 0, msgspec.json.Decoder(_Line)
    try:
        with _open(path) as file:
            for number, text in enumerate(_lines(file, limit), 1):
                try:
                    line = decoder.decode(text)
                    block_tokens = block_tokens or line.block
                    requests.append(_request(line, block_tokens, sessions))
                except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
                    raise TraceError(f"{path}, line {number}: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: {error}") from None
    if not requests:
        raise TraceError(f"{path}: no requests")
    return Trace(path.name.split(".")[0], block_tokens, _in_order(requests))


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    with path.open("rb") as file:
        is_gzip = file.read(2) == _GZIP
    return gzip.open(path) if is_gzip else path.open("rb")


def _lines(file: Iterable[bytes], limit: int | None) -> Iterator[bytes]:
    for number, text in enumerate(file):
        if limit is not None and number >= limit:
            return
        yield text


def _request(line: _Line, block_tokens: int, sessions: set[int | str]) -> Request:
    """A checked line as a request; ValueError says what is wrong with it."""
    if line.block != block_tokens or line.block < 1:
        raise ValueError(f"`block` is {line.block}, before it was {block_tokens}")
    if not (1 <= line.prompt <= _MAX_TOKENS and 0 <= line.out <= _MAX_TOKENS):
        raise ValueError(f"`in` {line.prompt} and `out` {line.out}: at least 1 and 0 are needed")
    if len(line.hash_ids) > -(-line.prompt // line.block):
        raise ValueError(
            f"{len(line.hash_ids)} `hash_ids` of {line.block} tokens for {line.prompt} tokens"
        )
    if len(set(line.hash_ids)) < len(line.hash_ids):
        raise ValueError("a block's id occurs twice: ids stand for a block and its prefix")
    follows = line.sid is not None and line.sid in sessions
    if line.t is None and not follows:
        raise ValueError("`t` is missing, and no request of its session came before")
    if line.sid is not None:
        sessions.add(line.sid)
    return Request(
        prompt_tokens=line.prompt,
        output_tokens=max(1, line.out),
        block_ids=line.hash_ids,
        arrives_s=(line.t or 0.0) / 1e3,
        session=line.sid,
        think_s=max(0.0, line.think) / 1e3,
    )


def _in_order(requests: list[Request]) -> list[Request]:
    """By arrival; requests of a session keep their order behind its first."""
    starts: dict[int | str, float] = {}
    for request in requests:
        if request.session is not None:
            starts.setdefault(request.session, request.arrives_s)

    def start(request: Request) -> float:
        return request.arrives_s if request.session is None else starts[request.session]

    ordered = sorted(requests, key=start)
    first = start(ordered[0])
    return [
        msgspec.structs.replace(request, arrives_s=start(request) - first) for request in ordered
    ]
