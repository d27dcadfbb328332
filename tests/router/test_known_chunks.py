"""Whole chunks are recognised without llhttp where it stands between two: heard all the same."""

from __future__ import annotations

from random import Random

import pytest
from pools import local_pool

from roost_router.http import upstream as upstream_module
from roost_router.http.upstream import Upstream

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Wire:
    """A transport that only knows whether it was closed."""

    is_closed = False

    def writelines(self, parts: list[bytes]) -> None: ...

    def is_closing(self) -> bool:
        return self.is_closed

    def abort(self) -> None:
        self.is_closed = True


class FramedListener:
    """Notes what it hears, and what came as a chunk."""

    def __init__(self) -> None:
        self.body = b""
        self.end = ""
        self.framed: list[bytes] = []

    def on_head(self, head: object) -> None: ...

    def on_end(self) -> None:
        self.end += "end"

    def on_lost(self, reason: str) -> None:
        self.end += reason

    def on_body(self, data: bytes, framed: bytes | None = None) -> None:
        self.body += data
        if framed is not None:
            assert framed == b"%x\r\n%b\r\n" % (len(data), data)
            self.framed.append(framed)


def hear(pieces: list[bytes]) -> tuple[FramedListener, bool, int]:
    pool, wire, listener = local_pool(), Wire(), FramedListener()
    upstream = Upstream(pool)
    upstream.connection_made(wire)  # type: ignore[arg-type]
    upstream.send(listener, [b"ask"])
    for piece in pieces:
        if not wire.is_closed and upstream._listener is not None:
            upstream.data_received(piece)
    return listener, wire.is_closed, len(pool._idle)


def test_a_chunk_a_read_is_passed_on_as_it_came():
    listener, _, kept = hear([HEAD, b"1\r\na\r\n", b"1\r\nb\r\n", b"2\r\ncd\r\n", b"0\r\n\r\n"])
    assert (listener.body, listener.end, kept) == (b"abcd", "end", 1)
    assert listener.framed == [b"1\r\nb\r\n", b"2\r\ncd\r\n"]  # llhttp has to read one first


@pytest.mark.parametrize(
    "chunk",
    [b"01\r\nb\r\n", b"1;x\r\nb\r\n", b"2\r\nb\r\n", b"1\r\nbc\r\n", b"A\r\n" + b"b" * 10 + b"\r\n",
     b"1\r\nb\r\n1\r\nc\r\n", b"0\r\n\r\n", b"+1\r\nb\r\n", b"1 \r\nb\r\n", b"1\r\nb\n\n"],
)  # fmt: skip
def test_what_we_would_write_otherwise_is_llhttps(chunk):
    listener, *_ = hear([HEAD, b"1\r\na\r\n", chunk])
    assert listener.framed == []


@pytest.mark.parametrize("piece", [b"1", b"1\r", b"1;a=\r", b"1\r\n", b"1\r\na", b"1\r\na\r"])
def test_in_the_middle_of_a_chunk_nothing_is_recognised(piece):
    listener, *_ = hear([HEAD, b"1\r\na\r\n", piece, b"1\r\nb\r\n"])
    assert listener.framed == []


@pytest.mark.interpreted
@pytest.mark.parametrize("seed", range(200))
def test_streams_cut_anywhere_are_heard_alike(monkeypatch, seed):
    rng = Random(seed)
    chunks = [HEAD]
    for _ in range(rng.randrange(1, 8)):
        data = rng.choice([b"x", b"\r\n", b"1\r\n", b"0\r\n\r\n", b"y" * rng.randrange(1, 300)])
        chunks.append(b"%x\r\n%b\r\n" % (len(data), data))
    chunks.append(b"0\r\n\r\n")
    stream = bytearray(b"".join(chunks))
    if rng.random() < 0.5:
        at = rng.randrange(len(HEAD), len(stream))
        stream[at : at + rng.randrange(2)] = rng.choice([b"", b"\r", b"\n", b"1", b";", b" "])
        cuts = {0, len(stream), *(rng.randrange(len(stream)) for _ in range(rng.randrange(6)))}
        pieces = [bytes(stream[a:b]) for a, b in zip(sorted(cuts), sorted(cuts)[1:], strict=False)]
    else:
        pieces = chunks
    known = hear(pieces)
    monkeypatch.setattr(upstream_module, "_start_of_only_chunk", lambda _: 0)
    plain = hear(pieces)
    assert (known[0].body, known[0].end) == (plain[0].body, plain[0].end)
    assert known[1:] == plain[1:]
