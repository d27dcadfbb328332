"""The main job: real router, two real engines, the real model, the OpenAI SDK."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
from processes import Cluster, make_client, metric, start_engine, start_router, until

from roost_loadtest.local_processes import cpu_s
from roost_loadtest.prompts import conversation


def chat(cluster: Cluster, name: str, question: str = "Why?", num_tokens: int = 600, **options):
    """One completion and the headers of its answer."""
    raw = cluster.client.chat.completions.with_raw_response.create(
        model=cluster.model,
        messages=conversation(name, question, num_tokens),
        max_tokens=options.pop("max_tokens", 4),
        temperature=0,
        **options,
    )
    return raw.parse(), raw.headers


def engine_of(cluster: Cluster, headers):
    return cluster.engines[int(headers["x-roost-replica"][1])]


def test_the_second_request_of_a_prefix_comes_home_and_computes_only_its_tail(cluster):
    first, first_headers = chat(cluster, "mill", "Who grinds?")
    engine = engine_of(cluster, first_headers)
    computed = metric(engine, "roost_engine:prefill_tokens_total")

    second, second_headers = chat(cluster, "mill", "What is ground, and when?")

    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert first_headers["x-roost-matched-tokens"] == "0"
    assert first_headers["x-roost-replica"] == second_headers["x-roost-replica"]
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached > 550
    assert int(second_headers["x-roost-cached-tokens"]) == cached
    assert int(second_headers["x-roost-matched-tokens"]) > 450
    newly = metric(engine, "roost_engine:prefill_tokens_total") - computed
    assert newly == second.usage.prompt_tokens - cached


def test_unrelated_long_prompts_land_on_different_replicas(cluster):
    """At the same time: one after the other, both may go to the faster replica."""

    def home(name: str) -> str:
        return chat(cluster, name)[1]["x-roost-replica"]

    with ThreadPoolExecutor(2) as pool:
        homes = set(pool.map(home, ("harbour", "vineyard")))

    assert homes == {"r0", "r1"}


def test_a_stream_says_what_the_whole_answer_says(cluster):
    whole, _ = chat(cluster, "bakery", max_tokens=12)
    stream = cluster.client.chat.completions.create(
        model=cluster.model,
        messages=conversation("bakery", "Why?", 600),
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )

    chunks = list(stream)

    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert whole.choices[0].message.content == text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_answer_is_the_same_from_either_replica_and_through_the_router(cluster):
    ask = {"model": cluster.model, "prompt": "The sky is", "max_tokens": 16, "temperature": 0.7}

    texts = set()
    for url in (cluster.router.url, *(engine.url for engine in cluster.engines)):
        with make_client(url) as client:
            texts.add(client.completions.create(**ask, seed=11).choices[0].text)

    assert len(texts) == 1


def test_a_burst_of_siblings_is_answered_whole(cluster):
    def one(number: int):
        return chat(cluster, "orchard", f"Question {number}?", num_tokens=300)[0]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(16)))

    assert all(answer.choices[0].finish_reason in {"length", "stop"} for answer in answers)
    cached = sum(answer.usage.prompt_tokens_details.cached_tokens > 250 for answer in answers)
    assert cached >= 14  # all but the first on each replica


@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_a_client_that_leaves_frees_the_blocks(cluster, when):
    free = [metric(engine, "roost_engine:free_blocks") for engine in cluster.engines]
    body = json.dumps(
        {
            "model": cluster.model,
            "messages": conversation(f"leaver {when}", "Go on.", 3000 if when == "prefill" else 50),
            "max_tokens": 2000,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    parts = urlsplit(cluster.router.url)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n"

    with socket.create_connection((parts.hostname, parts.port)) as sock:
        sock.sendall(head % len(body) + body)
        until(lambda: running(cluster) > 0)
        if when == "decode":
            received = b""
            while received.count(b"data:") < 5:
                received += sock.recv(65536)

    until(lambda: running(cluster) == 0)
    assert free == [metric(engine, "roost_engine:free_blocks") for engine in cluster.engines]


def running(cluster: Cluster) -> float:
    return sum(
        metric(engine, f"vllm:num_requests_{state}")
        for engine in cluster.engines
        for state in ("running", "waiting")
    )


def test_a_replica_killed_between_requests_costs_the_client_nothing(cluster):
    doomed = start_engine()
    router, _ = start_router(cluster.engines[0], doomed)
    with make_client(router.url) as client:
        homes = {}
        for name in ("north pole", "south pole"):
            raw = client.chat.completions.with_raw_response.create(
                model=cluster.model, messages=conversation(name, "Why?", 200), max_tokens=2
            )
            homes[raw.headers["x-roost-replica"]] = name
        assert set(homes) == {"r0", "r1"}

        doomed.kill()
        for number in range(6):
            raw = client.chat.completions.with_raw_response.create(
                model=cluster.model,
                messages=conversation(homes["r1"], f"Why {number}?", 200),
                max_tokens=2,
                stream=bool(number % 2),
            )
            assert raw.headers["x-roost-replica"] == "r0"
            raw.http_response.read()

    assert router.stop() == 0
    doomed.stop()


LONG = [{"role": "user", "content": "word " * 9000}]
BAD_INPUT = [
    ({"model": "no-such-model"}, 404, "model_not_found", "model"),
    ({"messages": "hello"}, 400, "invalid_request", "messages"),
    ({"messages": []}, 400, None, "messages"),
    ({"temperature": "hot"}, 400, None, "temperature"),
    ({"temperature": 2.1}, 400, None, "temperature"),
    ({"top_p": 0}, 400, None, "top_p"),
    ({"max_tokens": 0}, 400, None, "max_tokens"),
    ({"max_tokens": 10**6}, 400, "context_length_exceeded", None),
    ({"stop": ["a", "b", "c", "d", "e"]}, 400, None, "stop"),
    ({"best_of": 2}, 400, "unsupported_parameter", "best_of"),
    ({"prompt_logprobs": 1}, 400, "unsupported_parameter", "prompt_logprobs"),
    ({"frobnicate": 1}, 400, "unknown_parameter", "frobnicate"),
    (
        {"messages": [{"role": "user", "content": "word " * 9000}]},
        400,
        "context_length_exceeded",
        None,
    ),
]


@pytest.mark.parametrize(("change", "status", "code", "param"), BAD_INPUT)
def test_bad_input_is_refused_with_an_openai_error(cluster, change, status, code, param):
    import openai

    body = {"model": cluster.model, "messages": [{"role": "user", "content": "hi"}], **change}

    with pytest.raises(openai.APIStatusError) as caught:
        cluster.client.post("/chat/completions", body=body, cast_to=object)

    error = caught.value.response.json()["error"]
    assert caught.value.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert code in {None, error["code"]}
    assert param in {None, error["param"]}


def test_eight_clients_at_once_get_what_one_gets(cluster):
    prompts = [f"Count from {n} upwards: {n}," for n in range(8)]

    def ask(prompt: str) -> str:
        answer = cluster.client.completions.create(
            model=cluster.model, prompt=prompt, max_tokens=12, temperature=0
        )
        return answer.choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, prompts))

    assert alone == together


def test_idle_processes_sleep(cluster):
    """An engine that spins while idle would steal the cores of its neighbours."""
    until(lambda: running(cluster) == 0)
    time.sleep(0.2)
    before = [cpu_s(process.popen.pid) for process in (cluster.router, *cluster.engines)]
    time.sleep(1.0)
    after = [cpu_s(process.popen.pid) for process in (cluster.router, *cluster.engines)]

    assert all(b - a < 0.3 for a, b in zip(before, after, strict=True))
