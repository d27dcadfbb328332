"""What an answer must look like: JSON, a schema, a regular expression, a choice, a grammar.

One constraint under three spellings: OpenAI's `response_format`, vLLM's `structured_outputs`
and its older `guided_*`. Two at once are refused, since one of them would have to be ignored.

Not here: compiling and applying a constraint (grammar.py), tool calls (tool_calls.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from roost_engine.api_body import invalid, missing

#: Larger ones are refused: compiling them would hold up the others.
MAX_SPEC_CHARACTERS: Final = 64 * 1024

#: Between two tokens of JSON: nothing, one space, or a line break and up to 32 spaces. That covers
#: compact, common and indented JSON; endless whitespace, which small models fall into, is out.
JSON_WHITESPACE: Final = r"( |\n {0,32})?"

GrammarKind = Literal["json_schema", "regex", "choice", "grammar", "lark"]


class GrammarSpec(msgspec.Struct, frozen=True):
    """A constraint on the output, not compiled yet.

    `text` by kind: json_schema and choice are JSON; regex is Rust's dialect; grammar is GBNF, EBNF
    or Lark, as clients write it; lark is llguidance's Lark, which tool_calls.py writes.
    """

    kind: GrammarKind
    text: str
    param: str  # of the body, for errors


_Choices = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=1024)]
_Text = Annotated[str, Meta(min_length=1)]


class _JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None  # the schema is always enforced in full, or refused


class _ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    json: _Text | dict[str, Any] | None = None
    regex: _Text | None = None
    choice: _Choices | None = None
    grammar: _Text | None = None
    json_object: bool | None = None


class StructuredFields(msgspec.Struct):
    """As they stand in a body."""

    response_format: _ResponseFormat | None = None
    structured_outputs: _StructuredOutputs | None = None
    guided_json: _Text | dict[str, Any] | None = None
    guided_regex: _Text | None = None
    guided_choice: _Choices | None = None
    guided_grammar: _Text | None = None


def read_structured(fields: StructuredFields) -> GrammarSpec | None:
    """The one constraint of a body, if it has any; ApiError for two, or for one too large."""
    outputs = fields.structured_outputs or _StructuredOutputs()
    base = "structured_outputs"
    found = [
        _read_response_format(fields.response_format),
        _json("guided_json", fields.guided_json),
        _text("regex", "guided_regex", fields.guided_regex),
        _choice("guided_choice", fields.guided_choice),
        _text("grammar", "guided_grammar", fields.guided_grammar),
        _json(f"{base}.json", outputs.json),
        _text("regex", f"{base}.regex", outputs.regex),
        _choice(f"{base}.choice", outputs.choice),
        _text("grammar", f"{base}.grammar", outputs.grammar),
        _json(f"{base}.json_object", {"type": "object"} if outputs.json_object else None),
    ]
    specs = [spec for spec in found if spec is not None]
    if len(specs) > 1:
        first, second = specs[:2]
        raise invalid(second.param, f"{first.param!r} and {second.param!r} exclude each other.")
    for spec in specs:
        check_size(spec)
    if not specs and fields.structured_outputs is not None:
        raise invalid(base, "'structured_outputs' names no constraint.")
    return specs[0] if specs else None


def check_size(spec: GrammarSpec) -> None:
    """ApiError if compiling it could take too long."""
    if len(spec.text) > MAX_SPEC_CHARACTERS:
        raise invalid(
            spec.param,
            f"{spec.param!r} has {len(spec.text)} characters, at most {MAX_SPEC_CHARACTERS} are "
            f"taken.",
        )


def _read_response_format(given: _ResponseFormat | None) -> GrammarSpec | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return _json("response_format", {"type": "object"})
    if given.json_schema is None:
        raise missing("response_format.json_schema")
    if given.json_schema.schema is None:
        raise missing("response_format.json_schema.schema")
    return _json("response_format.json_schema.schema", given.json_schema.schema)


def _json(param: str, schema: str | dict[str, Any] | None) -> GrammarSpec | None:
    if schema is None:
        return None
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError) as error:
            raise invalid(param, f"{param!r} is not a JSON schema: {error}.") from None
    return GrammarSpec("json_schema", msgspec.json.encode(schema).decode(), param)


def _text(kind: Literal["regex", "grammar"], param: str, text: str | None) -> GrammarSpec | None:
    return None if text is None else GrammarSpec(kind, text, param)


def _choice(param: str, choices: list[str] | None) -> GrammarSpec | None:
    if choices is None:
        return None
    return GrammarSpec("choice", msgspec.json.encode(choices).decode(), param)
