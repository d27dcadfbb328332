"""HTTP shell of a replica: OpenAI's endpoints, health and metrics. Decides nothing.

    POST /v1/chat/completions, /v1/completions    GET /v1/models, /v1/models/{id}
    GET  /health, /metrics, /version

Once the engine is dead or stopping, /health and /v1/models are 503: whoever watches either does
not send requests here.

The head of a stream is sent with its first token: an error before that is a proper HTTP error,
and the head can tell how much of the prompt was cached (roost_wire.headers). An error after it,
also one nobody thought of, is one event with an `error` object, no [DONE], and no second head.

Bodies are taken as they are: a Content-Encoding is refused (415), and `build_runner` keeps
aiohttp from decoding one before that.

A client that goes away cancels its handler (`build_runner`), which closes the generation: at
any time, streaming or not.

Invariants: every error has a JSON body, every response an x-request-id. The exception is
malformed HTTP, which aiohttp answers itself (400, text/plain, connection closed).

Not here: bodies (openai_api.py, responses.py), the life of a generation (frontend.py).
"""

from __future__ import annotations

import contextlib
import logging
import re
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp import web

from roost_engine.core import EngineBusyError, EngineError, LogitsError
from roost_engine.openai_api import ApiError, error_body, parse_chat, parse_completion
from roost_engine.responses import DONE, Answer, model_list, model_object, sse_event
from roost_wire import headers

if TYPE_CHECKING:
    from roost_engine.frontend import Frontend, Generation, Piece
    from roost_engine.openai_api import ApiRequest

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_BODY_BYTES: Final = 32 * 1024 * 1024

_log = logging.getLogger(__name__)

_GIVEN_REQUEST_ID: Final = re.compile(headers.REQUEST_ID_PATTERN)
_REQUEST_ID: Final = web.RequestKey("request_id", str)
_IS_HEAD_SENT: Final = web.RequestKey("is_head_sent", bool)
_DEFECT: Final = "Internal error of the replica."
_METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def build_app(frontend: Frontend) -> web.Application:
    """The application that serves one model."""
    app = web.Application(
        middlewares=[_name_request, _answer_errors_in_json], client_max_size=MAX_BODY_BYTES
    )
    app.on_response_prepare.append(_on_head)
    endpoints = _Endpoints(frontend)
    app.add_routes(
        [
            web.post("/v1/chat/completions", endpoints.chat),
            web.post("/v1/completions", endpoints.completion),
            web.get("/v1/models", endpoints.models),
            web.get("/v1/models/{name:.+}", endpoints.model),
            web.get("/health", endpoints.health),
            web.get("/metrics", endpoints.metrics),
            web.get("/version", endpoints.version),
        ]
    )
    return app


def build_runner(app: web.Application, *, shutdown_timeout_s: float = 2.0) -> web.AppRunner:
    """What serves the application: handlers are cancelled when their client is gone."""
    return web.AppRunner(
        app,
        handler_cancellation=True,
        auto_decompress=False,
        access_log=None,
        shutdown_timeout=shutdown_timeout_s,
    )


class _Endpoints:
    """One method for each route."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._created = _unix_time()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_chat(await _read(request)))

    async def completion(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_completion(await _read(request)))

    async def models(self, _request: web.Request) -> web.Response:
        frontend = self._frontend
        frontend.core.check_healthy()
        return _json(model_list([frontend.model_name], self._created, frontend.max_model_len))

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self._frontend.core.check_healthy()
        self._frontend.check_model(name)
        shown = model_object(name, self._created, self._frontend.max_model_len)
        return _json(msgspec.json.encode(shown))

    async def health(self, _request: web.Request) -> web.Response:
        if self._frontend.core.is_healthy:
            return _json(b'{"status":"ok"}')
        return _json(b'{"status":"unavailable"}', status=503)

    async def metrics(self, _request: web.Request) -> web.Response:
        body = self._frontend.metrics.render()
        return web.Response(body=body, headers={"Content-Type": _METRICS_TYPE})

    async def version(self, _request: web.Request) -> web.Response:
        return _json(msgspec.json.encode({"version": version("roost")}))

    async def _generate(self, request: web.Request, asked: ApiRequest) -> web.StreamResponse:
        # The id inside the engine is our own: clients may send one id twice.
        generation = await self._frontend.start(asked, uuid.uuid4().hex)
        prefix = "chatcmpl-" if asked.endpoint == "chat" else "cmpl-"
        answer = Answer(
            endpoint=asked.endpoint,
            id=prefix + request[_REQUEST_ID],
            model=asked.model,
            created=_unix_time(),
            include_usage=asked.include_usage,
        )
        with contextlib.closing(generation):
            if asked.stream:
                return await _stream(request, generation, answer)
            return await _answer_whole(generation, answer)


async def _read(request: web.Request) -> bytes:
    """The body. ApiError 415 if it is encoded."""
    encodings = ",".join(request.headers.getall("Content-Encoding", []))
    if encodings.strip().lower() not in ("", "identity"):
        raise ApiError(
            415,
            f"Content-Encoding {encodings!r} is not supported; send the body as it is.",
            code="unsupported_content_encoding",
        )
    return await request.read()


async def _answer_whole(generation: Generation, answer: Answer) -> web.Response:
    text, finish_reason = "", ""
    async for piece in generation.pieces():
        text += piece.text
        finish_reason = piece.finish_reason or ""
    body = answer.whole(text, finish_reason, generation.usage)
    return _json(body, extra=_usage_headers(generation))


async def _stream(
    request: web.Request, generation: Generation, answer: Answer
) -> web.StreamResponse:
    pieces = generation.pieces()
    first = await anext(pieces)
    response = web.StreamResponse(headers=_stream_headers(generation))
    await response.prepare(request)
    try:
        await response.write(answer.head_event() + _events(first, generation, answer))
        async for piece in pieces:
            await response.write(_events(piece, generation, answer))
    except EngineError as error:
        await response.write(sse_event(_engine_error_body(error)))
    except ConnectionError:
        raise  # the client is gone, aiohttp closes the connection
    except Exception:  # noqa: BLE001
        # A defect of ours, with the head sent already: what is left to tell it by is an event.
        _log.exception("request %s failed in its stream", request[_REQUEST_ID])
        response.force_close()
        await response.write(sse_event(error_body(500, _DEFECT)))
    await response.write_eof()
    return response


def _events(piece: Piece, generation: Generation, answer: Answer) -> bytes:
    """What a piece adds to the stream, up to [DONE] if it is the last; maybe nothing."""
    events = answer.text_event(piece.text)
    if piece.finish_reason is not None:
        events += answer.finish_event(piece.finish_reason)
        events += answer.usage_event(generation.usage) + DONE
    return events


def _usage_headers(generation: Generation) -> dict[str, str]:
    usage = generation.usage
    return {
        headers.PROMPT_TOKENS: str(usage.prompt_tokens),
        headers.CACHED_TOKENS: str(usage.cached_tokens),
    }


def _stream_headers(generation: Generation) -> dict[str, str]:
    return {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
        **_usage_headers(generation),
    }


# -- around every request -----------------------------------------------------------------


@web.middleware
async def _name_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Take over the client's request id if it is harmless, else give a fresh one."""
    given = request.headers.get(headers.REQUEST_ID, "")
    request[_REQUEST_ID] = given if _GIVEN_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    return await handler(request)


async def _on_head(request: web.Request, response: web.StreamResponse) -> None:
    request[_IS_HEAD_SENT] = True
    request_id = request.get(_REQUEST_ID)
    if request_id is not None:
        response.headers[headers.REQUEST_ID] = request_id


@web.middleware
async def _answer_errors_in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ConnectionError:
        raise  # the client is gone, aiohttp closes the connection
    except Exception as error:
        if request.get(_IS_HEAD_SENT):
            raise  # aiohttp logs it and closes the connection; there is no second head
        return _error_response(request, error)


def _error_response(request: web.Request, error: Exception) -> web.Response:
    match error:
        case ApiError():
            return _json(error.body(), status=error.status)
        case EngineError():
            status = _status(error)
            # Another replica, or a later try, may serve it; not so what the model cannot compute.
            extra = None if status == 500 else {"Retry-After": "1"}
            return _json(_engine_error_body(error), status=status, extra=extra)
        case web.HTTPException():
            return _http_error(request, error)
        case web.RequestPayloadError():
            return _json(error_body(400, f"The body cannot be read: {error}"), status=400)
    # Request boundary: a defect of ours costs this request, and is logged with its cause.
    _log.error("request %s failed", request[_REQUEST_ID], exc_info=error)
    return _json(error_body(500, _DEFECT), status=500)


def _engine_error_body(error: EngineError) -> bytes:
    code = "engine_busy" if isinstance(error, EngineBusyError) else "engine_error"
    return error_body(_status(error), str(error), code=code)


def _status(error: EngineError) -> int:
    match error:
        case EngineBusyError():
            return 429
        case LogitsError():
            return 500
    return 503


def _http_error(request: web.Request, error: web.HTTPException) -> web.Response:
    """aiohttp's own errors (404, 405, 413 ...) with a JSON body; `Allow` is kept."""
    messages = {
        404: f"No such path: {request.path}.",
        405: f"{request.method} is not allowed on {request.path}.",
        413: f"The body exceeds {MAX_BODY_BYTES} bytes.",
    }
    message = messages.get(error.status, error.reason)
    extra = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
    return _json(error_body(error.status, message), status=error.status, extra=extra)


def _json(body: bytes, *, status: int = 200, extra: dict[str, str] | None = None) -> web.Response:
    sent = {"Content-Type": "application/json", **(extra or {})}
    return web.Response(body=body, status=status, headers=sent)


def _unix_time() -> int:
    return int(datetime.now(UTC).timestamp())
