"""A stream that is cut anywhere and continued by another replica says what it would have said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from legs import Said, begin, check_every_cut, resume
from served import Replica, served_replica
from tiny_models import save_talking

from roost_wire.resume import FIELD, RESUMABLE, SEED

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Replica]]:
    """Three replicas of a random model, whose answers are noise in many languages."""
    folder = tmp_path_factory.mktemp("tiny")
    save_talking(folder)
    with (
        served_replica(2048, str(folder), threads=1) as one,
        served_replica(2048, str(folder), threads=1) as two,
        served_replica(1024, str(folder), threads=1) as three,
    ):
        yield [one, two, three]


@pytest.fixture(scope="module")
def smollm2() -> Iterator[list[Replica]]:
    with served_replica() as one, served_replica() as two:
        yield [one, two]


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "string", "maxLength": 12}, "y": {"type": "boolean"}},
            "required": ["x", "y"],
            "additionalProperties": False,
        },
    },
}
SCHEMA: Any = {
    "type": "json_schema",
    "json_schema": {"name": "s", "schema": TOOL["function"]["parameters"]},
}
GREEDY = {"temperature": 0}
SAMPLED = {"temperature": 1.3, "top_p": 0.95, "seed": 7}
UNSEEDED = {"temperature": 1.0}
PENALTIES = {"presence_penalty": 0.9, "frequency_penalty": 0.7, "repetition_penalty": 1.2}
RULES = {"min_tokens": 20, "stop_token_ids": [5, 30, 31], "logit_bias": {"0": 4, "9": 3}}
STOPS = {"stop": ["ab", "aq", "{x", "oo"], "min_tokens": 12}

CASES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "seeded": SAMPLED,
    "unseeded": UNSEEDED,
    "penalties": SAMPLED | PENALTIES,
    "rules": SAMPLED | RULES,
    "stop strings": SAMPLED | STOPS,
    "stop strings shown": SAMPLED | STOPS | {"include_stop_str_in_output": True},
    "log probabilities": SAMPLED | {"logprobs": True, "top_logprobs": 3},
    "log probabilities and stop strings": SAMPLED | STOPS | {"logprobs": True, "top_logprobs": 1},
    "special tokens": SAMPLED | {"skip_special_tokens": False, "ignore_eos": True},
    "JSON": SAMPLED | {"response_format": SCHEMA},
    "JSON and log probabilities": SAMPLED | {"response_format": SCHEMA, "logprobs": True},
    "a tool": SAMPLED | {"tools": [TOOL], "tool_choice": "required"},
    "one tool": UNSEEDED
    | {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
    "a named tool": SAMPLED
    | {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    "a tool that may be called": SAMPLED | {"tools": [TOOL], "logprobs": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_chat_goes_on_after_every_event(tiny: list[Replica], case: str) -> None:
    for turn in range(3):
        asked = {"model": "smol", "max_tokens": 60} | CASES[case]
        if "seed" in asked:
            asked["seed"] += turn
        asked["messages"] = [{"role": "user", "content": f"hello {turn}"}]

        said = check_every_cut(tiny, CHAT, asked, every=4 if turn else 1)

        assert said.num_roles == 1
        assert bool(said.calls) or case not in ("a tool", "one tool", "a named tool")


@pytest.mark.parametrize(
    "case", [case for case in CASES if "tool" not in case and "logprobs" not in CASES[case]]
)
def test_a_completion_goes_on_after_every_event(tiny: list[Replica], case: str) -> None:
    asked = {"model": "smol", "max_tokens": 60, "prompt": "hello", "logprobs": 2} | CASES[case]

    check_every_cut(tiny, COMPLETION, asked)


@pytest.mark.model
@pytest.mark.parametrize(
    "case", ["greedy", "unseeded", "penalties", "stop strings", "JSON", "a tool"]
)
def test_a_chat_of_a_real_model_goes_on(smollm2: list[Replica], case: str) -> None:
    text = "Write one sentence about the sea 🌊 and one about 北京."
    asked = {"model": "smol", "max_tokens": 24, "messages": [{"role": "user", "content": text}]}

    said = check_every_cut(smollm2, CHAT, asked | CASES[case], every=5)

    assert said.text or said.calls


def test_an_answer_may_move_at_every_event(tiny: list[Replica]) -> None:
    """Tokens that a continued stream reports continue those it was given."""
    asked = {"model": "smol", "prompt": "hello", "max_tokens": 40, "stream": True} | SAMPLED
    asked |= STOPS | {"logprobs": 1}
    whole = begin(tiny[0], COMPLETION, asked)
    events, ids = whole.events[:1], whole.token_ids(1)
    while Said(events).end is None:
        leg = resume(tiny[len(events) % 3], COMPLETION, asked, ids, whole.seed)
        events.append(leg.events[0])
        ids += leg.token_ids(1)

    assert len(events) > 1  # on a busy machine an event has many tokens
    assert Said(events).all == Said(whole.events).all


def test_a_stream_says_the_same_whether_it_may_be_continued_or_not(tiny: list[Replica]) -> None:
    asked = {"model": "smol", "prompt": "hello", "max_tokens": 40, "stream": True} | SAMPLED

    may = begin(tiny[0], COMPLETION, asked)
    for value in ("0", "true", ""):
        may_not = begin(tiny[1], COMPLETION, asked, **{RESUMABLE: value})

        assert Said(may_not.events).text == Said(may.events).text
        assert not Said(may_not.events).token_ids
        assert SEED not in may_not.headers
    assert Said(may.events).token_ids


def test_several_choices_are_not_reported(tiny: list[Replica]) -> None:
    asked = {"model": "smol", "prompt": "hello", "max_tokens": 5, "stream": True, "n": 2}

    leg = begin(tiny[0], COMPLETION, asked | UNSEEDED)

    assert SEED not in leg.headers
    assert not leg.token_ids(len(leg.events))


def test_tokens_that_end_the_answer_end_it_at_once(tiny: list[Replica]) -> None:
    """What was held back is still to be said; of the rest nothing is said twice."""
    asked = {"model": "smol", "prompt": "hello", "stream": True, "max_tokens": 30} | SAMPLED
    asked["stream_options"] = {"include_usage": True}
    for more in ({}, {"logprobs": 1}, {"ignore_eos": True, "stop": ["zzzz"], "logprobs": 0}):
        whole = begin(tiny[0], COMPLETION, asked | more)
        said, ids = Said(whole.events), whole.token_ids(len(whole.events))

        rest = Said(resume(tiny[1], COMPLETION, asked | more, ids, whole.seed).events)

        assert rest.end == said.end
        assert rest.usage == said.usage
        assert not rest.text
        assert not rest.token_ids


def test_what_was_generated_stands_also_where_this_replica_would_not_have_said_it(
    tiny: list[Replica],
) -> None:
    """Replicas of one model may compute in other formats."""
    asked = {"model": "smol", "prompt": "hello", "stream": True, "max_tokens": 4, "temperature": 0}
    asked["stream_options"] = {"include_usage": True}

    ended = Said(resume(tiny[0], COMPLETION, asked, [70, 71, 0], 1).events)
    told = Said(resume(tiny[0], COMPLETION, asked | {"logprobs": 0}, [70, 1, 1], 1).events)

    assert (ended.text, ended.end) == ("", ("stop", None))
    assert ended.usage == {"prompt_tokens": 5, "completion_tokens": 3}
    assert [token for _, token, _, _ in told.logprobs][:2] == ["<special>", "<special>"]
    assert len(told.logprobs) == 3
    assert told.end == ("length", None)


def test_no_tokens_yet_is_the_whole_answer_with_the_same_seed(tiny: list[Replica]) -> None:
    asked = {"model": "smol", "prompt": "hello", "stream": True, "max_tokens": 30} | UNSEEDED
    whole = begin(tiny[0], COMPLETION, asked)

    again = resume(tiny[1], COMPLETION, asked, [], whole.seed)

    assert Said(again.events).all == Said(whole.events).all
    assert Said(again.events).token_ids == Said(whole.events).token_ids


def test_a_continued_answer_takes_its_beginning_from_the_cache(tiny: list[Replica]) -> None:
    asked = {"model": "smol", "prompt": "h" * 40, "stream": True, "max_tokens": 60}
    asked |= {"ignore_eos": True} | SAMPLED
    whole = begin(tiny[0], COMPLETION, asked)
    before = tiny[0].metric("roost_engine:prefill_tokens_total")

    rest = resume(tiny[0], COMPLETION, asked, whole.token_ids(50), whole.seed)

    assert rest.headers["x-roost-prompt-tokens"] == "40"
    assert rest.headers["x-roost-cached-tokens"] == "40"  # of the prompt, though more was cached
    assert tiny[0].metric("roost_engine:prefill_tokens_total") == before


def test_call_ids_differ_between_turns_and_choices(tiny: list[Replica]) -> None:
    asked = {"model": "smol", "max_tokens": 60, "tools": [TOOL], "tool_choice": "required", "n": 2}
    ids: list[str] = []
    for seed, text in ((1, "a"), (2, "a"), (1, "b")):
        messages = [{"role": "user", "content": text}]
        sent = asked | {"messages": messages, "seed": seed}
        status, _, answer = tiny[0].post(CHAT, sent)
        assert status == 200
        ids += [
            call["id"] for choice in answer["choices"] for call in choice["message"]["tool_calls"]
        ]

    assert len(ids) >= 6
    assert len(set(ids)) == len(ids)


STREAM = {"model": "smol", "prompt": "hello", "max_tokens": 4, "stream": True}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": False, FIELD: {"token_ids": [4], "seed": 1}}, FIELD),
        ({"n": 2, FIELD: {"token_ids": [4], "seed": 1}}, FIELD),
        ({"prompt": ["a", "b"], FIELD: {"token_ids": [4], "seed": 1}}, FIELD),
        ({FIELD: {"token_ids": [4, 4, 4, 4, 4], "seed": 1}}, FIELD),
        ({FIELD: {"token_ids": [160], "seed": 1}}, FIELD),
        ({FIELD: {"token_ids": [4, 0, 4], "seed": 1}}, FIELD),  # goes on after its end
        ({FIELD: {"token_ids": [4, -1], "seed": 1}}, f"{FIELD}.token_ids[1]"),
        ({FIELD: {"token_ids": [4], "seed": 2**63}}, f"{FIELD}.seed"),
        ({FIELD: {"token_ids": [4]}}, f"{FIELD}.seed"),
        ({FIELD: {"token_ids": [4], "seed": 1, "text": "a"}}, FIELD),
        ({FIELD: [4]}, FIELD),
    ],
    ids=str,
)
def test_what_cannot_be_continued_is_refused_by_name(
    tiny: list[Replica], fields: dict[str, Any], param: str
) -> None:
    status, _, answer = tiny[0].post(COMPLETION, STREAM | fields)

    assert (status, answer["error"]["param"]) == (400, param)


def test_the_longest_beginning_is_taken(tiny: list[Replica]) -> None:
    leg = resume(tiny[0], COMPLETION, STREAM | {"temperature": 0}, [159, 4, 4, 4], 1)

    assert Said(leg.events).end == ("length", None)


def test_tokens_that_a_grammar_forbids_fail_the_request(tiny: list[Replica]) -> None:
    fields = STREAM | {"max_tokens": 20, "response_format": SCHEMA}
    body = json.dumps(fields | {FIELD: {"token_ids": [5, 5, 5], "seed": 1}}).encode()

    status, _, answer = tiny[0].http("POST", COMPLETION, body)

    assert status == 500
    assert b"cannot follow its grammar" in answer
    tiny[0].until_idle()


def test_null_is_no_resume(tiny: list[Replica]) -> None:
    assert tiny[0].post(COMPLETION, STREAM | {FIELD: None, "stream": False})[0] == 200
