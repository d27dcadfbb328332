"""OpenAI request bodies: strict parsing of chat and text completions into one typed request.

Strict means that nobody is misled: a parameter either does what its name says, or is refused
by name. Four kinds of names:

    implemented  model, messages | prompt, max_tokens (alias max_completion_tokens), temperature,
                 top_p, top_k, seed, stop, stream, stream_options, ignore_eos
    neutral      known to OpenAI or vLLM, not implemented here; accepted with the value that
                 changes nothing (NEUTRAL_VALUES; null always), else 400 "unsupported_parameter"
    ignored      user, metadata, store, service_tier, safety_identifier, prompt_cache_key: they
                 describe the request to OpenAI's platform and do not change the answer
    unknown      400 "unknown_parameter": most likely a spelling mistake

Errors are ApiError, which knows its status and its body; `param` is the path of the offender,
such as `messages[0].content`.

Invariant: whatever bytes come in, the result is an ApiRequest or an ApiError.

Not here: tokens and templates (frontend.py), answers (responses.py), HTTP (server.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

Endpoint = Literal["chat", "completion"]

#: What /v1/completions generates at most if the client does not say, as OpenAI does.
DEFAULT_COMPLETION_TOKENS: Final = 16

# What a chat template writes around a message, about.
_FRAMING_CHARACTERS: Final = 32

IGNORED: Final = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
)

#: Parameter that is not implemented -> values that change nothing. null is always accepted.
NEUTRAL_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "cache_salt": (),
    "priority": (0,),
}


class ApiError(Exception):
    """A refusal as OpenAI words it; the server turns it into a response."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> bytes:
        """JSON of the response."""
        return error_body(self.status, self.message, param=self.param, code=self.code)


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> bytes:
    """OpenAI's error object; its `type` follows from the HTTP status."""
    kinds = {404: "not_found_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    return msgspec.json.encode({"error": error})


class Message(msgspec.Struct, frozen=True):
    """One turn of a chat, its content flattened to text."""

    role: str
    content: str


class Chat(msgspec.Struct, frozen=True):
    """A prompt that the model's chat template renders."""

    messages: list[Message]


class TextPrompt(msgspec.Struct, frozen=True):
    """A prompt taken as it is."""

    text: str


class TokenPrompt(msgspec.Struct, frozen=True):
    """A prompt in token ids; whether the model knows them is not checked yet."""

    token_ids: list[int]


Prompt = Chat | TextPrompt | TokenPrompt


class ApiRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A valid request to either endpoint; values are in range."""

    endpoint: Endpoint
    model: str
    prompt: Prompt
    max_tokens: int | None  # None: not given
    temperature: float
    top_p: float
    top_k: int  # 0: no limit
    seed: int | None  # None: the server draws one
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool

    @property
    def num_prompt_characters(self) -> int:
        """Size of the text to be encoded, roughly; 0 if it is tokens already."""
        match self.prompt:
            case Chat(messages):
                framing = len(messages) * _FRAMING_CHARACTERS
                return framing + sum(len(message.content) for message in messages)
            case TextPrompt(text):
                return len(text)
            case TokenPrompt():
                return 0


def parse_chat(body: bytes) -> ApiRequest:
    """Read a body of POST /v1/chat/completions. ApiError if it is not valid."""
    fields = _implemented_fields(body, _ChatBody)
    parsed = _convert(fields, _ChatBody)
    messages = [_read_message(message, index) for index, message in enumerate(parsed.messages)]
    return _build("chat", parsed, Chat(messages))


def parse_completion(body: bytes) -> ApiRequest:
    """Read a body of POST /v1/completions. ApiError if it is not valid."""
    fields = _implemented_fields(body, _CompletionBody)
    parsed = _convert(fields, _CompletionBody)
    prompt = _single_prompt(parsed.prompt)
    return _build("completion", parsed, prompt)


def check_context(
    asked: ApiRequest, num_prompt_tokens: int, limit_tokens: int, *, is_exact: bool = True
) -> int:
    """Return the number of tokens to generate at most; ApiError if they do not fit.

    `is_exact` false: the prompt has `num_prompt_tokens` at least, and the error says so.
    """
    room = limit_tokens - num_prompt_tokens
    max_tokens = 1 if asked.max_tokens is None else asked.max_tokens
    if max_tokens > room:
        at_least = "" if is_exact else "at least "
        prompt_name = "messages" if asked.endpoint == "chat" else "prompt"
        raise ApiError(
            400,
            f"This model's maximum context length is {limit_tokens} tokens. However, you "
            f"requested {at_least}{num_prompt_tokens + max_tokens} tokens ({at_least}"
            f"{num_prompt_tokens} in the prompt, {max_tokens} in the completion).",
            param=prompt_name if room < 1 else "max_tokens",
            code="context_length_exceeded",
        )
    if asked.max_tokens is not None:
        return asked.max_tokens
    return room if asked.endpoint == "chat" else min(room, DEFAULT_COMPLETION_TOKENS)


# -- shapes on the wire -------------------------------------------------------------------

_StopString = Annotated[str, Meta(min_length=1, max_length=1000)]
_Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_TokenIds = list[Annotated[int, Meta(ge=0, le=2**31 - 1)]]


class _StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Common(msgspec.Struct, kw_only=True):
    model: str
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    seed: _Seed | None = None
    stop: _StopString | Annotated[list[_StopString], Meta(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    ignore_eos: bool | None = None


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class _MessageBody(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part] | None = None
    name: str | None = None  # ignored: no template here shows it
    refusal: str | None = None
    tool_calls: Annotated[list[Any], Meta(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = None  # echoed back by SDKs from earlier answers; ignored


class _ChatBody(_Common, kw_only=True):
    messages: Annotated[list[_MessageBody], Meta(min_length=1)]


class _CompletionBody(_Common, kw_only=True):
    # Checked by hand (_single_prompt): a union of lists is beyond msgspec.
    prompt: Any


_S = TypeVar("_S", bound=_Common)


# -- steps of parsing ---------------------------------------------------------------------


def _implemented_fields(body: bytes, shape: type[_Common]) -> dict[str, Any]:
    """The body's implemented parameters. ApiError for bad JSON and for refused names."""
    fields = _decode_object(body)
    implemented = set(shape.__struct_fields__)
    for name in fields.keys() - implemented - IGNORED:
        if name not in NEUTRAL_VALUES:
            raise ApiError(
                400, f"Unknown parameter: {name!r}.", param=name, code="unknown_parameter"
            )
        if not _is_neutral(fields[name], NEUTRAL_VALUES[name]):
            raise ApiError(
                400,
                f"This replica implements {name!r} with its neutral value only; leave it out.",
                param=name,
                code="unsupported_parameter",
            )
    return {name: fields[name] for name in fields.keys() & implemented}


def _decode_object(body: bytes) -> dict[str, Any]:
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(decoded, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    return decoded


def _is_neutral(value: Any, neutral_values: tuple[Any, ...]) -> bool:
    """Whether a value changes nothing; unlike ==, false is not 0 and true is not 1."""
    return value is None or any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in neutral_values
    )


_PATH: Final = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_MISSING: Final = re.compile(r"Object missing required field `(?P<name>[^`]+)`")


def _convert(fields: dict[str, Any], shape: type[_S]) -> _S:
    try:
        return msgspec.convert(fields, shape)
    except msgspec.ValidationError as error:
        raise _wrong_value(str(error)) from None


def _wrong_value(problem: str) -> ApiError:
    """ApiError from a message of msgspec, such as "Expected `int`, got `str` - at `$.seed`"."""
    located = _PATH.search(problem)
    param = located["path"] if located else ""
    text = problem[: located.start()] if located else problem
    missing = _MISSING.match(text)
    if missing:
        param = f"{param}.{missing['name']}".lstrip(".")
        return ApiError(
            400, f"Missing required parameter: {param!r}.", param=param, code="missing_parameter"
        )
    return ApiError(400, f"Invalid {param!r}: {text}.", param=param, code="invalid_value")


def _read_message(message: _MessageBody, index: int) -> Message:
    role = "system" if message.role == "developer" else message.role
    if message.content is None and role != "assistant":
        param = f"messages[{index}].content"
        raise ApiError(
            400, f"Missing required parameter: {param!r}.", param=param, code="missing_parameter"
        )
    if isinstance(message.content, list):
        content = "\n".join(part.text for part in message.content)
    else:
        content = message.content or ""
    return Message(role, content)


def _single_prompt(prompt: Any) -> Prompt:
    """A text or a list of token ids, possibly as the only member of a list."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise ApiError(
                400,
                f"{len(prompt)} prompts in one request are not supported; send one request each.",
                param="prompt",
                code="unsupported_parameter",
            )
        prompt = prompt[0]
    if not prompt and prompt is not None and isinstance(prompt, str | list):
        raise ApiError(400, "The prompt is empty.", param="prompt", code="invalid_value")
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    try:
        return TokenPrompt(msgspec.convert(prompt, _TokenIds))
    except msgspec.ValidationError:
        problem = "Invalid 'prompt': expected a string or a list of token ids."
        raise ApiError(400, problem, param="prompt", code="invalid_value") from None


def _build(
    endpoint: Endpoint,
    parsed: _Common,
    prompt: Prompt,
) -> ApiRequest:
    if parsed.stream_options is not None and not parsed.stream:
        raise ApiError(
            400,
            "'stream_options' is only allowed when 'stream' is true.",
            param="stream_options",
            code="invalid_value",
        )
    stop = [parsed.stop] if isinstance(parsed.stop, str) else parsed.stop or []
    options = parsed.stream_options
    return ApiRequest(
        endpoint=endpoint,
        model=parsed.model,
        prompt=prompt,
        max_tokens=_max_tokens(parsed),
        temperature=1.0 if parsed.temperature is None else parsed.temperature,
        top_p=1.0 if parsed.top_p is None else parsed.top_p,
        top_k=max(parsed.top_k or 0, 0),
        seed=parsed.seed,
        stop=tuple(stop),
        ignore_eos=bool(parsed.ignore_eos),
        stream=bool(parsed.stream),
        include_usage=options is not None and bool(options.include_usage),
    )


def _max_tokens(parsed: _Common) -> int | None:
    old, new = parsed.max_tokens, parsed.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise ApiError(
            400,
            "'max_tokens' and 'max_completion_tokens' are two names of one limit and differ.",
            param="max_completion_tokens",
            code="invalid_value",
        )
    return new if old is None else old
