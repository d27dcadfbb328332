"""What a connection and those who serve it know of each other: a request, and three protocols."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from roost_router.http.head import Headers, RequestHead
from roost_router.http.patience import Limits

if TYPE_CHECKING:
    from roost_router.errors import RouterError
    from roost_router.http.downstream import Downstream


class Request:
    """One request as it was read."""

    __slots__ = ("body", "head")

    def __init__(self, head: RequestHead, body: bytes) -> None:
        self.head = head
        self.body = body

    @property
    def method(self) -> bytes:
        """As sent."""
        return self.head.method

    @property
    def target(self) -> bytes:
        """Path and query."""
        return self.head.target

    @property
    def headers(self) -> Headers:
        """Names in lower case; not to be changed."""
        return self.head.headers

    @property
    def keep_alive(self) -> bool:
        """Whether the connection stays open after the answer."""
        return self.head.keep_alive

    @property
    def is_http_1_0(self) -> bool:
        """Whether the client cannot read a chunked answer."""
        return self.head.is_http_1_0


class Answering(Protocol):
    """A request being served."""

    def start(self) -> None:
        """Begin; ends with `Downstream.finish`."""
        ...

    def client_gone(self) -> None:
        """Stop: nobody will read the answer."""
        ...

    def pause(self) -> None:
        """The client's buffer is full."""
        ...

    def resume(self) -> None:
        """The client's buffer has room again."""
        ...


class ServiceLimits(Limits, Protocol):
    """Options of the router that bound connections."""

    @property
    def write_buffer_bytes(self) -> int:
        """Unsent bytes of an answer before its replica is paused."""
        ...


class Service(Protocol):
    """What a connection needs of the router."""

    max_body_bytes: int
    is_draining: bool

    @property
    def limits(self) -> ServiceLimits:
        """What bounds connections."""
        ...

    def opened(self, client: Downstream, address: object) -> RouterError | None:
        """A client connected from `address`; an error if it is one too many."""
        ...

    def closed(self, client: Downstream) -> None:
        """A client is gone."""
        ...

    def answer(self, client: Downstream, request: Request) -> Answering:
        """Make the exchange that will serve `request`."""
        ...
