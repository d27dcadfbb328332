"""What clients see when the engine fails or stops; a model without weights, in one event loop."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp.test_utils import TestClient, TestServer
from fake_model import FakeModel

from roost_engine.blocks import BlockPool
from roost_engine.config import SchedulerConfig
from roost_engine.core import EngineCore
from roost_engine.frontend import Frontend
from roost_engine.metrics import EngineMetrics
from roost_engine.scheduler import Scheduler
from roost_engine.server import build_app


class LetterTokenizer:
    """One token a character; generated ids become letters."""

    chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    special_tokens: Mapping[str, str] = {}
    eos_token_ids: frozenset[int] = frozenset()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [ord(character) % 50 for character in text]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([ord("A") + token_id])


class Replica:
    def __init__(self, client: Any, core: EngineCore, model: FakeModel) -> None:
        self.client = client
        self.core = core
        self.model = model

    async def post(self, **fields: Any) -> tuple[int, str]:
        sent = {"model": "fake", "prompt": "hello", "temperature": 0} | fields
        async with self.client.post("/v1/completions", json=sent) as answer:
            return answer.status, await answer.text()

    async def health(self) -> int:
        async with self.client.get("/health") as answer:
            return int(answer.status)


@asynccontextmanager
async def replica(max_waiting: int = 100) -> AsyncIterator[Replica]:
    config = SchedulerConfig(
        max_step_tokens=64, max_running=4, max_waiting=max_waiting, max_model_len=2000
    )
    model = FakeModel(block_size=4)
    core = EngineCore(Scheduler(config, BlockPool(600, 4), frozenset()), model)
    frontend = Frontend(
        model_name="fake",
        tokenizer=LetterTokenizer(),  # type: ignore[arg-type]
        vocab_size=50,
        core=core,
        metrics=EngineMetrics("fake", core),
    )
    core.start()
    async with TestClient(TestServer(build_app(frontend))) as client:
        try:
            yield Replica(client, core, model)
        finally:
            await core.stop()


async def test_a_failure_before_the_first_token_is_an_http_error() -> None:
    async with replica() as served:
        served.model.fail_on_call = 1
        for stream in (False, True):
            status, body = await served.post(stream=stream)

            assert status == 503
            assert "the model is on fire" in json.loads(body)["error"]["message"]
        assert await served.health() == 503


async def test_a_failure_mid_stream_is_an_error_event_and_no_done() -> None:
    async with replica() as served:
        served.model.fail_on_call = 5
        status, body = await served.post(stream=True, max_tokens=100)

        events = [event for event in body.split("\n\n") if event]
        assert status == 200
        assert "error" in json.loads(events[-1].removeprefix("data: "))
        assert "[DONE]" not in body
        assert "finish_reason" in events[0]


async def test_a_stopping_replica_ends_streams_and_refuses_requests() -> None:
    async with replica() as served:
        running = asyncio.create_task(served.post(stream=True, max_tokens=1900))
        while not served.core.scheduler.num_running:
            await asyncio.sleep(0.005)

        await served.core.stop()

        _, body = await running
        assert "shutting down" in body
        assert "[DONE]" not in body
        assert (await served.post())[0] == 503
        assert await served.health() == 503


async def test_a_defect_of_ours_is_a_json_500(monkeypatch: Any) -> None:
    async with replica() as served:
        monkeypatch.setattr(served.core, "check_accepts", lambda: 1 / 0)

        status, body = await served.post()

        assert status == 500
        assert json.loads(body)["error"]["type"] == "server_error"


async def test_a_long_prompt_is_encoded_off_the_loop_and_answered() -> None:
    async with replica() as served:
        status, body = await served.post(prompt="x" * 5000)
        assert (status, json.loads(body)["error"]["code"]) == (400, "context_length_exceeded")

        status, body = await served.post(prompt="x" * 1500, max_tokens=3)
        assert (status, json.loads(body)["usage"]["prompt_tokens"]) == (200, 1500)


async def test_prefix_sharing_requests_report_what_they_took_from_the_cache() -> None:
    async with replica() as served:
        answers = await asyncio.gather(
            *(served.post(prompt="shared " * 40 + str(index), max_tokens=3) for index in range(6))
        )

        cached = [
            json.loads(body)["usage"]["prompt_tokens_details"]["cached_tokens"]
            for _, body in answers
        ]
        assert sorted(cached) == [0] + [280] * 5


async def test_a_body_that_cannot_be_decompressed_is_refused() -> None:
    async with (
        replica() as served,
        served.client.post(
            "/v1/completions", data=b"no gzip", headers={"Content-Encoding": "gzip"}
        ) as answer,
    ):
        assert answer.status == 400
        assert json.loads(await answer.text())["error"]["message"]


async def test_a_body_that_explodes_when_decompressed_is_too_large() -> None:
    bomb = gzip.compress(b" " * (33 * 1024 * 1024))
    async with (
        replica() as served,
        served.client.post(
            "/v1/completions", data=bomb, headers={"Content-Encoding": "gzip"}
        ) as answer,
    ):
        assert answer.status == 413
        assert json.loads(await answer.text())["error"]["message"]
