"""Errors that a client sees, each with its owner, its status and its stable code.

    RouterError
    ├── ClientError                the request is at fault; sending it again will not help
    │   ├── BadRequestError        400  invalid_request, invalid_json
    │   ├── KeyRequiredError       401  invalid_api_key
    │   ├── PathNotFoundError      404  not_found
    │   ├── ModelNotFoundError     404  model_not_found
    │   ├── MethodNotAllowedError  405  method_not_allowed
    │   ├── ClientTimeoutError     408  request_timeout
    │   ├── BodyTooLargeError      413  body_too_large
    │   └── EncodingError          415  unsupported_encoding
    ├── QuotaError                 429  rate_limit_exceeded
    ├── KeysUnknownError           503  keys_unknown: the store was not read yet
    ├── OverloadError              503  too_many_connections, too_many_requests: we are full
    │   ├── HeldTooManyError       503  too_many_held
    │   └── StoppedError           503  router_stopped
    └── FleetError                 a replica, or all of them, is at fault; later may work
        ├── NoReplicaError         503  no_replica
        ├── RetryBudgetError       503  retry_budget_spent
        ├── DeadlineError          504  deadline_exceeded
        └── UpstreamError          502  upstream_error

The body is always OpenAI's: {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import msgspec


class RouterError(Exception):
    """Anything that ends a request with an error body."""

    status = 500
    code = "internal_error"
    type = "server_error"
    #: Seconds for a Retry-After header, where trying again makes sense.
    retry_after_s: int | None = None
    #: What the SDKs are told (`x-should-retry`); None leaves it to the status.
    should_retry: bool | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code

    def body(self) -> bytes:
        """The JSON error body."""
        return error_body(self.message, self.type, self.param, self.code)


def error_body(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    """An error in OpenAI's shape, as JSON."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return msgspec.json.encode({"error": error})


class ClientError(RouterError):
    """The client sent something that cannot be served."""

    status = 400
    type = "invalid_request_error"


class BadRequestError(ClientError):
    """The body, or the request itself, is malformed."""

    code = "invalid_request"


class KeyRequiredError(ClientError):
    """No key came, or one that opens nothing; the message never repeats it."""

    status = 401
    code = "invalid_api_key"

    def __init__(self, *, has_key: bool) -> None:
        what = "the API key is not valid here" if has_key else "an API key is required"
        super().__init__(f"{what}: send it as 'Authorization: Bearer KEY'")


class KeysUnknownError(RouterError):
    """A key came, and the router does not know all keys yet that it takes."""

    status = 503
    code = "keys_unknown"
    retry_after_s = 1

    def __init__(self) -> None:
        super().__init__("this router does not know the API keys yet")


class QuotaError(RouterError):
    """A key's limit is used up for now."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, what: str, limit: int, retry_after_s: int) -> None:
        """`what`: "requests" or "tokens", as OpenAI's `type` says."""
        super().__init__(
            f"rate limit reached: {limit} {what} per minute; try again in {retry_after_s} s"
        )
        self.type = what
        self.retry_after_s = retry_after_s


class PathNotFoundError(ClientError):
    """The path is not one that the router serves; anything not listed is denied."""

    status = 404
    code = "not_found"

    def __init__(self, path: str) -> None:
        super().__init__(f"no such path: {path}")


class ModelNotFoundError(ClientError):
    """No replica serves the model."""

    status = 404
    code = "model_not_found"

    def __init__(self, model: str, known: list[str]) -> None:
        served = ", ".join(known)
        super().__init__(f"model '{model}' is not served here; served: {served}", param="model")


class MethodNotAllowedError(ClientError):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, method: str, path: str, allowed: str) -> None:
        super().__init__(f"{method} is not allowed on {path}; use {allowed}")
        self.allowed = allowed


class ReceiptNotFoundError(ClientError):
    """No receipt of that id is held."""

    status = 404
    code = "receipt_not_found"

    def __init__(self, num_held: int, max_receipts: int) -> None:
        super().__init__(
            f"no receipt of that request id among the last {num_held} here: a request has one from "
            f"its end until up to {max_receipts} others have ended, on the worker that served it; "
            "one refused at the door has none"
        )


class ClientTimeoutError(ClientError):
    """The client took too long to send a request that it had begun."""

    status = 408
    code = "request_timeout"

    def __init__(self, part: str) -> None:
        super().__init__(f"the {part} did not arrive in time")


class HeadTooLargeError(BadRequestError):
    """Too many or too long header lines."""

    status = 431
    code = "head_too_large"


class BodyTooLargeError(ClientError):
    """The body exceeds the limit."""

    status = 413
    code = "body_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the request body exceeds {limit_bytes} bytes")


class EncodingError(ClientError):
    """The body is compressed, so its prompt cannot be read."""

    status = 415
    code = "unsupported_encoding"

    def __init__(self, encoding: str) -> None:
        super().__init__(f"content-encoding '{encoding}' is not supported; send it plain")


class OverloadError(RouterError):
    """This router holds as much as it may; another router, or a later try, may work."""

    status = 503
    retry_after_s = 1


class HeldTooManyError(OverloadError):
    """No replica can start this request soon, and as many wait already as may."""

    code = "too_many_held"

    def __init__(self, num_held: int) -> None:
        super().__init__(f"no replica can start this soon, and {num_held} requests wait already")


class StoppedError(OverloadError):
    """The router ends, and had not placed this request yet."""

    code = "router_stopped"

    def __init__(self) -> None:
        super().__init__("the router was stopped before a replica could start this request")


class FleetError(RouterError):
    """Replicas could not answer."""

    status = 502


class NoReplicaError(FleetError):
    """No replica that could answer is up, or all of them were tried."""

    status = 503
    code = "no_replica"
    retry_after_s = 1

    def __init__(self, model: str, tried: int) -> None:
        tail = f"; {tried} tried for this request" if tried else ""
        super().__init__(f"no replica is ready to serve model '{model}'{tail}")


class UpstreamError(FleetError):
    """The replica broke off, or answered something that is not HTTP."""

    code = "upstream_error"


class RetryBudgetError(FleetError):
    """A replica failed, and so many do that trying again would make it worse."""

    status = 503
    code = "retry_budget_spent"
    should_retry = False

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; too many requests fail for this one to be tried again")


class DeadlineError(FleetError):
    """The time that the client gave its request is over."""

    status = 504
    code = "deadline_exceeded"
    should_retry = False

    def __init__(self) -> None:
        super().__init__("the request was not answered within the time that its client gave")
