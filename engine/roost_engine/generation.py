"""The answer to one request while it comes into being: tokens to what a client may see.

    tokens --detokenise--> text --stop strings--> text to show --tool parser--> content, calls

A Generation is one choice; Generations are all choices of a request, merged as they come.

Log probabilities follow the text: a token is told of once the first of its characters is shown,
so what stop strings hold back or cut away is not told of. The token that ends an answer is not
part of it.

Invariant: whoever gets Generations closes them; closing one that is not finished aborts the
request in the engine and frees its blocks.

Not here: where requests come from (frontend.py), what an answer looks like (responses.py).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from roost_engine.engine_errors import EngineError
from roost_engine.logprobs_json import ShownToken
from roost_engine.request import FinishReason
from roost_engine.responses import Piece, Usage
from roost_engine.text_stream import TextStream
from roost_engine.tokenizer import Detokenizer
from roost_engine.tool_parser import Parsed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from roost_engine.chat_api import ToolUse
    from roost_engine.core import EngineCore
    from roost_engine.metrics import RequestTimes
    from roost_engine.request import TokenLogprobs
    from roost_engine.token_stream import Delta, TokenStream
    from roost_engine.tokenizer import Tokenizer
    from roost_engine.tool_parser import ToolParser


class Generation:
    """One choice. Close it in any case."""

    def __init__(
        self,
        core: EngineCore,
        stream: TokenStream,
        tokenizer: Tokenizer,
        times: RequestTimes,
        tools: tuple[ToolUse, ToolParser] | None = None,
    ) -> None:
        sampling = stream.request.sampling
        # The tags around tool calls are special tokens in some models.
        skips_special = sampling.skip_special_tokens and tools is None
        self.num_completion_tokens = 0
        self._core = core
        self._stream = stream
        self._tokenizer = tokenizer
        self._times = times
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skips_special)
        self._text = TextStream(sampling.stop, shows_stop=sampling.include_stop_in_output)
        self._use: ToolUse | None = None
        self._parser: ToolParser | None = None
        if tools is not None:
            self._use, self._parser = tools
        self._has_calls = False
        self._num_received = self._num_shown = 0  # characters
        self._hidden: list[ShownToken] = []  # not shown yet
        self._is_over = False

    @property
    def usage(self) -> Usage:
        """Tokens so far; `cached_tokens` is known from the first piece on."""
        request = self._stream.request
        return Usage(
            request.num_prompt_tokens, self.num_completion_tokens, request.num_cached_tokens or 0
        )

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it comes; the first piece comes with the first token.

        EngineError if the engine fails before the end.
        """
        try:
            async for delta in self._stream:
                self._times.note_tokens(len(delta.token_ids), time.monotonic())
                piece = self._read(delta)
                if piece.finish_reason is not None:
                    self._end(delta.finish_reason or FinishReason.STOP)
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
        sampling = self._stream.request.sampling
        text, end_token = "", self._end_token(delta)
        for index, token_id in enumerate(delta.token_ids):
            self.num_completion_tokens += 1
            is_end = end_token is not None and index == len(delta.token_ids) - 1
            if is_end and not sampling.include_stop_in_output:
                break
            if delta.logprobs:
                self._hidden.append(self._show(token_id, delta.logprobs[index]))
            text += self._push(self._detokenizer.push(token_id))
            if self._text.stopped:
                return self._last(text, FinishReason.STOP, self._text.matched)
        if delta.finish_reason is None:
            piece = self._piece(text)
            is_done = self._parser is not None and self._parser.is_done
            return self._finish(piece, FinishReason.STOP, None) if is_done else piece
        text += self._push(self._detokenizer.flush())
        if not self._text.stopped:
            text += self._text.flush()
        stop_reason = end_token if end_token in sampling.stop_token_ids else self._text.matched
        reason = FinishReason.STOP if self._text.stopped else delta.finish_reason
        return self._last(text, reason, stop_reason)

    def _push(self, piece: str) -> str:
        """Take text that came; return what of it all may be shown."""
        self._num_received += len(piece)
        if self.num_completion_tokens <= self._stream.request.sampling.min_tokens:
            return self._text.push_unchecked(piece)
        return self._text.push(piece)

    def _end_token(self, delta: Delta) -> int | None:
        """The token that ended the answer without being part of it."""
        if delta.finish_reason is not FinishReason.STOP or not delta.token_ids:
            return None
        last, sampling = delta.token_ids[-1], self._stream.request.sampling
        is_eos = last in self._tokenizer.eos_token_ids and not sampling.ignore_eos
        return last if is_eos or last in sampling.stop_token_ids else None

    def _show(self, token_id: int, logprobs: TokenLogprobs) -> ShownToken:
        spell = self._tokenizer.spelled_bytes
        top = [(spell(other), logprob) for other, logprob in logprobs.top]
        return ShownToken(spell(token_id), logprobs.logprob, top, self._num_received)

    def _piece(self, text: str, *, is_last: bool = False) -> Piece:
        self._num_shown += len(text)
        parsed = Parsed(text)
        if self._parser is not None:
            parsed = self._parser.push(text)
            if is_last:
                rest = self._parser.flush()
                parsed = Parsed(parsed.content + rest.content, (*parsed.deltas, *rest.deltas))
        self._has_calls = self._has_calls or bool(parsed.deltas)
        return Piece(parsed.content, parsed.deltas, self._shown_tokens(is_last=is_last))

    def _shown_tokens(self, *, is_last: bool) -> list[ShownToken]:
        """Tokens that have become visible; at the end also those without any text."""
        limit = self._num_shown + (1 if is_last and not self._text.stopped else 0)
        shown = [token for token in self._hidden if token.text_offset < limit]
        self._hidden = self._hidden[len(shown) :]
        return shown

    def _last(self, text: str, reason: FinishReason, stop_reason: str | int | None) -> Piece:
        return self._finish(self._piece(text, is_last=True), reason, stop_reason)

    def _finish(self, piece: Piece, reason: FinishReason, stop_reason: str | int | None) -> Piece:
        # OpenAI and vLLM say "stop" for a function that was named by the client.
        is_call = self._has_calls and self._use is not None and self._use.choice != "named"
        word = "tool_calls" if is_call and reason is FinishReason.STOP else reason.value
        return Piece(piece.text, piece.tool_deltas, piece.tokens, word, stop_reason)

    def _end(self, reason: FinishReason) -> None:
        self._is_over = True
        # After a stop string or a disconnect the engine is still at it; else this does nothing.
        self._core.abort(self._stream.request.id)
        self._times.note_end(reason, time.monotonic())


class Generations:
    """All choices of one request, `n` for each prompt. Close them in any case."""

    def __init__(self, choices: Sequence[Generation], n: int) -> None:
        self.choices = choices
        self._n = n
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def usage(self) -> Usage:
        """Tokens so far. What a prompt's first choice found in the cache is what was cached."""
        usages = [choice.usage for choice in self.choices]
        firsts = usages[:: self._n]
        return Usage(
            sum(usage.prompt_tokens for usage in firsts),
            sum(usage.completion_tokens for usage in usages),
            sum(usage.cached_tokens for usage in firsts),
        )

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces with the index of their choice, in the order in which they come; call it once.

        EngineError if the engine fails one of them: there is no answer with a choice missing.
        """
        if len(self.choices) == 1:
            async for piece in self.choices[0].pieces():
                yield 0, piece
            return
        arrived: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self._tasks = [
            asyncio.create_task(_collect(index, choice, arrived))
            for index, choice in enumerate(self.choices)
        ]
        num_left = len(self.choices)
        while num_left:
            index, came = await arrived.get()
            if isinstance(came, Exception):
                raise came
            num_left -= came.finish_reason is not None
            yield index, came

    def close(self) -> None:
        """Abort all choices that have not ended. Idempotent."""
        for task in self._tasks:
            task.cancel()
        for choice in self.choices:
            choice.close()


async def _collect(
    index: int, choice: Generation, arrived: asyncio.Queue[tuple[int, Piece | Exception]]
) -> None:
    try:
        async for piece in choice.pieces():
            arrived.put_nowait((index, piece))
    # Task boundary: whoever reads the queue raises it again.
    except Exception as error:  # noqa: BLE001
        arrived.put_nowait((index, error))
