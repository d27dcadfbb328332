"""What clients see when the engine fails or stops; a model without weights, in one event loop."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from fake_model import FakeModel, continuation

from roost_engine import serve
from roost_engine.blocks import BlockPool
from roost_engine.chat import ChatTemplate
from roost_engine.config import SchedulerConfig
from roost_engine.core import EngineCore
from roost_engine.frontend import Frontend
from roost_engine.metrics import EngineMetrics
from roost_engine.responses import Answer
from roost_engine.scheduler import Scheduler
from roost_engine.server import build_app, build_runner


class LetterTokenizer:
    """One token a character; generated ids become letters, from A to r."""

    eos_token_ids = frozenset({49})

    def fewest_tokens(self, text: str) -> int:
        return -(-len(text.encode()) // 4)  # a character of UTF-8

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [ord(character) % 50 for character in text]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([ord("A") + token_id])

    spelled_bytes = token_bytes


ASKED = {"model": "fake", "temperature": 0, "prompt": "hello", "max_tokens": 3}
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"


class Replica:
    def __init__(self, client: Any, frontend: Frontend, model: FakeModel) -> None:
        self.client = client
        self.frontend = frontend
        self.core = frontend.core
        self.model = model

    async def post(self, path: str = "/v1/completions", **fields: Any) -> tuple[int, str]:
        prompt = {"prompt": "hello"} if path == "/v1/completions" else {}
        sent = {"model": "fake", "temperature": 0} | prompt | fields
        async with self.client.post(path, json=sent) as answer:
            return answer.status, await answer.text()

    async def get(self, path: str) -> tuple[int, str]:
        async with self.client.get(path) as answer:
            return answer.status, await answer.text()

    async def health(self) -> int:
        return (await self.get("/health"))[0]


class Server(TestServer):
    """Serves as `roost serve` does."""

    async def _make_runner(self, **kwargs: Any) -> web.AppRunner:
        return build_runner(self.app)


def build(max_running: int = 4, max_waiting: int = 100) -> tuple[Frontend, FakeModel]:
    config = SchedulerConfig(
        max_step_tokens=64, max_running=max_running, max_waiting=max_waiting, max_model_len=2000
    )
    model = FakeModel(block_size=4)
    core = EngineCore(Scheduler(config, BlockPool(600, 4), frozenset()), model)
    frontend = Frontend(
        model_name="fake",
        tokenizer=LetterTokenizer(),  # type: ignore[arg-type]
        chat=ChatTemplate(CHAT),
        vocab_size=50,
        core=core,
        metrics=EngineMetrics("fake", core),
    )
    return frontend, model


@asynccontextmanager
async def replica(max_running: int = 4, max_waiting: int = 100) -> AsyncIterator[Replica]:
    frontend, model = build(max_running, max_waiting)
    frontend.core.start()
    async with TestClient(Server(build_app(frontend))) as client:
        try:
            yield Replica(client, frontend, model)
        finally:
            await frontend.core.stop()


async def test_a_failure_before_the_first_token_is_an_http_error() -> None:
    async with replica() as served:
        served.model.fail_on_call = 1
        for stream in (False, True):
            status, body = await served.post(stream=stream)

            assert status == 503
            assert "the model is on fire" in json.loads(body)["error"]["message"]
        assert await served.health() == 503


async def test_a_dead_engine_shows_no_models() -> None:
    async with replica() as served:
        assert (await served.get("/v1/models"))[0] == 200
        served.model.fail_on_call = 1
        await served.post()

        for path in ("/v1/models", "/v1/models/fake"):
            status, body = await served.get(path)

            assert status == 503
            assert "the model is on fire" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1, "top_p": 0.5}], ids=str)
async def test_logits_that_are_no_numbers_cost_one_request(options: dict[str, float]) -> None:
    async with replica() as served:
        served.model.spoils = {49}
        for stream in (False, True):
            status, body = await served.post(prompt=[1, 49], stream=stream, **options)

            error = json.loads(body)["error"]
            assert (status, error["type"], error["code"]) == (500, "server_error", "engine_error")
        assert (await served.post(prompt=[1, 2]))[0] == 200
        assert await served.health() == 200
        assert 'finished_reason="error",model_name="fake"} 2.0' in (await served.get("/metrics"))[1]


async def test_logits_that_are_no_numbers_mid_stream_are_an_error_event() -> None:
    async with replica() as served:
        tokens = continuation([1, 2, 3], 3, 50)
        assert len({1, 2, 3, *tokens}) == 6
        served.model.spoils = {tokens[-1]}
        status, body = await served.post(prompt=[1, 2, 3], max_tokens=50, stream=True)

        events = [json.loads(event.removeprefix("data: ")) for event in body.split("\n\n")[:-1]]
        assert status == 200
        text = "".join(event["choices"][0]["text"] for event in events[:-1])
        assert text == "".join(chr(ord("A") + token) for token in tokens)
        assert events[-1]["error"]["type"] == "server_error"
        assert "[DONE]" not in body


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


@pytest.mark.parametrize("broken", ["piece_event", "usage_event"])
async def test_a_defect_of_ours_mid_stream_is_one_event_and_the_end_of_the_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    async with replica() as served:
        monkeypatch.setattr(Answer, broken, lambda *_, **__: 1 / 0)
        body = json.dumps({"model": "fake", "prompt": "hello", "stream": True}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", served.client.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)

        received = (await reader.read()).decode()  # up to the end: the connection is closed
        writer.close()

    assert received.count("HTTP/1.1") == 1
    assert received.count('"error"') == 1
    assert received.endswith("\r\n0\r\n\r\n")
    assert "[DONE]" not in received
    assert "ZeroDivisionError" in caplog.text


async def test_an_error_after_the_head_is_no_second_head() -> None:
    """Whatever a handler forgets to catch."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        raise ValueError

    async with replica() as served:
        app = build_app(served.frontend)
        app.router.add_get("/defect", handler)
        async with Server(app) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET /defect HTTP/1.1\r\nHost: x\r\n\r\n")
            received = (await reader.read()).decode()
            writer.close()

    assert received.count("HTTP/1.1") == 1
    assert received.endswith("begun\r\n")


async def test_no_more_requests_are_taken_than_may_run_and_wait() -> None:
    async with replica(max_running=1, max_waiting=0) as served:
        running = asyncio.create_task(served.post(stream=True, max_tokens=1900))
        while not served.core.num_in_flight:
            await asyncio.sleep(0.005)

        async with served.client.post(
            "/v1/completions", json={"model": "fake", "prompt": "hello"}
        ) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
            assert json.loads(await answer.text())["error"]["type"] == "rate_limit_error"

        assert (await running)[0] == 200


async def test_choices_are_taken_all_or_none() -> None:
    async with replica(max_running=2, max_waiting=1) as served:
        assert (await served.post(n=4))[0] == 429
        assert served.core.num_in_flight == 0
        status, body = await served.post(n=3, prompt=["hello"], max_tokens=2)

        assert (status, len(json.loads(body)["choices"])) == (200, 3)


async def test_retry_after_follows_the_queue_and_the_speed(monkeypatch: Any) -> None:
    async with replica(max_running=1, max_waiting=0) as served:
        monkeypatch.setattr(served.core, "retry_after_s", lambda: 17)
        async with served.client.post("/v1/completions", json=ASKED | {"n": 2}) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "17")


async def test_a_request_whose_deadline_passes_in_the_queue_is_refused() -> None:
    timeout = {"x-request-timeout-s": "0.05"}
    async with replica(max_running=1) as served:
        running = asyncio.create_task(served.post(stream=True, max_tokens=1900))
        while not served.core.scheduler.num_running:
            await asyncio.sleep(0.005)
        for stream in (False, True):
            asked = ASKED | {"stream": stream}
            async with served.client.post("/v1/completions", json=asked, headers=timeout) as late:
                error = json.loads(await late.text())["error"]
                assert (late.status, error["code"]) == (429, "deadline_exceeded")
                assert int(late.headers["Retry-After"]) >= 1
                assert "deadline passed" in error["message"]

        assert (await running)[0] == 200
        async with served.client.post("/v1/completions", json=ASKED, headers=timeout) as idle:
            assert idle.status == 200  # nothing to wait for


@pytest.mark.parametrize("given", ["", "0", "0.0", "-1", "inf", "nan", "1e3", "1s", "1000000"])
async def test_a_timeout_that_is_none_is_refused(given: str) -> None:
    headers = {"x-request-timeout-s": given}
    async with (
        replica() as served,
        served.client.post("/v1/completions", json=ASKED, headers=headers) as answer,
    ):
        error = json.loads(await answer.text())["error"]
        assert (answer.status, error["code"]) == (400, "invalid_header")


async def test_better_priority_runs_first() -> None:
    async with replica(max_running=1) as served:
        ended: list[int] = []

        async def ask(priority: int) -> None:
            await served.post(priority=priority, max_tokens=3)
            ended.append(priority)

        running = asyncio.create_task(served.post(max_tokens=1900))
        while not served.core.scheduler.num_running:
            await asyncio.sleep(0.005)
        waiting = [asyncio.create_task(ask(priority)) for priority in (5, 0, -5)]
        await asyncio.gather(running, *waiting)

        assert ended == [-5, 0, 5]


async def test_an_engine_error_in_one_choice_ends_the_whole_answer() -> None:
    async with replica() as served:
        served.model.spoils = {49}
        for stream in (False, True):
            status, body = await served.post(prompt=[[1, 49], [1, 2]], n=2, stream=stream)

            if status == 200:  # the healthy prompt was first
                assert json.loads(body.split("\n\n")[-2].removeprefix("data: "))["error"]
                assert "[DONE]" not in body
            else:
                assert (status, json.loads(body)["error"]["type"]) == (500, "server_error")
        while served.core.num_in_flight:
            await asyncio.sleep(0.005)
        assert (await served.post(prompt=[1, 2]))[0] == 200


async def test_a_stop_token_ends_the_answer_and_is_told() -> None:
    tokens = continuation([1, 2, 3], 5, 50)
    letters = "".join(chr(ord("A") + token) for token in tokens)
    assert tokens[2] not in tokens[:2]
    async with replica() as served:
        for include, text in [(False, letters[:2]), (True, letters[:3])]:
            options = {"include_stop_str_in_output": include, "stop_token_ids": [tokens[2]]}
            status, body = await served.post(prompt=[1, 2, 3], **options)

            [choice] = json.loads(body)["choices"]
            assert (status, choice["text"], choice["finish_reason"]) == (200, text, "stop")
            assert choice["stop_reason"] == tokens[2]
            assert json.loads(body)["usage"]["completion_tokens"] == 3


async def test_nothing_ends_an_answer_before_min_tokens() -> None:
    tokens = continuation([1, 2, 3], 6, 50)
    letters = "".join(chr(ord("A") + token) for token in tokens)
    assert len(set(letters)) == 6
    async with replica() as served:
        for min_tokens, text in [(0, letters[:2]), (2, letters[:2]), (3, letters[:6])]:
            _, body = await served.post(
                prompt=[1, 2, 3], stop=letters[2], min_tokens=min_tokens, max_tokens=6
            )
            assert json.loads(body)["choices"][0]["text"] == text

        _, body = await served.post(prompt=[1, 2, 3], stop_token_ids=[tokens[2]], min_tokens=5)
        assert json.loads(body)["usage"]["completion_tokens"] >= 5


async def test_a_shown_stop_string_is_the_end_of_the_text() -> None:
    letters = "".join(chr(ord("A") + token) for token in continuation([1, 2, 3], 5, 50))
    async with replica() as served:
        for include, text in [(False, letters[:1]), (True, letters[:3])]:
            _, body = await served.post(
                prompt=[1, 2, 3], stop=["!", letters[1:3]], include_stop_str_in_output=include
            )
            [choice] = json.loads(body)["choices"]
            assert (choice["text"], choice["stop_reason"]) == (text, letters[1:3])


async def test_log_probabilities_cover_the_shown_tokens_and_no_others() -> None:
    """A stop string of two tokens: held back, then cut away with their log probabilities."""
    letters = "".join(chr(ord("A") + token) for token in continuation([1, 2, 3], 6, 50))
    for stop, text in [(None, letters), (letters[3:5], letters[:3])]:
        async with replica() as served:
            asked = {"prompt": [1, 2, 3], "max_tokens": 6, "stop": stop, "logprobs": 1}
            _, body = await served.post(**asked)
            _, streamed = await served.post(**asked, stream=True)

            [choice] = json.loads(body)["choices"]
            events = streamed.split("\n\n")[:-2]
            chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
            logprobs = choice["logprobs"]
            assert choice["text"] == "".join(logprobs["tokens"]) == text
            assert logprobs["text_offset"] == list(range(len(text)))
            for name, value in logprobs.items():
                pieces = [chunk["logprobs"][name] for chunk in chunks if chunk["logprobs"]]
                assert [each for piece in pieces for each in piece] == value


async def test_what_cannot_fit_is_refused_before_it_is_rendered_or_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LetterTokenizer, "encode", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(ChatTemplate, "render", lambda *_: 1 / 0)
    many = [{"role": "user", "content": ""}] * 20_000
    long = [{"role": "user", "content": "x" * 1000}] * 8
    async with replica() as served:
        for path, fields, param in [
            ("/v1/completions", {"prompt": "x" * 8000}, "prompt"),
            ("/v1/chat/completions", {"messages": long}, "messages"),
            ("/v1/chat/completions", {"messages": many}, "messages"),
        ]:
            status, body = await served.post(path, **fields)

            error = json.loads(body)["error"]
            assert (status, error["code"]) == (400, "context_length_exceeded")
            assert error["param"] == param
            assert "requested at least" in error["message"]


async def test_a_completion_without_max_tokens_takes_the_room_there_is() -> None:
    async with replica() as served:
        for num_prompt_tokens, num_generated in [(10, 16), (1990, 10), (1999, 1)]:
            status, body = await served.post(prompt=[1] * num_prompt_tokens)

            assert status == 200
            assert json.loads(body)["usage"]["completion_tokens"] == num_generated

        status, body = await served.post(prompt=[1] * 2000)
        assert (status, json.loads(body)["error"]["param"]) == (400, "prompt")


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


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", b"no gzip"),
        ("gzip", gzip.compress(b" " * (33 * 1024 * 1024), mtime=0)),
        ("GZIP, identity", gzip.compress(b"{}", mtime=0)),
        ("br", b"{}"),
        ("unheard-of", b"{}"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_an_encoded_body_is_refused_as_it_is(path: str, encoding: str, body: bytes) -> None:
    async with (
        replica() as served,
        served.client.post(path, data=body, headers={"Content-Encoding": encoding}) as answer,
    ):
        assert answer.status == 415
        assert json.loads(await answer.text())["error"]["code"] == "unsupported_content_encoding"


async def test_identity_is_no_encoding() -> None:
    async with (
        replica() as served,
        served.client.post(
            "/v1/completions",
            data=b'{"model":"fake","prompt":"hello"}',
            headers={"Content-Encoding": "identity"},
        ) as answer,
    ):
        assert answer.status == 200


async def test_a_replica_whose_engine_dies_exits_with_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frontend, model = build()
    model.fail_on_call = 1
    monkeypatch.setattr(serve, "build_replica", lambda _: serve.Replica(frontend, 10**9, "fake"))

    async def ask() -> int:
        line = ""
        while not line:
            await asyncio.sleep(0.005)
            line = capsys.readouterr().out
        ready = re.match(r"^ready: (?P<model>.*) on (?P<url>http://\S+)", line)
        assert ready is not None
        async with (
            aiohttp.ClientSession(ready["url"]) as session,
            session.post("/v1/completions", json={"model": "fake", "prompt": "hello"}) as answer,
        ):
            return answer.status

    asked = asyncio.create_task(ask())
    with pytest.raises(SystemExit) as ended:
        await serve.serve(serve.ServeConfig(model="fake", port=0))

    assert await asked == 503
    assert ended.value.code == 1
    errors = capsys.readouterr().err
    assert "roost engine: a step failed: RuntimeError: the model is on fire" in errors


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_the_ready_line_is_a_url_also_over_ipv6(
    capsys: pytest.CaptureFixture[str], host: str, url: str
) -> None:
    async def announce() -> int:
        with serve._bind(host, 0) as listener:
            serve._announce(serve.Replica(build()[0], 2_500_000_000, "fake"), listener)
            return int(listener.getsockname()[1])

    port = asyncio.run(announce())

    assert capsys.readouterr().out == (
        f"ready: fake on http://{url}:{port} "
        "(context 2000 tokens, KV cache 2400 tokens, 2.5 GB; fake)\n"
    )
