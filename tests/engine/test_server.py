"""A replica over real sockets: the real model through the openai SDK, and rude clients.

One replica serves all tests of the module; its event loop runs in a thread, as the fixture is
shared and asyncio's fixtures are not.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp.web import TCPSite

from roost_engine.frontend import Frontend
from roost_engine.serve import ServeConfig, build_replica
from roost_engine.server import build_app, build_runner

pytestmark = pytest.mark.model

KV_TOKENS = 4096
MODEL = "smol"


class Replica:
    """The served engine and what tests ask of it."""

    def __init__(self, frontend: Frontend, port: int) -> None:
        self.frontend = frontend
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.sdk = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

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

    def until_idle(self) -> None:
        pool, core = self.frontend.core.scheduler.pool, self.frontend.core
        self.until(lambda: pool.num_free == pool.num_blocks and not core.scheduler.has_work)


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    config = ServeConfig(
        model="smollm2",
        served_model_name=MODEL,
        kv_tokens=KV_TOKENS,
        max_model_len=2048,
        max_step_tokens=256,
        max_running=8,
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
    served = Replica(frontend, ports[0])
    yield served
    served.sdk.close()
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


# -- answers ------------------------------------------------------------------------------


def test_a_chat_is_answered(replica: Replica) -> None:
    answer = replica.chat("What is the capital of France?", max_tokens=30)

    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same_as_the_whole_answer(replica: Replica) -> None:
    whole = replica.chat("Name three colours.", max_tokens=20)
    chunks = list(
        replica.chat(
            "Name three colours.",
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )

    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_completion_and_its_stream(replica: Replica) -> None:
    whole = replica.complete("1, 2, 3, 4,")
    pieces = [chunk.choices[0] for chunk in replica.complete("1, 2, 3, 4,", stream=True)]

    assert " 5" in whole.choices[0].text
    assert "".join(piece.text for piece in pieces) == whole.choices[0].text
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["length"]


def test_a_prompt_in_token_ids_is_the_same_prompt(replica: Replica) -> None:
    text = "The quick brown fox"
    ids = replica.frontend._tokenizer.encode(text, add_special_tokens=True)

    assert replica.complete(text).choices[0].text == replica.complete([ids]).choices[0].text  # type: ignore[arg-type]


def test_the_second_call_finds_the_prompt_cached(replica: Replica) -> None:
    question = "Tell me about the history of the lighthouse. " * 6
    hits = replica.metric("vllm:prefix_cache_hits_total")
    first, second = replica.chat(question), replica.chat(question)

    prompt_tokens = first.usage.prompt_tokens
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached == (prompt_tokens - 1) // 16 * 16
    assert second.choices[0].message.content == first.choices[0].message.content
    assert replica.metric("vllm:prefix_cache_hits_total") >= hits + cached


def test_the_head_tells_what_was_cached(replica: Replica) -> None:
    fields = {
        "model": MODEL,
        "prompt": "All work and no play makes Jack a dull boy. " * 5,
        "max_tokens": 2,
    }
    replica.post("/v1/completions", fields)
    for stream in (False, True):
        body = json.dumps(fields | {"stream": stream}).encode()
        status, headers, _ = replica.http("POST", "/v1/completions", body)

        assert status == 200
        prompt_tokens = int(headers["x-roost-prompt-tokens"])
        assert int(headers["x-roost-cached-tokens"]) == (prompt_tokens - 1) // 16 * 16


def test_a_stream_on_the_wire_is_events_up_to_done(replica: Replica) -> None:
    fields = {"model": MODEL, "prompt": "Hello", "max_tokens": 3, "stream": True}
    body = json.dumps(fields).encode()
    _, headers, answer = replica.http("POST", "/v1/completions", body)

    assert headers["content-type"].startswith("text/event-stream")
    events = answer.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["id"] for event in events[:-2])


def test_a_stop_string_across_tokens_is_not_shown(replica: Replica) -> None:
    """The model spells numbers digit by digit, so "7, 8" is several tokens."""
    whole = replica.complete("1, 2, 3, 4, 5,", max_tokens=16)
    assert " 7, 8" in whole.choices[0].text

    stopped = replica.complete("1, 2, 3, 4, 5,", max_tokens=16, stop=["never", " 7, 8"])
    pieces = list(replica.complete("1, 2, 3, 4, 5,", max_tokens=16, stop=" 7, 8", stream=True))

    expected = whole.choices[0].text.split(" 7, 8")[0]
    assert stopped.choices[0].text == expected
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < whole.usage.completion_tokens
    assert "".join(chunk.choices[0].text for chunk in pieces) == expected
    replica.until_idle()


def test_max_tokens_ends_with_length_and_counts(replica: Replica) -> None:
    answer = replica.complete("Once upon a time", max_tokens=5)

    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)


def test_a_seed_reproduces_and_no_seed_varies(replica: Replica) -> None:
    def draw(**options: Any) -> str:
        answer = replica.complete("My favourite animal is", temperature=1.5, **options)
        return str(answer.choices[0].text)

    assert draw(seed=1) == draw(seed=1)
    assert draw(seed=1) != draw(seed=2)
    assert draw() != draw()


def test_concurrent_answers_equal_those_one_at_a_time(replica: Replica) -> None:
    """Greedy and sampled, streams and not, mixed in one batch; nobody changes another's tokens."""
    words = ["Alpha", "Beta", "Gamma", "Delta", "Eta", "Iota", "Rho", "Tau"]
    prompts = [f"{word} is a word that" for word in words]

    def ask(index: int) -> str:
        temperature = 0.0 if index % 2 else 0.8
        answer = replica.complete(
            prompts[index], temperature=temperature, seed=index, stream=index % 3 == 0
        )
        if index % 3 == 0:
            return "".join(chunk.choices[0].text for chunk in answer)
        return str(answer.choices[0].text)

    alone = [ask(index) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))

    assert together == alone
    replica.until_idle()


# -- clients that go away -----------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_frees_the_blocks(replica: Replica, stream: bool) -> None:
    success, abort = "vllm:request_success_total", 'finished_reason="abort"'
    aborted = replica.metric(success, abort)
    fields = {
        "model": MODEL,
        "prompt": "Count: 1 2 3",
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": stream,
    }
    client = send_raw(replica, fields)
    replica.until(lambda: replica.frontend.core.scheduler.num_running == 1)

    client.close()
    replica.until_idle()

    assert replica.metric("roost_engine:free_blocks") == KV_TOKENS / 16
    assert replica.metric("vllm:num_requests_running") == 0
    assert replica.metric(success, abort) == aborted + 1


def test_disconnects_while_waiting_and_prefilling_free_everything(replica: Replica) -> None:
    clients = [
        send_raw(
            replica,
            {"model": MODEL, "prompt": f"{index} " + "word " * 900, "max_tokens": 100},
        )
        for index in range(12)
    ]
    replica.until(lambda: replica.frontend.core.scheduler.num_running > 0)

    for client in clients:
        client.close()
    replica.until_idle()

    assert replica.frontend.core.num_in_flight == 0
    assert replica.complete("Still there?").usage.completion_tokens > 0


def send_raw(replica: Replica, fields: dict[str, Any]) -> socket.socket:
    body = json.dumps(fields).encode()
    client = socket.create_connection(("127.0.0.1", replica.port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


# -- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"temperature": 3}, 400, "temperature", "invalid_value"),
        ({"n": 2}, 400, "n", "unsupported_parameter"),
        ({"logprobs": 5}, 400, "logprobs", "unsupported_parameter"),
        ({"tempreature": 1}, 400, "tempreature", "unknown_parameter"),
        ({"prompt": ""}, 400, "prompt", "invalid_value"),
        ({"prompt": ["a", "b"]}, 400, "prompt", "unsupported_parameter"),
        ({"prompt": [49_152_000]}, 400, "prompt", "invalid_value"),
        ({"prompt": "a " * 3000}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": "a", "max_tokens": 2048}, 400, "max_tokens", "context_length_exceeded"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_requests_are_json_errors(
    replica: Replica, fields: dict[str, Any], status: int, param: str, code: str
) -> None:
    for stream in (False, True):
        sent = {"model": MODEL, "prompt": "hi", "stream": stream} | fields
        got, headers, body = replica.post("/v1/completions", sent)

        assert got == status
        assert headers["content-type"].startswith("application/json")
        assert (body["error"]["param"], body["error"]["code"]) == (param, code)
        assert body["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"{not json", 400),
        ("POST", "/v1/completions", b"", 400),
        ("GET", "/v1/completions", b"", 405),
        ("PUT", "/health", b"", 405),
        ("GET", "/nowhere", b"", 404),
        ("GET", "/v1/models/other", b"", 404),
        ("POST", "/v1/completions", b" " * (32 * 1024 * 1024 + 1), 413),
    ],
    ids=lambda value: str(value)[:40],
)
def test_http_errors_are_json_errors(
    replica: Replica, method: str, path: str, body: bytes, status: int
) -> None:
    got, headers, answer = replica.http(method, path, body)

    assert got == status
    assert json.loads(answer)["error"]["message"]
    assert headers["x-request-id"]


def test_the_sdk_raises_its_own_errors(replica: Replica) -> None:
    with pytest.raises(openai.NotFoundError):
        replica.chat("hi", model="other")
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        replica.chat("hi", presence_penalty=1)


# -- the other endpoints ------------------------------------------------------------------


def test_models_are_listed(replica: Replica) -> None:
    assert [model.id for model in replica.sdk.models.list()] == [MODEL]
    assert replica.sdk.models.retrieve(MODEL).owned_by == "roost"


def test_health_and_version(replica: Replica) -> None:
    assert replica.http("GET", "/health")[0] == 200
    assert b"version" in replica.http("GET", "/version")[2]


def test_request_ids_are_taken_over_when_harmless(replica: Replica) -> None:
    for given, kept in [("abc-123", True), ("x" * 128, True), ("x" * 129, False), ("a b", False)]:
        _, headers, _ = replica.http("GET", "/health", headers={"X-Request-Id": given})

        assert (headers["x-request-id"] == given) is kept


def test_metrics_carry_vllms_names(replica: Replica) -> None:
    replica.complete("Hello")
    text = replica.http("GET", "/metrics")[2].decode()

    assert 'vllm:cache_config_info{block_size="16",engine="0",model_name="smol"' in text
    assert f'num_gpu_blocks="{KV_TOKENS // 16}"' in text
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:num_preemptions_total",
        "vllm:request_success_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "roost_engine:prefill_tokens_total",
        "roost_engine:free_blocks",
    ):
        assert f"\n{name}{{" in text, name
