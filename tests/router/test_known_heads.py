"""Known heads are read as strictly as llhttp reads them: the same bytes, with and without them.

Each stream of bytes goes through two connections. One has seen the usual heads before and
recognises them, the other reads everything with llhttp. Both must serve the same requests (or
hear the same answers), write the same bytes, and close alike.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from pools import local_pool

from roost_router.config import RouterConfig
from roost_router.http import downstream
from roost_router.http.downstream import Downstream
from roost_router.http.known_heads import (
    MAX_KNOWN_BYTES,
    KnownHeads,
    read_known_request,
    read_known_response,
)
from roost_router.http.serving import Request
from roost_router.http.upstream import Upstream

BODY = b'{"model":"m","messages":[]}'
ASK = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\nX-Request-Id: one\r\n\r\n"
)
SHORT = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n"
HEADS = (ASK, SHORT)
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\nserver: x\r\n\r\n"
)
#: What attackers put where it does not belong.
SPICE = (
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b"0", b"1", b"-1", b"+1", b"1,1",
    b"\x0b", b"\xff", b"Transfer-Encoding: chunked\r\n", b"transfer-encoding : chunked\r\n",
    b"Content-Length: 3\r\n", b"content-length: 27\r\n", b"Connection: close\r\n",
    b"Connection: upgrade\r\nUpgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"Host: b\r\n",
    b"HTTP/1.0", b"GET / HTTP/1.1\r\n\r\n", b"99999999999", b"9999999999999999999999", b"0x1b",
)  # fmt: skip


class Wire:
    """A transport in memory."""

    def __init__(self) -> None:
        self.written = b""
        self.is_closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def writelines(self, parts: list[bytes]) -> None:
        self.written += b"".join(parts)

    def is_closing(self) -> bool:
        return self.is_closed

    def can_write_eof(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int) -> None: ...

    def get_extra_info(self, name: str) -> None: ...

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Counter:
    """A service that answers each request at once, and notes what it was asked."""

    limits = RouterConfig(replicas=("http://127.0.0.1:1",))
    max_body_bytes = 1000
    is_draining = False

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def opened(self, client: Downstream, address: object) -> None: ...

    def closed(self, client: Downstream) -> None: ...

    def answer(self, client: Downstream, request: Request) -> Any:
        head = request.head
        self.asked.append((head.method, head.target, head.headers, head.lines, request.body))
        return Answer(client, keep_alive=head.keep_alive)


class Answer:
    def __init__(self, client: Downstream, *, keep_alive: bool) -> None:
        self._client, self._keep_alive = client, keep_alive

    def start(self) -> None:
        self._client.write(b"ok\n")
        self._client.finish(keep_alive=self._keep_alive)


def known_requests(*heads: bytes) -> KnownHeads[Any]:
    known = KnownHeads(read_known_request)
    for head in heads:
        known.learn(head % 7)
        known.learn(head % 8)
    assert len(known) == len(heads)
    return known


def serve(data: list[bytes], heads: KnownHeads[Any] | None) -> tuple[Any, ...]:
    service, wire = Counter(), Wire()
    client = Downstream(service)  # type: ignore[arg-type]
    client._heads = heads
    client.connection_made(wire)  # type: ignore[arg-type]
    for piece in data:
        client.data_received(piece)
    return service.asked, wire.written, wire.is_closed, client.is_idle


def cut(data: bytes, rng: Random) -> list[bytes]:
    places = sorted(rng.sample(range(1, len(data)), min(rng.randrange(4), len(data) - 1)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def mutate(data: bytes, rng: Random) -> bytes:
    for _ in range(rng.randrange(1, 3)):
        at = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data = data[:at] + rng.choice(SPICE) + data[at:]
            case 1:
                data = data[:at] + data[at + rng.randrange(1, 4) :]
            case 2:
                data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
            case 3:
                lines = data.split(b"\r\n")
                lines.insert(rng.randrange(len(lines)), rng.choice(lines))
                data = b"\r\n".join(lines)
            case _:
                data = data.swapcase() if rng.random() < 0.1 else data[:at] + data[at : at + 9] * 2
    return data or b"x"


@pytest.mark.parametrize("seed", range(40))
def test_mutated_requests_are_served_as_llhttp_reads_them(seed):
    rng, known = Random(seed), known_requests(*HEADS)
    for _ in range(100):
        parts = []
        for _ in range(rng.randrange(1, 4)):
            body = BODY[: rng.randrange(len(BODY))] if rng.random() < 0.5 else BODY
            digits = rng.choice([len(body), len(body), len(body), 0, 5, 1001])
            part = (rng.choice(HEADS) % digits) + body
            parts.append(mutate(part, rng) if rng.random() < 0.5 else part)
        data = cut(b"".join(parts), rng)

        assert serve(data, None) == serve(data, known), data


def test_a_request_cut_anywhere_is_one_request():
    data = ASK % len(BODY) + BODY + SHORT % 0 + ASK % 3 + b"abc"
    known = known_requests(*HEADS)

    for at in range(1, len(data)):
        asked, *rest = serve([data[:at], data[at:]], known)
        assert [BODY, b"", b"abc"] == [request[-1] for request in asked], at
        assert [b"ok\n" * 3, False, True] == rest


def test_many_pipelined_known_requests_are_served_in_order():
    known, bodies = known_requests(SHORT), [b"%d" % n for n in range(5000)]

    asked, *_ = serve([b"".join(SHORT % len(b) + b for b in bodies)], known)

    assert bodies == [request[-1] for request in asked]


@pytest.mark.parametrize("digits", [b"007", b"7", b"0000000007"])
def test_the_digits_may_be_any_that_llhttp_reads(digits):
    data = [SHORT.replace(b"%d", digits) + b"1234567" + SHORT % 1 + b"x"]

    assert serve(data, None) == serve(data, known_requests(SHORT))
    assert len(serve(data, None)[0]) == 2


@pytest.mark.parametrize(
    "digits", [b"", b"-7", b"+7", b"7 ", b" 7", b"7,7", b"0x7", b"\xb7", b"7" * 30]
)
def test_other_digits_are_llhttps_to_judge(digits):
    data = [SHORT.replace(b"%d", digits) + b"1234567"]

    assert serve(data, None) == serve(data, known_requests(SHORT))


@pytest.mark.parametrize("length", [999, 1000, 1001])
def test_the_limit_of_the_body_holds_for_known_heads(length):
    data = [SHORT % length + b"x" * length]

    assert serve(data, None) == serve(data, known_requests(SHORT))
    assert (len(serve(data, None)[0]) == 1) == (length <= Counter.max_body_bytes)


def test_nothing_is_served_after_connection_close():
    last = SHORT.replace(b"host", b"connection: close\r\nhost") % 1 + b"x"
    service, wire = Counter(), Wire()
    service.answer = lambda client, request: Waiting(service, request)  # type: ignore[method-assign]
    client = Downstream(service)  # type: ignore[arg-type]
    client._heads = known_requests(SHORT)
    client.connection_made(wire)  # type: ignore[arg-type]

    client.data_received(SHORT % 1 + b"1")
    client.data_received(last)
    client.data_received(SHORT % 1 + b"2")
    for _ in range(3):
        if client._active is not None:
            client.finish(keep_alive=client._active.request.head.keep_alive)

    assert [b"1", b"x"] == [request.body for request in service.asked]
    assert wire.is_closed


class Waiting:
    def __init__(self, service: Counter, request: Any) -> None:
        self.request = request
        service.asked.append(request)

    def start(self) -> None: ...


@pytest.mark.parametrize(
    "head",
    [
        SHORT.replace(b"HTTP/1.1", b"HTTP/1.0"),
        SHORT.replace(b"host: a", b"host: a\r\nconnection: close"),
        SHORT.replace(b"host: a", b"host: a\r\nexpect: 100-continue"),
        SHORT.replace(b"host: a", b"host: a\r\nupgrade: h2c\r\nconnection: upgrade"),
        SHORT.replace(b"host: a", b"host: a\r\nupgrade: h2c"),
        SHORT.replace(b"host: a", b"host: a\r\ntransfer-encoding: chunked"),
        SHORT.replace(b"host: a", b"host: a\r\ncontent-length: 1"),
        SHORT.replace(b"host: a", b"host: a\r\n folded"),
        SHORT.replace(b"host: a", b"host: a\r\nx: " + b"a" * MAX_KNOWN_BYTES),
        SHORT.replace(b"\r\n", b"\n"),
        b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nx: content-length: %d\r\n\r\n",
    ],
)
def test_heads_that_change_more_than_a_length_are_never_known(head):
    known = KnownHeads(read_known_request)
    for number in range(5):
        known.learn(head % number)

    assert known.find(head % 1) is None


def test_a_head_seen_once_is_not_kept():
    known = KnownHeads(read_known_request)
    for number in range(5000):
        known.learn(ASK.replace(b"one", b"%d" % number) % 1)

    assert len(known) == 0


def test_the_number_of_known_heads_is_bounded():
    known = KnownHeads(read_known_request)
    for number in range(3000):
        head = ASK.replace(b"one", b"%d" % number)
        known.learn(head % 1)
        known.learn(head % 1)
        assert known.find(head % 9) is not None

    assert len(known) <= 512


def test_a_connection_learns_from_its_own_requests(monkeypatch):
    heads = KnownHeads(read_known_request)
    monkeypatch.setattr(downstream, "_KNOWN_HEADS", heads)
    client = Downstream(Counter())  # type: ignore[arg-type]
    client.connection_made(Wire())  # type: ignore[arg-type]

    for number in range(3):
        client.data_received(SHORT % number + b"x" * number)

    assert len(heads) == 1
    assert client._known is heads.find(SHORT % 1)


# Answers of a replica


class Listener:
    """Notes what it hears; leaves at the head if told to."""

    def __init__(self) -> None:
        self.head: Any = None
        self.body = b""
        self.end = ""

    def on_head(self, head: Any) -> None:
        self.head = (head.status, head.headers, head.lines)

    def on_answer(self, head: Any, body: bytes) -> None:
        self.on_head(head)
        self.on_body(body)
        self.on_end()

    def on_body(self, data: bytes, framed: bytes | None = None) -> None:
        self.body += data

    def on_end(self) -> None:
        self.end += "end"

    def on_lost(self, reason: str) -> None:
        self.end += reason


def hear(data: list[bytes], heads: KnownHeads[Any]) -> tuple[Any, ...]:
    pool, wire = local_pool(), Wire()
    pool.heads = heads
    upstream = Upstream(pool)
    upstream.connection_made(wire)  # type: ignore[arg-type]
    heard = []
    for piece in data:
        if upstream._listener is None and not wire.is_closed:
            heard.append(Listener())
            upstream.send(heard[-1], [b"ask"])
        upstream.data_received(piece)
    if wire.is_closed:
        upstream.connection_lost(None)
    return [(one.head, one.body, one.end) for one in heard], wire.is_closed, len(pool._idle)


def known_answers() -> KnownHeads[Any]:
    known = KnownHeads(read_known_response)
    known.learn(ANSWER % 7)
    known.learn(ANSWER % 8)
    assert len(known) == 1
    return known


@pytest.mark.parametrize("seed", range(40))
def test_mutated_answers_are_heard_as_llhttp_reads_them(seed):
    rng, known = Random(seed), known_answers()
    for _ in range(100):
        data = []
        for _ in range(rng.randrange(1, 4)):
            body = BODY[: rng.randrange(len(BODY))] if rng.random() < 0.5 else BODY
            digits = rng.choice([len(body), len(body), len(body), 0, 5, 99])
            part = ANSWER % digits + body
            data += cut(mutate(part, rng) if rng.random() < 0.5 else part, rng)

        assert hear(data, KnownHeads(lambda _: None)) == hear(data, known), data


@pytest.mark.parametrize(
    "head",
    [
        ANSWER.replace(b"200 OK", b"404 Not Found"),
        ANSWER.replace(b"200 OK", b"204 No Content"),
        ANSWER.replace(b"200 OK", b"100 Continue"),
        ANSWER.replace(b"HTTP/1.1", b"HTTP/1.0"),
        ANSWER.replace(b"server: x", b"connection: close"),
        ANSWER.replace(b"server: x", b"transfer-encoding: chunked"),
    ],
)
def test_only_whole_answers_on_kept_connections_are_known(head):
    known = KnownHeads(read_known_response)
    for number in range(5):
        known.learn(head % number)

    assert known.find(head % 1) is None
