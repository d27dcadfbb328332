"""A JSON body to typed fields, strictly: the rules that all endpoints share.

Strict means that nobody is misled: a parameter either does what its name says, or is refused
by name. Four kinds of names:

    implemented  fields of the endpoint's shapes: a body has several, one for each subject
    neutral      known to OpenAI or vLLM, not implemented here; accepted with the value that
                 changes nothing (NEUTRAL_VALUES; null always), else 400 "unsupported_parameter"
    ignored      user, metadata, store, service_tier, safety_identifier, prompt_cache_key: they
                 describe the request to OpenAI's platform and do not change the answer
    unknown      400 "unknown_parameter": most likely a spelling mistake

Invariant: whatever bytes come in, the result is a value of each shape or an ApiError.

Not here: what the fields mean (openai_api.py and the modules it uses).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec

from roost_engine.api_errors import ApiError

IGNORED: Final = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
)

#: Parameter that an endpoint does not implement -> values that change nothing. null always does.
NEUTRAL_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "length_penalty": (1,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (),
    "add_generation_prompt": (True,),
    # What sglang-router and vllm-router add to each body.
    "no_stop_trim": (False,),
    "separate_reasoning": (True, False),
    "stream_reasoning": (True, False),
    "include_reasoning": (True, False),
    "return_hidden_states": (False,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "cache_salt": (),
}

_S = TypeVar("_S", bound=msgspec.Struct)

_PATH: Final = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_MISSING: Final = re.compile(r"Object missing required field `(?P<name>[^`]+)`")


def check_names(fields: dict[str, Any], *shapes: type[msgspec.Struct]) -> None:
    """ApiError for a parameter that none of an endpoint's shapes has, unless it changes nothing."""
    implemented = {name for shape in shapes for name in shape.__struct_fields__}
    for name in fields.keys() - implemented - IGNORED:
        _check_neutral(name, fields[name])


def read_part(fields: dict[str, Any], shape: type[_S]) -> _S:
    """The fields of one shape, all others left out. ApiError that names the value at fault."""
    names = fields.keys() & set(shape.__struct_fields__)
    try:
        return msgspec.convert({name: fields[name] for name in names}, shape)
    except msgspec.ValidationError as error:
        raise _wrong_value(str(error)) from None


def decode_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object; ApiError if it is none."""
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(decoded, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    return decoded


def invalid(param: str, message: str) -> ApiError:
    """A value that is refused for what it is."""
    return ApiError(400, message, param=param, code="invalid_value")


def unsupported(param: str, message: str) -> ApiError:
    """A value that makes sense, but not here."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def missing(param: str) -> ApiError:
    """A value that is not there."""
    message = f"Missing required parameter: {param!r}."
    return ApiError(400, message, param=param, code="missing_parameter")


def _check_neutral(name: str, value: Any) -> None:
    """ApiError unless a parameter that is not implemented changes nothing."""
    if name not in NEUTRAL_VALUES:
        raise ApiError(400, f"Unknown parameter: {name!r}.", param=name, code="unknown_parameter")
    if not _is_neutral(value, NEUTRAL_VALUES[name]):
        raise unsupported(
            name, f"This replica implements {name!r} with its neutral value only; leave it out."
        )


def _is_neutral(value: Any, neutral_values: tuple[Any, ...]) -> bool:
    """Whether a value changes nothing; unlike ==, false is not 0 and true is not 1."""
    return value is None or any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in neutral_values
    )


def _wrong_value(problem: str) -> ApiError:
    """ApiError from a message of msgspec, such as "Expected `int`, got `str` - at `$.seed`"."""
    located = _PATH.search(problem)
    param = located["path"] if located else ""
    text = problem[: located.start()] if located else problem
    is_missing = _MISSING.match(text)
    if is_missing:
        return missing(f"{param}.{is_missing['name']}".lstrip("."))
    return invalid(param, f"Invalid {param!r}: {text}.")
