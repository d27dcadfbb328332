"""Front end: from a valid API request to text, through tokenizer and engine core.

    ApiRequest --template, encode--> token ids --core--> tokens --detokenise, stop strings--> text

Rendering and encoding of long prompts happen in a worker thread: 16 KB cost about 6 ms, which
no other stream should wait for. What cannot fit the context whatever its tokens are is refused
before either.

Invariant: whoever gets a Generation closes it; closing one that is not finished aborts the
request in the engine and frees its blocks.

Not here: what a body looks like (openai_api.py, responses.py), HTTP (server.py).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING

import msgspec

from roost_engine.chat import ChatTemplateError
from roost_engine.core import EngineError
from roost_engine.openai_api import ApiError, Chat, TextPrompt, TokenPrompt, check_context
from roost_engine.request import FinishReason, Request, SamplingParams
from roost_engine.responses import Usage
from roost_engine.text_stream import TextStream
from roost_engine.tokenizer import Detokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from roost_engine.chat import ChatTemplate
    from roost_engine.core import Delta, EngineCore, TokenStream
    from roost_engine.metrics import EngineMetrics, RequestTimes
    from roost_engine.openai_api import ApiRequest, Message
    from roost_engine.tokenizer import Tokenizer

# Characters above which a prompt is encoded in a worker thread; below it the hop costs more.
_LONG_PROMPT_CHARACTERS = 4096


class Piece(msgspec.Struct, frozen=True):
    """Text that may be shown, possibly none; `finish_reason` is set on the last piece."""

    text: str
    finish_reason: FinishReason | None


class Generation:
    """The answer to one request while it comes into being. Close it in any case."""

    def __init__(
        self, core: EngineCore, stream: TokenStream, tokenizer: Tokenizer, times: RequestTimes
    ) -> None:
        self.num_completion_tokens = 0
        self._core = core
        self._stream = stream
        self._times = times
        self._detokenizer = Detokenizer(tokenizer)
        self._text = TextStream(stream.request.sampling.stop)
        self._is_over = False

    @property
    def usage(self) -> Usage:
        """Tokens so far; `cached_tokens` is known from the first piece on."""
        request = self._stream.request
        return Usage(
            request.num_prompt_tokens, self.num_completion_tokens, request.num_cached_tokens or 0
        )

    async def pieces(self) -> AsyncIterator[Piece]:
        """The text as it comes; the first piece comes with the first token.

        EngineError if the engine fails before the end.
        """
        try:
            async for delta in self._stream:
                self._times.note_tokens(len(delta.token_ids), time.monotonic())
                piece = self._read(delta)
                if piece.finish_reason is not None:
                    self._end(piece.finish_reason)
                yield piece
                if self._is_over:
                    return
        except EngineError:
            self._end(FinishReason.ERROR)
            raise

    def close(self) -> None:
        """Abort the request unless it has ended. Idempotent."""
        if not self._is_over:
            self._end(FinishReason.ABORT)

    def _read(self, delta: Delta) -> Piece:
        text = ""
        for index, token_id in enumerate(delta.token_ids):
            self.num_completion_tokens += 1
            is_last = index == len(delta.token_ids) - 1
            if is_last and delta.finish_reason is FinishReason.STOP:
                break  # the end-of-sequence token itself is not text
            text += self._text.push(self._detokenizer.push(token_id))
            if self._text.stopped:
                return Piece(text, FinishReason.STOP)
        if delta.finish_reason is None:
            return Piece(text, None)
        text += self._text.push(self._detokenizer.flush())
        if self._text.stopped:
            return Piece(text, FinishReason.STOP)
        return Piece(text + self._text.flush(), delta.finish_reason)

    def _end(self, reason: FinishReason) -> None:
        self._is_over = True
        # After a stop string or a disconnect the engine is still at it; else this does nothing.
        self._core.abort(self._stream.request.id)
        self._times.note_end(reason, time.monotonic())


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

    async def start(self, asked: ApiRequest, request_id: str) -> Generation:
        """Queue a request. ApiError if it is refused, EngineError if the engine cannot take it.

        The caller must close the generation.
        """
        arrival_s = time.monotonic()
        self.check_model(asked.model)
        self.core.check_accepts()
        fewest_tokens = self._fewest_tokens(asked)
        if fewest_tokens >= self.max_model_len:
            check_context(asked, fewest_tokens, self.max_model_len, is_exact=False)  # refuses
        prompt_ids = await self._encode(asked)
        max_tokens = check_context(asked, len(prompt_ids), self.max_model_len)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
            stop=asked.stop,
            ignore_eos=asked.ignore_eos,
        )
        stream = self.core.submit(Request(request_id, prompt_ids, sampling, arrival_s))
        times = self.metrics.start_request(arrival_s)
        return Generation(self.core, stream, self._tokenizer, times)

    def _fewest_tokens(self, asked: ApiRequest) -> int:
        """Number of tokens that the prompt has at least, known without rendering or encoding.

        Every message of a chat takes a token, if only to mark its turn.
        """
        match asked.prompt:
            case Chat(messages):
                text = "".join(message.content for message in messages)
                return max(len(messages), self._tokenizer.fewest_tokens(text))
            case TextPrompt(text):
                return self._tokenizer.fewest_tokens(text)
            case TokenPrompt(token_ids):
                return len(token_ids)

    async def _encode(self, asked: ApiRequest) -> list[int]:
        """Token ids of the prompt, at least one."""
        if asked.num_prompt_characters > _LONG_PROMPT_CHARACTERS:
            ids = await asyncio.to_thread(self._encode_now, asked)
        else:
            ids = self._encode_now(asked)
        if not ids:
            raise ApiError(400, "The prompt is empty.", param="prompt", code="invalid_value")
        return ids

    def _encode_now(self, asked: ApiRequest) -> list[int]:
        match asked.prompt:
            case Chat(messages):
                return self._tokenizer.encode(self._render(messages))
            case TextPrompt(text):
                return self._tokenizer.encode(text, add_special_tokens=True)
            case TokenPrompt(token_ids):
                self._check_token_ids(token_ids)
                return token_ids

    def _render(self, messages: list[Message]) -> str:
        try:
            return self._chat.render([msgspec.structs.asdict(message) for message in messages])
        except ChatTemplateError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from None

    def _check_token_ids(self, token_ids: list[int]) -> None:
        largest = max(token_ids)
        if largest >= self._vocab_size:
            raise ApiError(
                400,
                f"Token id {largest} is not in the vocabulary of {self._vocab_size}.",
                param="prompt",
                code="invalid_value",
            )
