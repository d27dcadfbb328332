"""The answer to one request while it comes into being: engine and transcripts put together.

A Generation is one choice; Generations are all choices of a request, merged as they come.

Invariant: whoever gets Generations closes them; closing one that is not finished aborts the
request in the engine and frees its blocks.

Not here: where requests come from (frontend.py), what tokens mean to a client (transcript.py),
what an answer looks like (responses.py).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from roost_engine.engine_errors import EngineError
from roost_engine.request import FinishReason
from roost_engine.responses import Piece, Usage
from roost_engine.tool_calls import call_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from roost_engine.core import EngineCore
    from roost_engine.metrics import RequestTimes
    from roost_engine.request import Request
    from roost_engine.token_stream import TokenStream
    from roost_engine.transcript import Transcript


class Generation:
    """One choice. Close it in any case."""

    def __init__(
        self, core: EngineCore, stream: TokenStream, transcript: Transcript, times: RequestTimes
    ) -> None:
        self.transcript = transcript
        self._core = core
        self._stream = stream
        self._times = times
        self._is_over = False

    @property
    def request(self) -> Request:
        """What the engine computes for it."""
        return self._stream.request

    @property
    def usage(self) -> Usage:
        """Tokens so far; `cached_tokens` is known from the first piece on."""
        request = self.request
        return Usage(
            request.num_prompt_tokens,
            self.transcript.num_completion_tokens,
            request.num_cached_tokens or 0,
        )

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it comes; the first piece comes with the first token.

        EngineError if the engine fails before the end.
        """
        try:
            async for delta in self._stream:
                self._times.note_tokens(len(delta.token_ids), time.monotonic())
                pieces = self.transcript.read(delta)
                if pieces[-1].finish_reason is not None:
                    self._end(delta.finish_reason or FinishReason.STOP)
                for piece in pieces:
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

    def _end(self, reason: FinishReason) -> None:
        self._is_over = True
        # After a stop string or a disconnect the engine is still at it; else this does nothing.
        self._core.abort(self.request.id)
        self._times.note_end(reason, time.monotonic())


class Generations:
    """All choices of one request, `n` for each prompt. Close them in any case."""

    def __init__(self, choices: Sequence[Generation], n: int) -> None:
        self.choices = choices
        self._n = n
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def seed(self) -> int:
        """What the first choice is drawn with."""
        return self.choices[0].request.sampling.seed

    @property
    def call_id(self) -> str:
        """What ids of tool calls begin with: of one prompt and seed always the same."""
        request = self.choices[0].request
        prompt_ids = request.token_ids[: request.num_prompt_tokens]
        return call_id(prompt_ids, request.sampling.seed)

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
