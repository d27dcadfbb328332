"""A replica with complete OpenAI answers, for suites that check every field.

`python -m roost_loadtest.edge_replica PORT`. The answer's shape follows `stream` and the path; what
else the body asks for is ignored. Models are those that openai-python's tests name.

Not here: tokens, errors, speed (mock_replica.py).
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from aiohttp import web

MODELS = ("gpt-6-astra", "gpt-4o", "gpt-5.4", "gpt-3.5-turbo-instruct", "model", "text")
_USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
_MAX_BODY_BYTES = 64 << 20


async def _models(_: web.Request) -> web.Response:
    entries = [{"id": m, "object": "model", "created": 1, "owned_by": "roost"} for m in MODELS]
    return web.json_response({"object": "list", "data": entries})


async def _chat(request: web.Request) -> web.StreamResponse:
    body = await _read(request)
    message = {"role": "assistant", "content": "hello", "refusal": None}
    whole = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    first = {"index": 0, "delta": {"role": "assistant", "content": "hello"}, "finish_reason": None}
    last = {"index": 0, "delta": {}, "finish_reason": "stop"}
    return await _answer(request, body, "chat.completion", whole, [first, last])


async def _completion(request: web.Request) -> web.StreamResponse:
    body = await _read(request)
    whole = {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}
    first = {"index": 0, "text": "hello", "logprobs": None, "finish_reason": None}
    last = {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    return await _answer(request, body, "text_completion", whole, [first, last])


async def _read(request: web.Request) -> dict[str, Any]:
    body = msgspec.json.decode(await request.read())
    assert isinstance(body, dict)  # the router has judged it
    return body


async def _answer(
    request: web.Request,
    body: dict[str, Any],
    kind: str,
    whole: dict[str, Any],
    parts: list[dict[str, Any]],
) -> web.StreamResponse:
    base = {"id": "x-1", "object": kind, "created": 1, "model": str(body.get("model"))}
    if not body.get("stream"):
        return web.json_response({**base, "choices": [whole], "usage": _USAGE})
    if kind == "chat.completion":
        base["object"] = "chat.completion.chunk"
    answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await answer.prepare(request)
    for part in parts:
        event = msgspec.json.encode({**base, "choices": [part]})
        await answer.write(b"data: " + event + b"\n\n")
    await answer.write(b"data: [DONE]\n\n")
    return answer


def main(port: int) -> None:
    """Serve until the process is stopped."""
    app = web.Application(client_max_size=_MAX_BODY_BYTES)
    app.router.add_get("/v1/models", _models)
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_post("/v1/completions", _completion)
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None)


if __name__ == "__main__":
    main(int(sys.argv[1]))
