"""Heads as they are written, and what a head says by itself."""

from __future__ import annotations

import pytest

from roost_router.http.head import RequestHead, ResponseHead, client_head, replica_head
from roost_router.http.request_ids import RequestIds


def test_a_request_goes_on_with_our_framing_and_id():
    headers = [
        (b"host", b"client"),
        (b"content-length", b"99"),
        (b"x-request-id", b"given"),
        (b"accept-encoding", b"gzip"),
        (b"connection", b"x-hop"),
        (b"x-hop", b"1"),
        (b"authorization", b"Bearer key"),
    ]
    head = RequestHead(b"POST", b"http://client/v1/completions?a=b", headers)

    written = replica_head(
        head,
        base_path=b"/base",
        host=b"r",
        request_id=b"one",
        is_resumable=True,
        body_bytes=7,
    )

    assert written == (
        b"POST /base/v1/completions?a=b HTTP/1.1\r\nhost: r\r\nauthorization: Bearer key\r\n"
        b"x-request-id: one\r\nx-roost-resumable: 1\r\ncontent-length: 7\r\n\r\n"
    )
    assert (head.path, head.request_id) == (b"/v1/completions", b"given")


def test_percent_signs_in_a_head_are_only_bytes():
    head = RequestHead(b"POST", b"/%d%b%s", [(b"x", b"%d %b 100%")])

    written = replica_head(
        head, base_path=b"", host=b"%d", request_id=b"%b", is_resumable=False, body_bytes=0
    )

    assert written == (
        b"POST /%d%b%s HTTP/1.1\r\nhost: %d\r\nx: %d %b 100%\r\nx-request-id: %b\r\n"
        b"content-length: 0\r\n\r\n"
    )


@pytest.mark.parametrize("cached", [None, 16])
@pytest.mark.parametrize("keep_alive", [True, False])
def test_an_answer_says_where_it_was_computed(cached, keep_alive):
    head = ResponseHead(200, [(b"content-type", b"text/plain"), (b"x-roost-attempts", b"99")])

    written = client_head(
        head, request_id=b"one", replica=b"r1", matched_tokens=5, attempts=2, cached_tokens=cached,
        framing=b"content-length: 3\r\n", keep_alive=keep_alive,
    )  # fmt: skip

    lines = written.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 OK"
    assert lines[1:6] == [
        b"content-type: text/plain", b"x-request-id: one", b"x-roost-replica: r1",
        b"x-roost-matched-tokens: 5", b"x-roost-attempts: 2",
    ]  # fmt: skip
    assert (b"x-roost-cached-tokens: 16" in lines) == (cached == 16)
    assert (b"connection: close" in lines) == (not keep_alive)
    assert lines[-2:] == [b"", b""]


@pytest.mark.parametrize(
    ("value", "seed"),
    [
        (b"-5", -5),
        (b"7", 7),
        (b"+7", None),
        (b"", None),
        (b"1" * 20, int("1" * 20)),
        (b"1" * 21, None),
    ],
)
def test_numbers_of_a_replica_are_read_only_if_they_are_plain(value, seed):
    assert seed == ResponseHead(200, [(b"x-roost-seed", value)]).seed


def test_request_ids_differ_and_are_drawn_many_at_a_time():
    drawn: list[int] = []

    def random_bytes(count: int) -> bytes:
        drawn.append(count)
        return bytes((len(drawn) + place // 16) % 256 for place in range(count))

    ids = RequestIds(random_bytes)
    made = [ids.next() for _ in range(257)]

    assert drawn == [4096, 4096]
    assert len(set(made[:256])) == 256
    assert all(len(one) == 36 and one.startswith(b"req-") for one in made)
