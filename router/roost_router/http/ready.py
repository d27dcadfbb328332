"""Answers that are known at once: whole, and written in one piece. No I/O but that.

Both ports use them: the data port for what it answers itself and for errors, the admin port for
everything.
"""

from __future__ import annotations

from roost_router.errors import KeyRequiredError, MethodNotAllowedError, RouterError
from roost_router.http.downstream import Downstream
from roost_router.http.head import Headers, response_head
from roost_router.http.serving import Request


class Ready:
    """An answer that needs nobody else."""

    def __init__(self, client: Downstream, answer: bytes, *, keep_alive: bool) -> None:
        """`answer`: head and body; `keep_alive`: what the head says."""
        self._client = client
        self._answer = answer
        self._keep_alive = keep_alive

    def start(self) -> None:
        """Write it."""
        self._client.write(self._answer)
        self._client.finish(keep_alive=self._keep_alive)

    def client_gone(self) -> None:
        """Nothing is under way."""

    def pause(self) -> None:
        """The answer is written already."""

    def resume(self) -> None:
        """The answer is written already."""


def whole_answer(
    request: Request, status: int, headers: Headers, body: bytes, *, keep_alive: bool
) -> bytes:
    """Head and body of an answer of known length; to HEAD, the head alone."""
    framing = [b"content-length: %d" % len(body)]
    head = response_head(status, headers, framing=framing, keep_alive=keep_alive)
    return head if request.method == b"HEAD" else head + body


def error_headers(error: RouterError) -> Headers:
    """What the head of an answer says of `error`."""
    headers = [(b"content-type", b"application/json")]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    if error.should_retry is not None:
        headers.append((b"x-should-retry", b"true" if error.should_retry else b"false"))
    if isinstance(error, KeyRequiredError):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowedError):
        headers.append((b"allow", error.allowed.encode()))
    return headers
