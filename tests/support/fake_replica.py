"""A replica that answers at once with canned tokens, over real sockets, and fails on demand.

For the data path's own tests, where what counts is bytes and failures; placement on real
engines is tested in tests/e2e.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web


class FakeReplica:
    """One OpenAI-shaped server on 127.0.0.1; set `fault` to make the next answers fail.

    Faults: "rst" (reset before the head), "cut" (reset mid-stream), "eof" (clean end of the
    stream without [DONE]), "slow" (waits for `gate` before it answers), "text500".
    """

    def __init__(self, model: str = "m") -> None:
        self.model = model
        self.fault: str | None = None
        self.gate = asyncio.Event()
        self.cached_tokens = 0
        self.prompt_tokens = 100
        self.capacity_blocks = 1024
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.targets: list[str] = []
        self.num_aborted = 0
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> FakeReplica:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/v1/completions", self._complete)
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def stop(self) -> None:
        """Stop listening and drop all connections; `start` comes back on the same port."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.model}]})

    async def _metrics(self, _: web.Request) -> web.Response:
        labels = f'block_size="16",num_gpu_blocks="{self.capacity_blocks}"'
        return web.Response(text=f"vllm:cache_config_info{{{labels}}} 1.0\n")

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.bodies.append(body)
        self.headers.append({k.lower(): v for k, v in request.headers.items()})
        self.targets.append(request.path_qs)
        try:
            return await self._answer(request, json.loads(body))
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if self.fault == "rst":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if self.fault == "slow":
            await self.gate.wait()
        if self.fault == "text500":
            return web.Response(status=500, text="it broke")
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": 3,
            "total_tokens": self.prompt_tokens + 3,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if not body.get("stream"):
            message = {"role": "assistant", "content": "one two three"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return web.json_response(
                {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}
            )
        return await self._stream(request, usage)

    async def _stream(self, request: web.Request, usage: dict[str, Any]) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        for word in ("one", " two", " three"):
            reason = "stop" if word == " three" else None
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": reason}
            chunk = {"id": "x", "choices": [choice]}
            await answer.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            await asyncio.sleep(0)
            if self.fault in {"cut", "eof"} and word == " two":
                break
            if self.fault == "hang" and word == " two":
                await self.gate.wait()
        if self.fault == "cut":
            await asyncio.sleep(0.02)
            assert request.transport is not None
            request.transport.abort()
            return answer
        if self.fault != "eof":
            last = {"id": "x", "choices": [], "usage": usage}
            await answer.write(b"data: " + json.dumps(last).encode() + b"\n\ndata: [DONE]\n\n")
        await answer.write_eof()
        return answer
