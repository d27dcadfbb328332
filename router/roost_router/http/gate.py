"""Keys on the data port: who may ask, and as whom the router asks replicas.

A client's key is for the router. With keys in use it ends here: a replica that was taken over, or
that logs headers, never sees one. What replicas get instead:

    keys of clients  --replica-key-file   a replica gets
    no               no                   the client's Authorization, as sent
    yes              no                   none
    any              yes                  the replicas' key

Heads are judged once: those that repeat are shared objects (known_heads.py), so what follows from
one is kept with it, until keys are read again.
"""

from __future__ import annotations

from roost_router.access import Access
from roost_router.errors import KeyRequiredError, KeysUnknownError
from roost_router.http.head import Headers, RequestHead, get_header
from roost_router.http.serving import Request

_MAX_JUDGED = 512


class Gate:
    """Stands before every path of the data port."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._judged: dict[RequestHead, RequestHead] = {}
        self._judged_by = access.version

    def admit(self, request: Request) -> Request:
        """`request` as it may go on. Raises KeyRequiredError."""
        if self._judged_by != self._access.version:
            self._judged.clear()
            self._judged_by = self._access.version
        head = self._judged.get(request.head)
        if head is None:
            head = self._judge(request.head)
            if len(self._judged) >= _MAX_JUDGED:
                self._judged.clear()
            self._judged[request.head] = head
        return Request(head, request.body)

    def _judge(self, head: RequestHead) -> RequestHead:
        keys = self._access.api_keys
        tenant = ""
        if keys is not None:
            given = get_header(head.headers, b"authorization")
            owner = keys.owner(given)
            if owner is None and given and not self._access.is_complete:
                raise KeysUnknownError
            if owner is None:
                raise KeyRequiredError(has_key=bool(given))
            tenant = owner
        headers: Headers = [pair for pair in head.headers if pair[0] != b"authorization"]
        authorization = self._access.replica_authorization()
        if authorization is not None:
            headers.append((b"authorization", authorization.encode()))
        return RequestHead(
            head.method,
            head.target,
            headers,
            keep_alive=head.keep_alive,
            is_http_1_0=head.is_http_1_0,
            tenant=tenant,
        )
