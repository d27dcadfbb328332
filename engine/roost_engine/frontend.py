"""Front end: from a valid API request to text, through tokenizer and engine core.

    ApiRequest --template, encode--> token ids --core--> tokens --generation.py--> text

Rendering and encoding of long prompts happen in a worker thread: 16 KB cost about 6 ms, which
no other stream should wait for. So does compiling a grammar. What cannot fit the context whatever
its tokens are is refused before either.

An answer that began on another replica is continued: its tokens so far go to the transcript, which
shows nothing of them again, and to the engine request, whose output they are.

Choices of a request are requests of the engine like any others, submitted all or none; that they
share a prompt is found by the prefix cache.

Not here: what a body looks like (openai_api.py, responses.py), the life of an answer
(generation.py), HTTP (server.py).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING, TypeVar

import msgspec

from roost_engine.api_body import invalid
from roost_engine.api_errors import ApiError
from roost_engine.chat import ChatTemplateError
from roost_engine.chat_api import Chat
from roost_engine.generation import Generation, Generations
from roost_engine.grammar import GrammarCompiler
from roost_engine.logits import row_rules
from roost_engine.openai_api import (
    TextPrompt,
    TokenPrompt,
    check_context,
    num_prompt_characters,
)
from roost_engine.request import Request
from roost_engine.structured_api import check_size
from roost_engine.tool_calls import explain_tools, tool_grammar
from roost_engine.tool_parser import tool_parser
from roost_engine.transcript import Transcript
from roost_wire.resume import FIELD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from roost_engine.chat import ChatTemplate
    from roost_engine.chat_api import ToolUse
    from roost_engine.core import EngineCore
    from roost_engine.grammar import GrammarState
    from roost_engine.metrics import EngineMetrics
    from roost_engine.openai_api import ApiRequest, Prompt
    from roost_engine.request import SamplingParams
    from roost_engine.tokenize_api import DetokenizeRequest, TokenizeRequest
    from roost_engine.tokenizer import Tokenizer
    from roost_engine.tool_parser import ToolParser

_T = TypeVar("_T")

# Characters above which a prompt is encoded in a worker thread; below it the hop costs more.
_LONG_PROMPT_CHARACTERS = 4096
# Tokens of an answer above which it is replayed in one.
_LONG_REPLAY_TOKENS = 1024


class Frontend:
    """One served model."""

    def __init__(
        self,
        *,
        model_name: str,
        tokenizer: Tokenizer,
        chat: ChatTemplate,
        vocab_size: int,
        core: EngineCore,
        metrics: EngineMetrics,
    ) -> None:
        self.model_name = model_name
        self.core = core
        self.metrics = metrics
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._chat = chat
        self._grammars = GrammarCompiler(tokenizer)

    @property
    def max_model_len(self) -> int:
        """Longest prompt and completion together, in tokens."""
        return self.core.scheduler.config.max_model_len

    def check_model(self, name: str) -> None:
        """ApiError 404 unless `name` is served here."""
        if name != self.model_name:
            raise ApiError(
                404,
                f"The model {name!r} does not exist; this replica serves {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    async def start(
        self, asked: ApiRequest, request_id: str, timeout_s: float | None = None
    ) -> Generations:
        """Queue a request. ApiError if it is refused, EngineError if the engine cannot take it.

        `timeout_s`: how long it may wait before it is computed. The caller must close what it gets.
        """
        arrival_s = time.monotonic()
        self.check_model(asked.model)
        self.core.check_accepts(asked.num_choices)
        self._check_vocabulary("logit_bias", asked.sampling.logit_bias)
        self._check_vocabulary("stop_token_ids", asked.sampling.stop_token_ids)
        for prompt in asked.prompts:
            fewest_tokens = self._fewest_tokens(prompt)
            if fewest_tokens >= self.max_model_len:
                check_context(asked, fewest_tokens, self.max_model_len, is_exact=False)  # refuses
        prompts = [await self._encode(prompt) for prompt in asked.prompts]
        limits = [check_context(asked, len(ids), self.max_model_len) for ids in prompts]
        output_ids = self._resumed_ids(asked, limits)
        grammars = await self._compile(asked)
        seed = _seed(asked)
        requests: list[Request] = []
        transcripts: list[Transcript] = []
        for index in range(asked.num_choices):
            prompt_index = index // asked.n
            sampling = msgspec.structs.replace(
                asked.sampling, max_tokens=limits[prompt_index], seed=seed + index
            )
            grammar = grammars[index]
            transcript = Transcript(self._tokenizer, sampling, self._tools(asked))
            num_owed = await self._replay(transcript, output_ids, has_grammar=grammar is not None)
            transcripts.append(transcript)
            requests.append(
                Request(
                    f"{request_id}-{index}",
                    prompts[prompt_index],
                    sampling,
                    arrival_s,
                    priority=asked.priority,
                    deadline_s=None if timeout_s is None else arrival_s + timeout_s,
                    rules=row_rules(sampling, self._end_ids(sampling), grammar),
                    output_ids=output_ids,
                    num_owed=num_owed,
                )
            )
        return self._submit(requests, transcripts, asked.n)

    async def tokenize(self, asked: TokenizeRequest) -> tuple[list[int], list[str] | None]:
        """Token ids, and their entries in the vocabulary if they were asked for. ApiError."""
        if asked.model is not None:
            self.check_model(asked.model)
        prompt, adds = asked.prompt, asked.add_special_tokens
        is_long = isinstance(prompt, Chat) or len(prompt) > _LONG_PROMPT_CHARACTERS
        ids = await self._run(
            is_long,
            lambda: self._tokenizer.encode(
                self._render(prompt) if isinstance(prompt, Chat) else prompt,
                add_special_tokens=adds,
            ),
        )
        names = [self._tokenizer.vocabulary_entry(token_id) for token_id in ids]
        return ids, names if asked.return_token_strs else None

    def detokenize(self, asked: DetokenizeRequest) -> str:
        """Text of tokens, special ones included. ApiError for ids that do not exist."""
        if asked.model is not None:
            self.check_model(asked.model)
        self._check_vocabulary("tokens", asked.tokens)
        return b"".join(map(self._tokenizer.spelled_bytes, asked.tokens)).decode(errors="replace")

    def _submit(
        self, requests: list[Request], transcripts: list[Transcript], n: int
    ) -> Generations:
        """All requests or none."""
        self.core.check_accepts(len(requests))
        choices: list[Generation] = []
        for request, transcript in zip(requests, transcripts, strict=True):
            stream = self.core.submit(request)
            times = self.metrics.start_request(request.arrival_s)
            choices.append(Generation(self.core, stream, transcript, times))
        return Generations(choices, n)

    def _tools(self, asked: ApiRequest) -> tuple[ToolUse, ToolParser] | None:
        use = asked.tool_use
        return None if use is None else (use, tool_parser(self._chat.tool_format, use))

    def _resumed_ids(self, asked: ApiRequest, limits: list[int]) -> list[int]:
        """What was generated elsewhere. ApiError if it cannot be part of this answer."""
        if asked.resume is None:
            return []
        token_ids = asked.resume.token_ids
        self._check_vocabulary(FIELD, token_ids)
        if len(token_ids) > limits[0]:
            raise invalid(
                FIELD, f"{FIELD!r} has {len(token_ids)} tokens, the answer {limits[0]} at most."
            )
        return token_ids

    async def _replay(
        self, transcript: Transcript, output_ids: list[int], *, has_grammar: bool
    ) -> int:
        """How many of the last tokens the engine owes; see transcript.py."""
        if not output_ids:
            return 0
        try:
            return await self._run(
                len(output_ids) > _LONG_REPLAY_TOKENS,
                lambda: transcript.replay(output_ids, has_grammar=has_grammar),
            )
        except ValueError as error:
            raise invalid(FIELD, f"{FIELD!r} is no part of an answer: {error}.") from None

    def _end_ids(self, sampling: SamplingParams) -> frozenset[int]:
        """Tokens that end the answer."""
        if sampling.ignore_eos:
            return sampling.stop_token_ids
        return sampling.stop_token_ids | self._tokenizer.eos_token_ids

    async def _compile(self, asked: ApiRequest) -> list[GrammarState | None]:
        """The grammar's start for each choice, if there is one. ApiError if it is no grammar."""
        spec = asked.grammar
        if asked.tool_use is not None:
            spec = tool_grammar(self._chat.tool_format, asked.tool_use)
        if spec is None:
            return [None] * asked.num_choices
        check_size(spec)
        first = self._grammars.try_cached(spec)
        if first is None:
            first = await asyncio.to_thread(self._grammars.compile, spec)
        return [first, *(first.fresh_copy() for _ in range(asked.num_choices - 1))]

    def _fewest_tokens(self, prompt: Prompt) -> int:
        """Number of tokens that the prompt has at least, known without rendering or encoding.

        Every message of a chat takes a token, if only to mark its turn.
        """
        match prompt:
            case Chat(messages):
                text = "".join(message.content for message in messages)
                return max(len(messages), self._tokenizer.fewest_tokens(text))
            case TextPrompt(text):
                return self._tokenizer.fewest_tokens(text)
            case TokenPrompt(token_ids):
                return len(token_ids)

    async def _encode(self, prompt: Prompt) -> list[int]:
        """Token ids of the prompt, at least one."""
        is_long = num_prompt_characters(prompt) > _LONG_PROMPT_CHARACTERS
        ids = await self._run(is_long, lambda: self._encode_now(prompt))
        if not ids:
            raise invalid("prompt", "The prompt is empty.")
        return ids

    async def _run(self, is_long: bool, work: Callable[[], _T]) -> _T:
        return await asyncio.to_thread(work) if is_long else work()

    def _encode_now(self, prompt: Prompt) -> list[int]:
        match prompt:
            case Chat():
                return self._tokenizer.encode(self._render(prompt))
            case TextPrompt(text):
                return self._tokenizer.encode(text, add_special_tokens=True)
            case TokenPrompt(token_ids):
                self._check_vocabulary("prompt", token_ids)
                return token_ids

    def _render(self, chat: Chat) -> str:
        messages, tools = chat.messages, chat.tools
        if not self._chat.takes_tools:
            messages, tools = explain_tools(messages, tools), []
        try:
            return self._chat.render(
                [msgspec.to_builtins(message) for message in messages],
                tools=tools,
                variables=chat.template_variables,
            )
        except ChatTemplateError as error:
            raise invalid("messages", str(error)) from None

    def _check_vocabulary(self, param: str, token_ids: Iterable[int]) -> None:
        largest = max(token_ids, default=0)
        if largest >= self._vocab_size:
            raise invalid(
                param, f"Token id {largest} is not in the vocabulary of {self._vocab_size}."
            )


def _seed(asked: ApiRequest) -> int:
    """What tokens are drawn with: as it was where the answer began, else as the client said."""
    if asked.resume is not None:
        return asked.resume.seed
    return secrets.randbits(63) if asked.seed is None else asked.seed
