"""Output of prescribed form, from the real model: it always parses, and always fits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any, Literal

import pytest
from pydantic import BaseModel, TypeAdapter, conint, conlist, constr
from served import Replica, served_replica

from roost_engine.admission import ExpectedOutput

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    with served_replica() as served:
        yield served


Name = constr(max_length=12)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel, extra="forbid"):
    x: int
    y: int


class Person(BaseModel, extra="forbid"):
    name: Name  # type: ignore[valid-type]
    age: conint(ge=0, le=150)  # type: ignore[valid-type]
    colour: Colour


class Line(BaseModel, extra="forbid"):
    start: Point
    end: Point | None


class Tree(BaseModel, extra="forbid"):
    value: bool
    leaves: conlist(Literal["a", "b"], max_length=3)  # type: ignore[valid-type]


class Circle(BaseModel, extra="forbid"):
    kind: Literal["circle"]
    radius: conint(ge=1, le=9)  # type: ignore[valid-type]


class Square(BaseModel, extra="forbid"):
    kind: Literal["square"]
    side: conint(ge=1, le=9)  # type: ignore[valid-type]


#: pydantic writes the schema and judges the answer: an oracle that is not ours.
TYPES: list[Any] = [
    Point,
    Person,
    Line,
    Tree,
    Circle | Square,
    bool,
    Colour,
    None,
    Literal["yes", "no"],
    Literal[1, 2, 3],
    conint(ge=-5, le=5),
    conint(ge=1000, le=1010),
    Name,
    constr(pattern=r"^[A-Z]{2}-\d{4}$"),
    constr(min_length=3, max_length=5),
    conlist(bool, min_length=2, max_length=3),
    conlist(Point, min_length=1, max_length=1),
    conlist(conlist(Literal[0, 1], min_length=2, max_length=2), min_length=2, max_length=2),
    tuple[bool, Literal["x"]],
    conint(ge=0, le=99) | None,
    Literal["ünï", 'quo"te', "back\\slash", "🦉"],
    Point | Colour,
]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: str(kind)[:50])
def test_json_of_a_schema_always_fits_it(replica: Replica, kind: Any) -> None:
    adapter = TypeAdapter(kind)
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Give me an example."}],
        "model": "smol",
        "max_tokens": 120,
        "temperature": 1.5,
        "n": 4,
        "seed": 11,
        "structured_outputs": {"json": adapter.json_schema()},
    }
    status, _, body = replica.post("/v1/chat/completions", fields)

    assert status == 200, body
    for choice in body["choices"]:
        assert choice["finish_reason"] == "stop", choice
        adapter.validate_json(choice["message"]["content"], strict=False)


def test_the_sdk_parses_its_own_type(replica: Replica) -> None:
    """`response_format` of the SDK: a strict schema that it made of a class."""
    answer = replica.sdk.chat.completions.parse(
        model="smol",
        messages=[{"role": "user", "content": "Invent a person called Ann."}],
        response_format=Person,
        max_tokens=100,
        temperature=0,
    )

    assert isinstance(answer.choices[0].message.parsed, Person)


def test_a_stream_of_json_is_json(replica: Replica) -> None:
    chunks = replica.chat(
        "Describe a point.",
        stream=True,
        max_tokens=60,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "point", "schema": Point.model_json_schema(), "strict": True},
        },
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    Point.model_validate_json(text)


def test_json_objects_of_any_kind(replica: Replica) -> None:
    answer = replica.chat(
        'Repeat exactly: {"a": 1}',
        response_format={"type": "json_object"},
        temperature=0.7,
        seed=1,
        n=6,
        max_tokens=60,
    )
    texts = [choice.message.content for choice in answer.choices]

    assert all(text.startswith("{") for text in texts)
    whole = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert whole  # others go on inventing members
    assert all(isinstance(json.loads(choice.message.content), dict) for choice in whole)


@pytest.mark.parametrize("pattern", [r"\d{4}-\d{2}-\d{2}", r"(left|right)(, (left|right)){2}"])
def test_a_regular_expression_is_matched_as_a_whole(replica: Replica, pattern: str) -> None:
    for seed in range(4):
        answer = replica.complete(
            "Answer:",
            seed=seed,
            temperature=1.5,
            max_tokens=40,
            extra_body={"guided_regex": pattern},
        )
        assert re.fullmatch(pattern, answer.choices[0].text)
        assert answer.choices[0].finish_reason == "stop"


def test_a_choice_is_one_of_them_and_costs_no_token_more(replica: Replica) -> None:
    encode = replica.frontend._tokenizer.encode
    for seed in range(6):
        answer = replica.complete(
            "Is it?",
            seed=seed,
            temperature=2,
            extra_body={"guided_choice": ["certainly not", "yes"]},
        )
        text = answer.choices[0].text
        assert text in ("certainly not", "yes")
        assert answer.usage.completion_tokens <= max(4, len(encode(text)))


def test_a_grammar_of_llama_cpps_kind(replica: Replica) -> None:
    grammar = 'root ::= term ("+" term)* "=" [0-9]+\nterm ::= [1-9]'
    answer = replica.complete(
        "Sum:", temperature=1, seed=5, max_tokens=40, extra_body={"guided_grammar": grammar}
    )

    is_whole = answer.choices[0].finish_reason == "stop"
    pattern = r"[1-9](\+[1-9])*=[0-9]+" if is_whole else r"[\d+=]+"
    assert re.fullmatch(pattern, answer.choices[0].text)


def test_what_cannot_be_enforced_is_refused_with_its_name(replica: Replica) -> None:
    import openai

    schema = {"type": "object", "properties": {"a": {"type": "strnig"}}}
    with pytest.raises(openai.BadRequestError, match="strnig") as refused:
        replica.chat(
            "Hi",
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": schema},
            },
        )

    assert refused.value.param == "response_format.json_schema.schema"


def test_a_preempted_answer_keeps_its_form() -> None:
    """More answers than the cache holds: some are preempted, and go on where they were."""
    schema = {"type": "array", "items": {"enum": list(range(10, 30))}, "minItems": 24}
    schema |= {"maxItems": 24, "x-guidance": {"item_separator": ", "}}
    fields = {"prompt": "Numbers:", "model": "smol", "guided_json": schema, "max_tokens": 130}
    with served_replica(kv_tokens=160) as small:
        # Admit them all, as if answers were short.
        small.frontend.core.scheduler._expected = ExpectedOutput(initial=0.0, least=0.0)
        _, _, body = small.post("/v1/completions", fields | {"n": 4, "seed": 1})
        assert small.metric("vllm:num_preemptions_total") > 0
        _, _, last = small.post("/v1/completions", fields | {"seed": 4})

    for choice in body["choices"]:
        assert choice["finish_reason"] == "stop"
        assert len(TypeAdapter(list[int]).validate_json(choice["text"])) == 24
    assert body["choices"][3]["text"] == last["choices"][0]["text"]


def test_a_grammar_that_cannot_be_followed_fails_its_request_alone(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"model": "smol", "prompt": "x", "guided_regex": "[ab]{4}"}
    assert replica.post("/v1/completions", asked)[0] == 200
    monkeypatch.setattr("roost_engine.grammar.MAX_MASK_S", -1.0)

    status, _, body = replica.post("/v1/completions", asked)

    assert (status, body["error"]["type"]) == (500, "server_error")
    assert "too complex" in body["error"]["message"]
    assert replica.complete("Hello").usage.completion_tokens > 0
    replica.until_idle()
