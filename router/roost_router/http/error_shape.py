"""Errors of replicas as clients of OpenAI's API expect them. Pure."""

from __future__ import annotations

import msgspec

from roost_router.errors import error_body
from roost_router.http.head import ResponseHead, get_header


def openai_shaped(head: ResponseHead, body: bytes) -> tuple[ResponseHead, bytes]:
    """The answer if it is a JSON error already, else its text in OpenAI's shape."""
    if get_header(head.headers, b"content-encoding") is not None:
        return head, body  # compressed unasked: not ours to read
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        decoded = None
    if isinstance(decoded, dict) and "error" in decoded:
        return head, body
    text = decoded.get("message") if isinstance(decoded, dict) else None
    if not isinstance(text, str):
        text = body.decode("utf-8", "replace").strip()[:500]
        text = text or f"the replica answered {head.status}"
    headers = [pair for pair in head.headers if pair[0] != b"content-type"]
    headers.append((b"content-type", b"application/json"))
    kind = "server_error" if head.status >= 500 else "invalid_request_error"
    return ResponseHead(head.status, headers), error_body(text, kind, None, "upstream_status")
