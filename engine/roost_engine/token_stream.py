"""Tokens of one request on their way from the engine to whoever reads them. Event loop only.

Invariant: a stream has exactly one end, a finish reason or an error; what came before an error is
delivered first.

Not here: who fills it (core.py), text (generation.py).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from roost_engine.request import FinishReason, Request, TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from roost_engine.engine_errors import EngineError


class Delta(msgspec.Struct, frozen=True):
    """Tokens that came since the last one; `finish_reason` is set on the last delta."""

    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[TokenLogprobs] = []


class TokenStream:
    """Tokens of one request, as an asynchronous iterator of Delta. Event loop only."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish_reason: FinishReason | None = None
        self._error: EngineError | None = None
        self._arrived = asyncio.Event()
        self._is_over = False

    def put(
        self,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        logprobs: TokenLogprobs | None = None,
    ) -> None:
        """Add tokens; called by the core through the loop."""
        self._token_ids += token_ids
        if logprobs is not None:
            self._logprobs.append(logprobs)
        self._finish_reason = finish_reason
        self._arrived.set()

    def fail(self, error: EngineError) -> None:
        """End with an error; tokens that came before are still delivered first."""
        self._error = error
        self._arrived.set()

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> Delta:
        """Next tokens. EngineError if the engine failed before the request was finished."""
        if self._is_over:
            raise StopAsyncIteration
        await self._arrived.wait()
        self._arrived.clear()
        if self._token_ids or self._finish_reason is not None:
            delta = Delta(self._token_ids, self._finish_reason, self._logprobs)
            self._token_ids, self._logprobs = [], []
            self._is_over = delta.finish_reason is not None
            if self._error is not None:
                self._arrived.set()
            return delta
        self._is_over = True
        assert self._error is not None
        raise self._error
