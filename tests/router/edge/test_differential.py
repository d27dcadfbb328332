"""Random mutations of requests, read by us and by h11: what we take, both must read alike.

h11 is another parser with its own opinions; where it is the more lenient one, we refuse and all
is well. Where we take a request, h11 must see the same method, target and body, or refuse it for
one of the reasons in HARMLESS (two spaces for one, empty lines before a request): no two servers
see another end of such a request, and what goes to a replica is written anew. Whatever we write
must be read by h11 as exactly one request with the same body.
"""

from __future__ import annotations

from random import Random

import h11
import pytest

from roost_router.config import RouterConfig
from roost_router.http.downstream import Downstream
from roost_router.http.head import replica_head, to_replica
from roost_router.http.serving import Request

BODY = b'{"model":"m","prompt":"x"}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nuser-agent: b\r\n"
SEEDS = [
    HEAD + b"content-length: 26\r\n\r\n" + BODY,
    HEAD + b"transfer-encoding: chunked\r\n\r\n1a\r\n" + BODY + b"\r\n0\r\n\r\n",
    HEAD + b"transfer-encoding: chunked\r\n\r\n1a;a=b\r\n" + BODY + b"\r\n0\r\nx: y\r\n\r\n",
    HEAD + b"content-length: 0\r\nexpect: 100-continue\r\nx: \xff\r\n\r\n",
    b"GET /v1/models?a=b HTTP/1.1\r\nhost: a\r\nconnection: keep-alive\r\n\r\n",
    b"POST http://a/v1/completions HTTP/1.0\r\ncontent-length: 26\r\n\r\n" + BODY,
]
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b" ", b"\t", b"\x0b", b"\x00", b":", b";", b",", b"=", b'"',
    b"\xff", b"_", b"0", b"1", b"9", b"a", b"+", b"-", b"0x", b"content-length: 26\r\n",
    b"Content-Length: 0\r\n", b"content-length:", b"transfer-encoding: chunked\r\n",
    b"Transfer-Encoding:", b"chunked", b"identity", b"connection: close\r\n",
    b"connection: content-length\r\n", b"host: b\r\n", b"HTTP/1.1", b"HTTP/1.0", b"1a\r\n",
    b"0\r\n\r\n", b"expect: 100-continue\r\n", b"x: y\r\n", b" z\r\n", b"/", b"?", b"#",
    b"%0d%0a", BODY,
]  # fmt: skip

#: Substrings of h11's reasons for refusing what we take.
HARMLESS = ("illegal request line", "no request line received")


class Recorder:
    """A service that answers each request at once; also its connection's transport."""

    limits = RouterConfig(replicas=("http://127.0.0.1:1",))
    max_body_bytes = 10_000
    is_draining = False

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.is_open = True

    def opened(self, client: Downstream, address: object) -> None: ...

    def closed(self, client: Downstream) -> None: ...

    def answer(self, client: Downstream, request: Request) -> Recorder:
        self.requests.append(request)
        self._client = client
        return self

    def start(self) -> None:
        self._client.finish(keep_alive=self.requests[-1].keep_alive)

    def write(self, data: bytes) -> None: ...

    def close(self) -> None:
        self.is_open = False

    def can_write_eof(self) -> bool:
        return False

    def __getattr__(self, name: str):
        """What else a connection may ask its service or transport for."""
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_, **__: None


def ours(pieces: list[bytes]) -> list[Request]:
    """The requests that a connection takes."""
    recorder = Recorder()
    client = Downstream(recorder)
    client.connection_made(recorder)
    for piece in pieces:
        if recorder.is_open:
            client.data_received(piece)
    return recorder.requests


def theirs(data: bytes) -> tuple[list[tuple[bytes, bytes, bytes]], str]:
    """What h11 reads, and why it stopped."""
    found: list[tuple[bytes, bytes, bytes]] = []
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(data)
    try:
        while isinstance(request := connection.next_event(), h11.Request):
            body = b""
            while isinstance(event := connection.next_event(), h11.Data):
                body += event.data
            if not isinstance(event, h11.EndOfMessage):
                return found, "incomplete"
            found.append((request.method, request.target, body))
            if connection.their_state is h11.MUST_CLOSE:
                return found, "last"
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            connection.start_next_cycle()
    except h11.RemoteProtocolError as error:
        return found, str(error)
    return found, "incomplete"


def mutated(rng: Random) -> bytes:
    data = b"".join(rng.choices(SEEDS, k=rng.randint(1, 2)))
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(len(data) + 1)
        cut = rng.choice([0, 0, 0, 1, 1, 2, 8])
        data = (
            data[:at] + rng.choice([*TOKENS, b"", bytes([rng.randrange(256)])]) + data[at + cut :]
        )
    return data


def in_pieces(rng: Random, data: bytes) -> list[bytes]:
    cuts = sorted(rng.choices(range(len(data) + 1), k=rng.choice([0, 0, 1, 3])))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a < b]


@pytest.mark.parametrize("seed", range(4))
def test_what_we_take_another_parser_reads_alike(seed):
    rng, num_taken, num_refused = Random(seed), 0, 0
    for _ in range(5000):
        data = mutated(rng)
        pieces = in_pieces(rng, data)

        taken = ours(pieces)
        read, reason = theirs(data)

        num_taken += len(taken)
        num_refused += len(read) - len(taken)
        for number, request in enumerate(taken):
            if number >= len(read):
                assert any(known in reason for known in HARMLESS), (reason, data)
                break
            method, target, body = read[number]
            assert (method, body) == (request.method, request.body), data
            assert target.endswith(request.target) or request.target == b"/", data
            check_forwarded(request)

    assert num_taken > 3000
    assert num_refused > 100


def check_forwarded(request: Request) -> None:
    """What we write is read as this one request."""
    sent = replica_head(
        request.head,
        base_path=b"",
        host=b"replica",
        request_id=b"one",
        is_resumable=True,
        body_bytes=len(request.body),
    )
    read, reason = theirs(sent + request.body)
    assert [(request.method, request.target, request.body)] == read, sent
    assert reason == "incomplete"


@pytest.mark.parametrize("seed", range(4))
def test_a_request_is_read_alike_however_it_is_cut_and_whatever_was_read_before(seed):
    """Known heads (http/known_heads.py) take the place of llhttp: they must not read otherwise."""
    rng = Random(seed)
    for base in SEEDS:
        for _ in range(3):
            ours([base])
    for _ in range(3000):
        data = mutated(rng)

        whole, cut = ours([data]), ours(in_pieces(rng, data))
        bytewise = ours([data[at : at + 1] for at in range(len(data))])

        assert shown(whole) == shown(cut) == shown(bytewise), data


def shown(requests: list[Request]) -> list[object]:
    return [(r.method, r.target, to_replica(r.headers), r.body, r.keep_alive) for r in requests]
