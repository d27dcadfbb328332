"""OpenAI request bodies: strict parsing of chat and text completions into one typed request.

What is implemented beyond the shapes below: sampling_api.py, structured_api.py, chat_api.py;
what happens to all other names: api_body.py.

Choices: a body asks for `n` answers to each of its prompts. Choice `index` of them all is prompt
`index // n`, and samples with `seed + index`: the first choice is what the request gives without
`n`, and every choice can be had again alone.

`roost_resume` continues an answer that another replica began (roost_wire/resume.py).

Errors are ApiError, which knows its status and its body; `param` is the path of the offender,
such as `messages[0].content`.

Invariant: whatever bytes come in, the result is an ApiRequest or an ApiError.

Not here: tokens and templates (frontend.py), answers (responses.py), HTTP (server.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from roost_engine.api_body import check_names, decode_object, invalid, read_part, unsupported
from roost_engine.api_errors import ApiError
from roost_engine.chat_api import Chat, ChatFields, ToolUse, read_chat
from roost_engine.request import SamplingParams
from roost_engine.sampling_api import (
    MAX_LOGPROBS,
    SamplingFields,
    TokenId,
    read_max_tokens,
    read_sampling,
)
from roost_engine.structured_api import GrammarSpec, StructuredFields, read_structured
from roost_wire.resume import FIELD, Resume

Endpoint = Literal["chat", "completion"]

#: What /v1/completions generates at most if the client does not say, as OpenAI does.
DEFAULT_COMPLETION_TOKENS: Final = 16
#: Most answers to one prompt.
MAX_N: Final = 16
#: Most answers to one request, over all its prompts: each takes a place in the queue.
MAX_CHOICES: Final = 128

# What a chat template writes around a message, about.
_FRAMING_CHARACTERS: Final = 32


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
    prompts: list[Prompt]  # one for a chat
    n: int
    max_tokens: int | None  # None: not given
    seed: int | None  # None: the server draws one
    sampling: SamplingParams  # without limit and seed: those are the two above
    grammar: GrammarSpec | None
    tool_use: ToolUse | None
    priority: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    resume: Resume | None  # only of a stream with one choice

    @property
    def num_choices(self) -> int:
        """Answers over all prompts."""
        return self.n * len(self.prompts)


def num_prompt_characters(prompt: Prompt) -> int:
    """Size of the text to be encoded, roughly; 0 if it is tokens already."""
    match prompt:
        case Chat(messages):
            framing = len(messages) * _FRAMING_CHARACTERS
            return framing + sum(len(message.content) for message in messages)
        case TextPrompt(text):
            return len(text)
        case TokenPrompt():
            return 0


def parse_chat(body: bytes) -> ApiRequest:
    """Read a body of POST /v1/chat/completions. ApiError if it is not valid."""
    fields = decode_object(body)
    check_names(fields, *_SHAPES, ChatFields, _ChatLogprobs)
    chat, tool_use = read_chat(read_part(fields, ChatFields))
    asked = read_part(fields, _ChatLogprobs)
    if asked.top_logprobs and not asked.logprobs:
        raise invalid("top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true.")
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    return _build("chat", fields, [chat], logprobs, tool_use)


def parse_completion(body: bytes) -> ApiRequest:
    """Read a body of POST /v1/completions. ApiError if it is not valid."""
    fields = decode_object(body)
    check_names(fields, *_SHAPES, _CompletionFields)
    asked = read_part(fields, _CompletionFields)
    return _build("completion", fields, read_prompts(asked.prompt), asked.logprobs, None)


def read_prompts(prompt: Any) -> list[Prompt]:
    """A text, a list of token ids, or a list of several of either. ApiError for all else."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        kind = type(prompt[0])
        if not all(isinstance(each, kind) for each in prompt):
            raise _bad_prompt()
        return [_read_prompt(each) for each in prompt]
    return [_read_prompt(prompt)]


def check_context(
    asked: ApiRequest, num_prompt_tokens: int, limit_tokens: int, *, is_exact: bool = True
) -> int:
    """Return the number of tokens to generate at most; ApiError if they do not fit.

    `is_exact` false: the prompt has `num_prompt_tokens` at least, and the error says so.
    """
    room = limit_tokens - num_prompt_tokens
    fewest = max(1, asked.sampling.min_tokens)
    max_tokens = fewest if asked.max_tokens is None else asked.max_tokens
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
    if asked.endpoint == "chat":
        return room
    return min(room, max(fewest, DEFAULT_COMPLETION_TOKENS))


# -- shapes on the wire -------------------------------------------------------------------


class _StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Common(msgspec.Struct):
    model: str
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    roost_resume: Resume | None = None


class _ChatLogprobs(msgspec.Struct):
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None


class _CompletionFields(msgspec.Struct):
    # Checked by hand (read_prompts): a union of lists is beyond msgspec.
    prompt: Any
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None


# What both endpoints have.
_SHAPES: Final = (_Common, SamplingFields, StructuredFields)


# -- steps of parsing ---------------------------------------------------------------------


def _read_prompt(prompt: Any) -> Prompt:
    if not prompt and prompt is not None and isinstance(prompt, str | list):
        raise invalid("prompt", "The prompt is empty.")
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    try:
        return TokenPrompt(msgspec.convert(prompt, list[TokenId]))
    except msgspec.ValidationError:
        raise _bad_prompt() from None


def _bad_prompt() -> ApiError:
    return invalid(
        "prompt", "Invalid 'prompt': expected a string, a list of token ids, or a list of either."
    )


def _build(
    endpoint: Endpoint,
    fields: dict[str, Any],
    prompts: list[Prompt],
    logprobs: int | None,
    tool_use: ToolUse | None,
) -> ApiRequest:
    common, sampling = read_part(fields, _Common), read_part(fields, SamplingFields)
    if common.stream_options is not None and not common.stream:
        raise invalid("stream_options", "'stream_options' is only allowed when 'stream' is true.")
    n = common.n or 1
    if n * len(prompts) > MAX_CHOICES:
        raise invalid(
            "prompt",
            f"{len(prompts)} prompts with 'n' {n} ask for {n * len(prompts)} answers; one "
            f"request gives {MAX_CHOICES} at most.",
        )
    if common.roost_resume is not None and (n * len(prompts) > 1 or not common.stream):
        raise invalid(
            FIELD, f"{FIELD!r} is only allowed when 'stream' is true and there is one choice."
        )
    grammar = read_structured(read_part(fields, StructuredFields))
    _check_combination(sampling, grammar, tool_use)
    options = common.stream_options or _StreamOptions()
    return ApiRequest(
        endpoint=endpoint,
        model=common.model,
        prompts=prompts,
        n=n,
        max_tokens=read_max_tokens(sampling),
        seed=sampling.seed,
        sampling=read_sampling(sampling, logprobs),
        grammar=grammar,
        tool_use=tool_use,
        priority=common.priority or 0,
        stream=bool(common.stream),
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
        resume=common.roost_resume,
    )


def _check_combination(
    sampling: SamplingFields, grammar: GrammarSpec | None, tool_use: ToolUse | None
) -> None:
    """ApiError for what contradicts itself: a grammar alone decides where its output ends."""
    if grammar is not None and tool_use is not None:
        raise unsupported(
            grammar.param,
            f"{grammar.param!r} cannot be combined with tools that may be called; set "
            f"'tool_choice' to 'none' or leave one of them out.",
        )
    if grammar is None and (tool_use is None or tool_use.choice == "auto"):
        return
    for name, is_set in (("ignore_eos", sampling.ignore_eos), ("min_tokens", sampling.min_tokens)):
        if is_set:
            raise unsupported(
                name, f"{name!r} cannot be combined with an output of prescribed form."
            )
