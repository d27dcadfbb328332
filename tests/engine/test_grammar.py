"""Grammars on the real tokenizer: what they accept, what they refuse, how faults are named."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from roost_engine.api_errors import ApiError
from roost_engine.chat_api import Tool, ToolUse
from roost_engine.grammar import MAX_COMPILED, GrammarCompiler, GrammarState
from roost_engine.loader import load_model
from roost_engine.structured_api import GrammarSpec
from roost_engine.tokenizer import Tokenizer
from roost_engine.tool_calls import tool_grammar

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_model("smollm2").tokenizer


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def spec(kind: Any, text: object) -> GrammarSpec:
    return GrammarSpec(kind, text if isinstance(text, str) else json.dumps(text), "guided")


def accepts(state: GrammarState, tokenizer: Tokenizer, text: str) -> bool:
    """Whether `text` may be a whole answer, token by token through the mask."""
    for token_id in tokenizer.encode(text):
        if not state.allowed(tokenizer.vocab_size)[token_id]:
            return False
        state.advance([token_id])
    return bool(state.allowed(tokenizer.vocab_size)[2])


OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "ü"]}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        ("json_schema", OBJECT, ['{"a":1}', '{"a": -7, "b": "ü"}'], ['{"b":"x"}', "{}", '{"a":1']),
        ("json_schema", OBJECT, ['{\n  "a": 1\n}'], ['{  "a":1}', '{"a":1}\n', '{"a":"1"}']),
        ("json_schema", {"type": "object"}, ["{}", '{"q":[1,null,{}]}'], ["[]", "", "text"]),
        ("regex", r"\d{3}-[a-c]+", ["123-abc", "000-a"], ["12-a", "123-", "123-abcd"]),
        ("choice", ["yes", "nö", 'a "b"'], ["yes", "nö", 'a "b"'], ["no", "yes!", ""]),
        ("grammar", 'root ::= "a" root | "b"', ["b", "aab"], ["a", "ba"]),
        ("grammar", 'start: A+ "."\nA: /[a-z]/', ["ab."], ["ab", "."]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_grammars_accept(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    kind: str,
    text: Any,
    good: list[str],
    bad: list[str],
) -> None:
    for answer in good:
        assert accepts(compiler.compile(spec(kind, text)), tokenizer, answer), answer
    for answer in bad:
        assert not accepts(compiler.compile(spec(kind, text)), tokenizer, answer), answer


@pytest.mark.parametrize(
    ("kind", "text", "fault"),
    [
        ("json_schema", {"type": "objekt"}, "objekt"),
        ("json_schema", {"type": "string", "format": "zip"}, "Unknown format: zip"),
        ("json_schema", {"unevaluatedProperties": False}, "unevaluatedProperties"),
        ("json_schema", {"propertyNames": {"enum": ["a"]}}, "propertyNames"),
        ("json_schema", {"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ("json_schema", {"$ref": "#/$defs/none"}, "none"),
        ("regex", "([", "unclosed"),
        ("regex", ".*" * 2000, "limits"),
        ("regex", "(a{1000}){1000}", "too complex"),
        ("grammar", "root ::= other", "other"),
        ("lark", "start: foo", "foo"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_faults_are_named(compiler: GrammarCompiler, kind: str, text: Any, fault: str) -> None:
    with pytest.raises(ApiError, match="cannot be enforced") as refused:
        compiler.compile(spec(kind, text))

    assert (refused.value.status, refused.value.param) == (400, "guided")
    assert fault.lower() in refused.value.message.lower()
    assert len(refused.value.message) < 400


def test_the_end_is_known_when_nothing_can_follow(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    closed, open_ended = spec("choice", ["yes"]), spec("regex", "a+")
    for kind, text, is_complete in [(closed, "yes", True), (open_ended, "a", False)]:
        state = compiler.compile(kind)
        assert not state.is_complete
        state.advance(tokenizer.encode(text))

        assert state.is_complete is is_complete
        assert state.allowed(49152)[2]


def test_copies_do_not_know_of_each_other(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    first = compiler.compile(spec("regex", "ab|cd"))
    second = first.fresh_copy()
    before = second.allowed(49152)
    first.advance(tokenizer.encode("a"))

    assert not np.array_equal(first.allowed(49152), before)
    assert np.array_equal(second.allowed(49152), before)
    assert np.array_equal(compiler.compile(spec("regex", "ab|cd")).allowed(49152), before)


def test_columns_beyond_the_vocabulary_are_banned(compiler: GrammarCompiler) -> None:
    allowed = compiler.compile(spec("regex", "(.|\n)*")).allowed(49152 + 100)

    assert allowed.size == 49152 + 100
    assert allowed[:49152].sum() > 40_000
    assert not allowed[49152:].any()


def test_a_token_against_the_grammar_is_a_failure_not_an_end(compiler: GrammarCompiler) -> None:
    state = compiler.compile(spec("regex", "a+"))
    state.advance([300])

    assert state.failure is not None
    assert not state.is_complete


def test_what_was_compiled_is_kept_and_the_oldest_goes(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer)
    specs = [spec("choice", [f"word{index}"]) for index in range(MAX_COMPILED + 1)]
    assert compiler.try_cached(specs[0]) is None
    for each in specs[:-1]:
        compiler.compile(each)
    assert compiler.try_cached(specs[0]) is not None  # used last now

    compiler.compile(specs[-1])

    assert compiler.try_cached(specs[0]) is not None
    assert compiler.try_cached(specs[1]) is None


# -- tool calls ---------------------------------------------------------------------------

DEFS = {
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/place"}},
    "required": ["at"],
    "additionalProperties": False,
    "$defs": {"place": {"enum": ["home", "work"]}},
}


def use(choice: Any, *, is_parallel: bool = True, is_strict: bool = True) -> ToolUse:
    tools = [Tool("go", None, DEFS, is_strict), Tool("stop", None, None, is_strict)]
    return ToolUse(tools, choice, is_parallel)


GO = '{"name": "go", "arguments": {"at": "home"}}'
STOP = '{"name": "stop", "arguments": {"x":[1]}}'


def tagged(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


@pytest.mark.parametrize(
    ("asked", "good", "bad"),
    [
        (
            use("required"),
            [tagged(GO), tagged(STOP, GO), tagged(*[STOP] * 16)],
            ["Hi", tagged(GO.replace("home", "mars")), tagged(*[STOP] * 17), GO, ""],
        ),
        (use("required", is_parallel=False), [tagged(GO)], [tagged(GO, GO)]),
        (use("named", is_parallel=False), [tagged(GO)], [tagged(GO, GO), "Hi"]),
        (
            use("auto"),
            ["Hi <b>!", tagged(GO), f"Let me see.\n{tagged(GO, STOP)}\nDone."],
            ["<tool_call>", tagged(GO.replace("home", "mars")), "Hi " + tagged("soon")],
        ),
    ],
    ids=["required", "required one", "named", "auto strict"],
)
def test_answers_with_hermes_calls(
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
    asked: ToolUse,
    good: list[str],
    bad: list[str],
) -> None:
    grammar = tool_grammar("hermes", asked)
    assert grammar is not None
    for text in good:
        assert accepts(compiler.compile(grammar), tokenizer, text), text
    for text in bad:
        assert not accepts(compiler.compile(grammar), tokenizer, text), text


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_answers_with_llama_calls(
    compiler: GrammarCompiler, tokenizer: Tokenizer, choice: Any
) -> None:
    grammar = tool_grammar("llama3", use(choice))
    assert grammar is not None
    go, stop = (call.replace("arguments", "parameters") for call in (GO, STOP))
    for text in [go, f"{go}; {stop}"]:
        assert accepts(compiler.compile(grammar), tokenizer, text), text
    for text in [go.replace("home", "mars"), GO, "{"]:
        assert not accepts(compiler.compile(grammar), tokenizer, text), text
    assert accepts(compiler.compile(grammar), tokenizer, "Hello.") is (choice == "auto")


def test_keywords_that_cannot_be_enforced_count_for_strict_tools_only(
    compiler: GrammarCompiler,
) -> None:
    schema = {"type": "object", "unevaluatedProperties": False}
    for is_strict in (False, True):
        asked = ToolUse([Tool("go", None, schema, is_strict)], "required", True)
        grammar = tool_grammar("hermes", asked)
        assert grammar is not None
        if is_strict:
            with pytest.raises(ApiError, match="unevaluatedProperties") as refused:
                compiler.compile(grammar)
            assert refused.value.param == "tools"
        else:
            compiler.compile(grammar)
