"""What clients ask of sampling, over real sockets with the real model: n, logprobs, penalties."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from served import MODEL, Replica, served_replica

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    with served_replica() as served:
        yield served


# -- several choices ----------------------------------------------------------------------


def test_choices_are_what_their_seeds_give_alone(replica: Replica) -> None:
    """Choice i samples with seed + i, as documented: each can be had again alone."""
    asked = {"temperature": 1.2, "max_tokens": 8}
    together = replica.complete("My favourite animal is", n=4, seed=100, **asked)
    alone = [
        replica.complete("My favourite animal is", seed=100 + index, **asked) for index in range(4)
    ]

    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in together.choices]
    assert texts == [answer.choices[0].text for answer in alone]
    assert len(set(texts)) > 1
    assert together.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert together.usage.completion_tokens == sum(a.usage.completion_tokens for a in alone)


def test_a_streamed_chat_with_choices_says_the_same(replica: Replica) -> None:
    asked = {"n": 3, "seed": 7, "temperature": 1.0, "max_tokens": 10}
    whole = replica.chat("Name an animal.", **asked)
    chunks = list(
        replica.chat(
            "Name an animal.", stream=True, stream_options={"include_usage": True}, **asked
        )
    )

    texts, roles, ends = ["", "", ""], [0, 0, 0], [0, 0, 0]
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
        ends[choice.index] += choice.finish_reason is not None
    assert texts == [choice.message.content for choice in whole.choices]
    assert (roles, ends) == ([1, 1, 1], [1, 1, 1])
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_list_of_prompts_is_answered_in_order(replica: Replica) -> None:
    prompts: Any = ["1, 2, 3, 4,", "The capital of France is"]
    together = replica.complete(prompts, n=2, max_tokens=6)
    alone = [replica.complete(prompt, max_tokens=6) for prompt in prompts]

    texts = [choice.text for choice in together.choices]
    assert texts == [alone[0].choices[0].text] * 2 + [alone[1].choices[0].text] * 2
    assert together.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)
    ids = [replica.frontend._tokenizer.encode(prompt) for prompt in prompts]
    by_ids = replica.complete(ids, max_tokens=6)  # type: ignore[arg-type]
    assert [choice.text for choice in by_ids.choices] == texts[::2]


def test_the_other_choices_find_the_prompt_in_the_cache(replica: Replica) -> None:
    before = replica.metric("vllm:prefix_cache_hits_total")
    prompt = "An entirely new story about eight whales and their accountant. " * 8
    answer = replica.complete(prompt, n=4, max_tokens=2, temperature=1)

    shared = (answer.usage.prompt_tokens - 1) // 16 * 16
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert replica.metric("vllm:prefix_cache_hits_total") == before + 3 * shared


# -- log probabilities --------------------------------------------------------------------


def test_log_probabilities_of_a_chat(replica: Replica) -> None:
    question = "What is the capital of France?"
    [choice] = replica.chat(question, logprobs=True, top_logprobs=5).choices
    told = choice.logprobs.content

    assert "".join(token.token for token in told) == choice.message.content
    assert b"".join(bytes(token.bytes) for token in told).decode() == choice.message.content
    for token in told:
        assert len(token.top_logprobs) == 5
        likely = [other.logprob for other in token.top_logprobs]
        assert likely == sorted(likely, reverse=True)
        assert token.logprob == likely[0] <= 0  # greedy
        assert token.token == token.top_logprobs[0].token
        assert sum(math.exp(logprob) for logprob in likely) <= 1 + 1e-6

    chunks = replica.chat(question, logprobs=True, top_logprobs=5, stream=True)
    streamed = [
        token
        for chunk in chunks
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [(token.token, token.bytes) for token in streamed] == [
        (token.token, token.bytes) for token in told
    ]
    assert [token.logprob for token in streamed] == pytest.approx([t.logprob for t in told])


def test_log_probabilities_are_the_models_own_whatever_is_sampled(replica: Replica) -> None:
    """Neither temperature nor bias nor penalties enter, as in vLLM's default."""
    plain = replica.complete("The capital of France is", logprobs=3, max_tokens=1)
    [token] = replica.frontend._tokenizer.encode(" Banana")[:1]
    biased = replica.complete(
        "The capital of France is",
        logprobs=3,
        max_tokens=1,
        temperature=2,
        logit_bias={str(token): 100},
    )
    usual, odd = (answer.choices[0].logprobs for answer in (plain, biased))

    assert odd.tokens == [biased.choices[0].text] != usual.tokens
    assert odd.token_logprobs[0] < -5
    for text, logprob in usual.top_logprobs[0].items():
        assert odd.top_logprobs[0][text] == pytest.approx(logprob, abs=1e-5)
    assert len(odd.top_logprobs[0]) == 4  # three, and the one that was drawn


def test_offsets_point_into_the_text_also_where_characters_span_tokens(replica: Replica) -> None:
    """The model is made to write an owl, whose four bytes are several tokens."""
    [choice] = replica.complete(
        "An owl:", logprobs=0, max_tokens=12, extra_body={"guided_choice": ["a 🦉 owl"]}
    ).choices
    logprobs = choice.logprobs

    assert choice.text == "a 🦉 owl"
    assert any(token.startswith("bytes:\\x") for token in logprobs.tokens)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset : offset + len(token)] == token
    assert logprobs.text_offset == sorted(logprobs.text_offset)


# -- penalties, biases, ends --------------------------------------------------------------


def test_penalties_end_repetition(replica: Replica) -> None:
    prompt = "spam, spam, spam, spam, spam, spam, spam,"
    plain = replica.complete(prompt, max_tokens=16).choices[0].text
    assert plain.count("spam") == 8

    for penalty in (
        {"frequency_penalty": 2},
        {"extra_body": {"repetition_penalty": 2}},
    ):
        text = replica.complete(prompt, max_tokens=16, **penalty).choices[0].text
        assert text.count("spam") < 8, penalty
    story, other = (
        replica.complete("Once upon a time", max_tokens=24, presence_penalty=penalty)
        for penalty in (0, 2)
    )
    assert story.choices[0].text != other.choices[0].text


def test_a_bias_bans_and_forces(replica: Replica) -> None:
    [paris] = replica.frontend._tokenizer.encode(" Paris")
    question = "The capital of France is"

    assert " Paris" in replica.complete(question, max_tokens=1).choices[0].text
    banned = replica.complete(question, max_tokens=1, logit_bias={str(paris): -100})
    assert " Paris" not in banned.choices[0].text
    forced = replica.complete("Hello", max_tokens=3, logit_bias={str(paris): 100})
    assert forced.choices[0].text == " Paris Paris Paris"


def test_min_tokens_and_stop_tokens(replica: Replica) -> None:
    question = "What is the capital of France?"
    short = replica.chat(question, max_tokens=60)
    assert short.choices[0].finish_reason == "stop"
    num_tokens = short.usage.completion_tokens

    longer = replica.chat(question, max_tokens=60, extra_body={"min_tokens": num_tokens + 5})
    assert longer.usage.completion_tokens >= num_tokens + 5

    [paris] = replica.frontend._tokenizer.encode(" Paris")
    [choice] = replica.chat(question, extra_body={"stop_token_ids": [paris]}).choices
    assert (choice.finish_reason, choice.stop_reason) == ("stop", paris)
    assert "Paris" not in choice.message.content


def test_special_tokens_are_shown_where_that_is_asked_for(replica: Replica) -> None:
    asked: Any = {"min_tokens": 3, "logit_bias": {"0": 100}, "max_tokens": 3}
    hidden = replica.complete("Hello", extra_body=asked)
    shown = replica.complete("Hello", extra_body=asked | {"skip_special_tokens": False})

    assert hidden.choices[0].text == ""
    assert shown.choices[0].text == "<|endoftext|>" * 3


def test_continuous_usage_counts_up(replica: Replica) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(replica.complete("Hello", stream=True, stream_options=options, max_tokens=6))

    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == 6


def test_min_p_leaves_the_likely_tokens(replica: Replica) -> None:
    def draw(min_p: float, seed: int) -> str:
        answer = replica.complete(
            "The capital of France is",
            temperature=2,
            seed=seed,
            max_tokens=2,
            extra_body={"min_p": min_p},
        )
        return str(answer.choices[0].text)

    greedy = replica.complete("The capital of France is", max_tokens=2).choices[0].text
    assert {draw(1.0, seed) for seed in range(5)} == {greedy}
    assert len({draw(0.0, seed) for seed in range(5)}) > 1


def test_a_batch_of_everything_gives_what_each_gives_alone(replica: Replica) -> None:
    """Rules, grammars, log probabilities and plain requests side by side in the same steps."""
    asks: list[dict[str, Any]] = [
        {},
        {"presence_penalty": 1.5, "logprobs": 2},
        {"guided_regex": r"[a-z]+( [a-z]+){3}\."},
        {"logit_bias": {"28": 5}, "seed": 3, "temperature": 1},
        {"min_p": 0.1, "seed": 4, "temperature": 1.5, "repetition_penalty": 1.2},
        {"guided_json": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    ]
    base = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 16}

    def ask(fields: dict[str, Any]) -> tuple[str, Any]:
        _, _, body = replica.post("/v1/completions", base | fields)
        return body["choices"][0]["text"], body["choices"][0]["finish_reason"]

    alone = [ask(fields) for fields in asks]
    with ThreadPoolExecutor(len(asks)) as pool:
        together = list(pool.map(ask, asks))

    assert together == alone
    replica.until_idle()
