"""A Dynamo worker before a mock engine. Runs in Dynamo's environment, without ours: a script.

    PYTHON dynamo_worker.py '{"model": FOLDER, "engine": PORT, "events": PORT, "block_tokens": 64,
                              "num_blocks": 7812, "ready": FILE}'

Dynamo's frontend speaks to workers in tokens over its own protocol. This one makes text of them
again (a token is four bytes, see dynamo_peer.py), asks the mock over HTTP, and hands back as many
tokens as come. The mock's KV events are relayed as vLLM's are. The file `ready` is made when the
worker can be found.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvloop
from dynamo.llm import (
    KvEventPublisher,
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    WorkerType,
    register_model,
)
from dynamo.runtime import DistributedRuntime

_TOKEN = b'"content":" a"'
_CACHED = re.compile(rb'"cached_tokens":(\d+)')
_LIMIT_BYTES = 1 << 24
_TOKEN_ID = 5  # what an answer is made of
_SETTLE_S = 0.5  # until an endpoint that is being served can be found


class Bridge:
    """Requests of the frontend to one mock."""

    def __init__(self, port: int, words: dict[int, str]) -> None:
        self._port = port
        self._words = words
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[Any]:
        """Tokens of one answer, as they come; usage with the last."""
        del context
        ids = request["token_ids"]
        prompt = "".join(self._words[token] for token in ids)
        fields = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": request["stop_conditions"]["max_tokens"],
            "stream": True,
        }
        body, num_output = json.dumps(fields).encode(), 0
        reader, writer = await self._connection()
        head = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b"
        writer.write(head % (len(body), body))
        if not (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200"):
            writer.close()
            raise RuntimeError("the mock refuses")
        while size := int(await reader.readuntil(b"\r\n"), 16):
            data = (await reader.readexactly(size + 2))[:-2]
            tokens = [_TOKEN_ID] * data.count(_TOKEN)
            num_output += len(tokens)
            if (cached := _CACHED.search(data)) is None:
                yield {"token_ids": tokens}
            else:
                usage = {
                    "prompt_tokens": len(ids),
                    "completion_tokens": num_output,
                    "total_tokens": len(ids) + num_output,
                    "prompt_tokens_details": {"cached_tokens": int(cached[1])},
                }
                yield {"token_ids": tokens, "finish_reason": "length", "completion_usage": usage}
        await reader.readexactly(2)
        self._idle.append((reader, writer))

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._idle:
            return self._idle.pop()
        return await asyncio.open_connection("127.0.0.1", self._port, limit=_LIMIT_BYTES)


def _words(model: str) -> dict[int, str]:
    tokenizer = json.loads(Path(model, "tokenizer.json").read_text())
    return {token: word for word, token in tokenizer["model"]["vocab"].items()}


async def _main(config: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    runtime = DistributedRuntime(loop, "file", "tcp", event_plane="zmq")
    endpoint = runtime.endpoint("replay.backend.generate")
    about = ModelRuntimeConfig()
    about.total_kv_blocks = config["num_blocks"]
    about.enable_local_indexer = True
    await register_model(
        ModelInput.Tokens,
        ModelType.Chat,
        endpoint,
        config["model"],
        "mock",
        worker_type=WorkerType.Aggregated,
        kv_cache_block_size=config["block_tokens"],
        runtime_config=about,
        ignore_weights=True,
    )
    publisher = KvEventPublisher(
        endpoint,
        kv_block_size=config["block_tokens"],
        zmq_endpoint=f"tcp://127.0.0.1:{config['events']}",
        zmq_topic="",
        enable_local_indexer=True,
    )
    bridge = Bridge(config["engine"], _words(config["model"]))
    loop.call_later(_SETTLE_S, Path(config["ready"]).touch)
    await endpoint.serve_endpoint(bridge.generate)
    del publisher  # lives as long as the worker


if __name__ == "__main__":
    uvloop.run(_main(json.loads(sys.argv[1])))
