"""Refusals in OpenAI's words: status, message, `param`, `code`.

`param` is the path of the offending value in the body, such as `messages[0].content`; `type`
follows from the HTTP status.

Not here: who refuses what (the *_api.py modules, frontend.py), HTTP (server.py).
"""

from __future__ import annotations

import msgspec


class ApiError(Exception):
    """A refusal as OpenAI words it; the server turns it into a response."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> bytes:
        """JSON of the response."""
        return error_body(self.status, self.message, param=self.param, code=self.code)


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> bytes:
    """OpenAI's error object; its `type` follows from the HTTP status."""
    kinds = {404: "not_found_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    return msgspec.json.encode({"error": error})
