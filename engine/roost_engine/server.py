"""HTTP shell of a replica: OpenAI's endpoints, health and metrics. Decides nothing.

    POST /v1/chat/completions, /v1/completions    GET /v1/models, /v1/models/{id}
    POST /tokenize, /detokenize                   GET /health, /metrics, /version,
                                                      /kv_event_sources
    POST /v1/embeddings                           400: this engine has no embeddings; not 501,
                                                  which the openai SDK would send again

Once the engine is dead or stopping, /health and /v1/models are 503: whoever watches either does
not send requests here.

The head of a stream is sent with its first token: an error before that is a proper HTTP error,
and the head can tell how much of the prompt was cached (roost_wire.headers). An error after it,
also one nobody thought of, is one event with an `error` object, no [DONE], and no second head.
Every answer to a generation request, a refusal too, tells the load as it is then (headers.LOAD).

`x-request-timeout-s: 2.5` is a deadline: a request that still waits then is refused (429). One
that is being computed goes on; a client that has given up closes its connection. 429 and 503 tell
in `Retry-After` when to come back (retry_after.py).

`x-roost-resumable: 1` and `roost_resume` in a body let a router continue a stream elsewhere:
roost_wire/resume.py. A continued stream has no role chunk, and its usage counts all of the answer.

Bodies are taken as they are: a Content-Encoding is refused (415), and `build_runner` keeps
aiohttp from decoding one before that.

A client that goes away cancels its handler (`build_runner`), which closes the generation: at
any time, streaming or not.

Invariants: every error has a JSON body, every response an x-request-id. The exception is
malformed HTTP, which aiohttp answers itself (400, text/plain, connection closed).

Not here: bodies (openai_api.py, responses.py), the life of an answer (generation.py).
"""

from __future__ import annotations

import asyncio
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

from roost_engine.api_errors import ApiError, error_body
from roost_engine.core import EngineCore
from roost_engine.engine_errors import DeadlineError, EngineBusyError, EngineError, LogitsError
from roost_engine.openai_api import parse_chat, parse_completion
from roost_engine.responses import DONE, Answer, Choice, model_list, model_object, sse_event
from roost_engine.tokenize_api import parse_detokenize, parse_tokenize, tokenize_answer
from roost_wire import headers, resume

if TYPE_CHECKING:
    from roost_engine.frontend import Frontend
    from roost_engine.generation import Generations
    from roost_engine.openai_api import ApiRequest
    from roost_engine.responses import Piece, Usage

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_BODY_BYTES: Final = 32 * 1024 * 1024

_log = logging.getLogger(__name__)

_GIVEN_REQUEST_ID: Final = re.compile(headers.REQUEST_ID_PATTERN)
# Seconds, less than twelve days; no sign, no exponent, no "inf".
_TIMEOUT: Final = re.compile(r"\d{1,6}(\.\d{1,6})?", re.ASCII)
_REQUEST_ID: Final = web.RequestKey("request_id", str)
_CORE: Final = web.RequestKey("core", EngineCore)  # whose load the answer's head tells
_IS_HEAD_SENT: Final = web.RequestKey("is_head_sent", bool)
_DEFECT: Final = "Internal error of the replica."
_METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def build_app(frontend: Frontend, kv_sources: bytes = b"[]") -> web.Application:
    """The application that serves one model.

    `kv_sources`: where KV events are published, as JSON; as vLLM's /kv_event_sources.
    """
    app = web.Application(
        middlewares=[_name_request, _answer_errors_in_json], client_max_size=MAX_BODY_BYTES
    )
    app.on_response_prepare.append(_on_head)
    endpoints = _Endpoints(frontend, kv_sources)
    app.add_routes(
        [
            web.post("/v1/chat/completions", endpoints.chat),
            web.post("/v1/completions", endpoints.completion),
            web.post("/v1/embeddings", endpoints.embeddings),
            web.post("/tokenize", endpoints.tokenize),
            web.post("/detokenize", endpoints.detokenize),
            web.get("/v1/models", endpoints.models),
            web.get("/v1/models/{name:.+}", endpoints.model),
            web.get("/health", endpoints.health),
            web.get("/metrics", endpoints.metrics),
            web.get("/version", endpoints.version),
            web.get("/kv_event_sources", endpoints.kv_event_sources),
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

    def __init__(self, frontend: Frontend, kv_sources: bytes) -> None:
        self._frontend = frontend
        self._kv_sources = kv_sources
        self._created = _unix_time()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_chat(await _read(request)))

    async def completion(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, parse_completion(await _read(request)))

    async def embeddings(self, _request: web.Request) -> web.Response:
        raise ApiError(
            400,
            "This replica serves a text generation model and has no embeddings; send them to a "
            "server with an embedding model.",
            code="unsupported_endpoint",
        )

    async def tokenize(self, request: web.Request) -> web.Response:
        asked = parse_tokenize(await _read(request))
        tokens, texts = await self._frontend.tokenize(asked)
        return _json(tokenize_answer(tokens, texts, self._frontend.max_model_len))

    async def detokenize(self, request: web.Request) -> web.Response:
        text = self._frontend.detokenize(parse_detokenize(await _read(request)))
        return _json(msgspec.json.encode({"prompt": text}))

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

    async def kv_event_sources(self, _request: web.Request) -> web.Response:
        return _json(self._kv_sources)

    async def _generate(self, request: web.Request, asked: ApiRequest) -> web.StreamResponse:
        request[_CORE] = self._frontend.core
        # The id inside the engine is our own: clients may send one id twice.
        internal_id = uuid.uuid4().hex
        generations = await self._frontend.start(asked, internal_id, _timeout_s(request))
        prefix = "chatcmpl-" if asked.endpoint == "chat" else "cmpl-"
        answer = Answer(
            endpoint=asked.endpoint,
            id=prefix + request[_REQUEST_ID],
            model=asked.model,
            created=_unix_time(),
            call_id="" if asked.tool_use is None else generations.call_id,
            num_choices=asked.num_choices,
            include_usage=asked.include_usage,
            continuous_usage=asked.continuous_usage,
        )
        with contextlib.closing(generations):
            if asked.stream:
                return await _stream(
                    request, generations, answer, is_resumed=asked.resume is not None
                )
            return await _answer_whole(generations, answer)


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


def _timeout_s(request: web.Request) -> float | None:
    """How long the request may wait, if its head says so. ApiError if it does not say it well."""
    given = request.headers.get(headers.REQUEST_TIMEOUT)
    if given is None:
        return None
    if not _TIMEOUT.fullmatch(given) or float(given) <= 0:
        raise ApiError(
            400,
            f"{headers.REQUEST_TIMEOUT} must be a positive number of seconds, got {given!r}.",
            code="invalid_header",
        )
    return float(given)


async def _answer_whole(generations: Generations, answer: Answer) -> web.Response:
    choices = [Choice() for _ in generations.choices]
    async for index, piece in generations.pieces():
        choices[index].add(piece)
    usage = generations.usage
    return _json(answer.whole(choices, usage), extra=_usage_headers(usage))


async def _stream(
    request: web.Request, generations: Generations, answer: Answer, *, is_resumed: bool
) -> web.StreamResponse:
    # Whoever resumes needs the tokens of the text it has: they come in one block with it.
    is_resumable = request.headers.get(resume.RESUMABLE) == "1" and answer.num_choices == 1

    def event(index: int, piece: Piece) -> bytes:
        written = answer.piece_event(index, piece, generations.usage)
        if not (written and is_resumable):
            return written
        return resume.comment(generations.choices[index].transcript.take_ids()) + written

    pieces = generations.pieces()
    index, piece = await anext(pieces)
    usage = generations.usage
    response = web.StreamResponse(headers=_stream_headers(usage))
    if is_resumable:
        response.headers[resume.SEED] = str(generations.seed)
    await response.prepare(request)
    try:
        head = b"" if is_resumed else answer.head_event(usage)
        await response.write(head + event(index, piece))
        async for index, piece in pieces:
            await response.write(event(index, piece))
        await response.write(answer.usage_event(generations.usage) + DONE)
    except EngineError as error:
        await response.write(sse_event(_engine_error_body(error)))
    except ConnectionError:
        raise  # the client is gone
    except Exception:  # noqa: BLE001
        # A defect of ours, with the head sent already: what is left to tell it by is an event.
        _log.exception("request %s failed in its stream", request[_REQUEST_ID])
        response.force_close()
        await response.write(sse_event(error_body(500, _DEFECT)))
    await response.write_eof()
    return response


def _usage_headers(usage: Usage) -> dict[str, str]:
    return {
        headers.PROMPT_TOKENS: str(usage.prompt_tokens),
        headers.CACHED_TOKENS: str(usage.cached_tokens),
    }


def _stream_headers(usage: Usage) -> dict[str, str]:
    return {
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
        **_usage_headers(usage),
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
    core = request.get(_CORE)
    if core is not None:
        response.headers[headers.LOAD] = core.load.header()


@web.middleware
async def _answer_errors_in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ConnectionError:
        # The client is gone and this handler about to be cancelled; errors would be logged.
        raise asyncio.CancelledError from None
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
            wait_s = error.retry_after_s if isinstance(error, EngineBusyError) else 1
            extra = None if status == 500 else {"Retry-After": str(wait_s)}
            return _json(_engine_error_body(error), status=status, extra=extra)
        case web.HTTPException():
            return _http_error(request, error)
        case web.RequestPayloadError():
            return _json(error_body(400, f"The body cannot be read: {error}"), status=400)
    # Request boundary: a defect of ours costs this request, and is logged with its cause.
    _log.error("request %s failed", request[_REQUEST_ID], exc_info=error)
    return _json(error_body(500, _DEFECT), status=500)


def _engine_error_body(error: EngineError) -> bytes:
    match error:
        case DeadlineError():
            code = "deadline_exceeded"
        case EngineBusyError():
            code = "engine_busy"
        case _:
            code = "engine_error"
    return error_body(_status(error), str(error), code=code)


def _status(error: EngineError) -> int:
    match error:
        case EngineBusyError():  # a deadline too: 503 would make a router try another replica
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
