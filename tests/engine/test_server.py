"""A replica over real sockets: the real model through the openai SDK, and rude clients."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from served import KV_TOKENS, MODEL, Replica, served_replica

from roost_wire.told_load import ToldLoad, read_header

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    with served_replica() as served:
        yield served


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


def test_the_head_tells_the_load_as_it_is_then(replica: Replica) -> None:
    """A stream's own request is part of it; one whose answer is whole is not."""
    replica.until(lambda: replica.frontend.core.num_in_flight == 0)
    fields = {"model": MODEL, "prompt": "Hello", "max_tokens": 40}
    loads = []
    for stream in (True, False):
        body = json.dumps(fields | {"stream": stream}).encode()
        _, headers, _ = replica.http("POST", "/v1/completions", body)
        loads.append(read_header(headers["x-roost-load"].encode()))
    _, headers, _ = replica.http("GET", "/v1/models")

    running, ended = loads
    assert running is not None
    assert (running.num_running, running.num_waiting, running.queued_tokens) == (1, 0, 0)
    assert running.used_tokens in {16, 32, 48}
    assert ended == ToldLoad(0, 0, 0, KV_TOKENS, 0)
    assert "x-roost-load" not in headers


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
        ({"n": 17}, 400, "n", "invalid_value"),
        ({"n": 16, "prompt": ["a"] * 9}, 400, "prompt", "invalid_value"),
        ({"best_of": 2}, 400, "best_of", "unsupported_parameter"),
        ({"echo": True}, 400, "echo", "unsupported_parameter"),
        ({"logprobs": 21}, 400, "logprobs", "invalid_value"),
        ({"logit_bias": {"49152": 1}}, 400, "logit_bias", "invalid_value"),
        ({"stop_token_ids": [49_152]}, 400, "stop_token_ids", "invalid_value"),
        ({"guided_regex": "(["}, 400, "guided_regex", "invalid_value"),
        ({"tempreature": 1}, 400, "tempreature", "unknown_parameter"),
        ({"prompt": ""}, 400, "prompt", "invalid_value"),
        ({"prompt": ["a", "a " * 3000]}, 400, "prompt", "context_length_exceeded"),
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
    import openai

    with pytest.raises(openai.NotFoundError):
        replica.chat("hi", model="other")
    with pytest.raises(openai.BadRequestError, match="prediction"):
        replica.chat("hi", prediction={"type": "content", "content": "x"})


# -- the other endpoints ------------------------------------------------------------------


def test_models_are_listed(replica: Replica) -> None:
    assert [model.id for model in replica.sdk.models.list()] == [MODEL]
    assert replica.sdk.models.retrieve(MODEL).owned_by == "roost"


def test_embeddings_are_refused_in_openais_shape(replica: Replica) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="no embeddings") as refused:
        replica.sdk.embeddings.create(model=MODEL, input="hi")

    assert refused.value.code == "unsupported_endpoint"


def test_tokenize_counts_what_the_endpoints_count_and_detokenize_undoes_it(
    replica: Replica,
) -> None:
    text = "Hello, wörld! 🦉"
    _, _, answer = replica.post("/tokenize", {"model": MODEL, "prompt": text})
    _, _, back = replica.post("/detokenize", {"model": MODEL, "tokens": answer["tokens"]})
    messages = [{"role": "user", "content": text}]
    _, _, chat = replica.post("/tokenize", {"messages": messages, "return_token_strs": True})

    assert answer["count"] == len(answer["tokens"]) == replica.complete(text).usage.prompt_tokens
    assert (answer["max_model_len"], answer["token_strs"]) == (2048, None)
    assert back == {"prompt": text}
    assert chat["count"] == replica.chat(text).usage.prompt_tokens
    assert chat["token_strs"][0] == "<|im_start|>"


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("/tokenize", {"prompt": ""}, 400, "prompt"),
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "tools": [{}]}, 400, "tools"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {"tokens": [49_152]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {}, 400, "tokens"),
    ],
    ids=str,
)
def test_bad_bodies_of_the_tokenizer_endpoints(
    replica: Replica, path: str, fields: dict[str, Any], status: int, param: str
) -> None:
    got, _, body = replica.post(path, fields)

    assert (got, body["error"]["param"]) == (status, param)


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
        "roost_engine:restored_tokens_total",
        "roost_engine:host_blocks_used",
        "roost_engine:expired_requests_total",
        "roost_engine:broken_pins_total",
    ):
        assert f"\n{name}{{" in text, name
