"""A replica over real sockets with the real model, for tests of what clients see.

Its event loop runs in a thread: fixtures that several tests share and asyncio's do not mix.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from io import BytesIO
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.web import TCPSite

from roost_engine.frontend import Frontend
from roost_engine.serve import ServeConfig, build_replica
from roost_engine.server import build_app, build_runner

if TYPE_CHECKING:
    import openai

KV_TOKENS = 4096
MODEL = "smol"


class Replica:
    """The served engine and what tests ask of it."""

    def __init__(self, frontend: Frontend, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.frontend = frontend
        self._loop = loop
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    @cached_property
    def sdk(self) -> openai.OpenAI:
        """A client of the SDK, which takes a second to import: only where it is asked for."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def chat(self, text: str, **options: Any) -> Any:
        messages: Any = [{"role": "user", "content": text}]
        settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 12} | options
        return self.sdk.chat.completions.create(messages=messages, **settings)

    def complete(self, prompt: str, **options: Any) -> Any:
        settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 12} | options
        return self.sdk.completions.create(prompt=prompt, **settings)

    def metric(self, name: str, label: str = "") -> float:
        """Sum of the series of a name, or of those with a label such as 'a="b"'."""
        _, _, body = self.http("GET", "/metrics")
        values = [
            float(line.rsplit(" ", 1)[1])
            for line in body.decode().splitlines()
            if line.startswith(name + "{") and label in line
        ]
        return sum(values)

    def http(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        async def send() -> tuple[int, dict[str, str], bytes]:
            async with (
                aiohttp.ClientSession() as session,
                session.request(
                    method, self.url + path, data=BytesIO(body), headers=headers
                ) as answer,
            ):
                names = {name.lower(): value for name, value in answer.headers.items()}
                return answer.status, names, await answer.read()

        return asyncio.run(send())

    def post(self, path: str, fields: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        status, headers, body = self.http("POST", path, json.dumps(fields).encode())
        return status, headers, json.loads(body)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something the engine does in the background; pytest-timeout is the limit."""
        while not condition():
            time.sleep(0.02)

    def num_tasks(self) -> int:
        """Tasks in the replica's event loop, the counting one left out."""

        async def count() -> int:
            return len(asyncio.all_tasks()) - 1

        return asyncio.run_coroutine_threadsafe(count(), self._loop).result()

    def until_idle(self) -> None:
        pool, core = self.frontend.core.scheduler.pool, self.frontend.core
        self.until(lambda: pool.num_free == pool.num_blocks and not core.scheduler.has_work)


@contextmanager
def served_replica(
    kv_tokens: int = KV_TOKENS,
    model: str = "smollm2",
    max_running: int = 8,
    threads: int | None = None,
) -> Iterator[Replica]:
    """SmolLM2, or a model in a folder, with a small cache; one for each test module."""
    config = ServeConfig(
        model=model,
        served_model_name=MODEL,
        kv_tokens=kv_tokens,
        max_model_len=min(2048, kv_tokens),
        max_step_tokens=256,
        max_running=max_running,
        threads=threads,
    )
    frontend = build_replica(config).frontend
    loop = asyncio.new_event_loop()
    started = threading.Event()
    stop = asyncio.Event()
    ports: list[int] = []

    async def main() -> None:
        frontend.core.start()
        runner = build_runner(build_app(frontend))
        await runner.setup()
        site = TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ports.append(runner.addresses[0][1])
        started.set()
        await stop.wait()
        await frontend.core.stop()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    started.wait()
    served = Replica(frontend, ports[0], loop)
    try:
        yield served
    finally:
        if "sdk" in vars(served):
            served.sdk.close()
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
