"""Has the prompts that pass by tokenised, and bound to what replicas tell. Decides nothing.

Nothing waits for it: a prompt is handed over once it is on its way to a replica, or held.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from roost_router.openai_request import EMBEDDINGS_PATH, RoutingFields
from roost_router.tokens.service import TokenCounts, TokenService
from roost_router.tokens.wire import Answer, Job
from roost_router.told_residency import ToldResidency

_log = logging.getLogger(__name__)


class PromptTokens:
    """Between the data path and the tokenizer workers."""

    def __init__(
        self,
        tokenizers: Mapping[str, Path],
        told: ToldResidency,
        is_adapter: Callable[[str], bool],
        *,
        num_workers: int = 1,
    ) -> None:
        """`tokenizers`: folders by model. `is_adapter`: of a model's id."""
        self._told = told
        self._is_adapter = is_adapter
        self._service = TokenService(tokenizers, self._answered, num_workers=num_workers)

    @property
    def counts(self) -> TokenCounts:
        """What became of prompts and workers."""
        return self._service.counts

    @property
    def num_waiting(self) -> int:
        """Prompts that no worker has taken yet."""
        return self._service.num_waiting

    async def start(self) -> None:
        """Start the workers; returns when all are ready. TokenizerStartError."""
        await self._service.start()

    async def stop(self) -> None:
        """End the workers."""
        await self._service.stop()

    def passed(self, path: str, body: bytes, fields: RoutingFields) -> None:
        """A request passes by: have its prompt tokenised if replicas tell of more than is known.

        O(text blocks). Never waits.
        """
        told, model = self._told, fields.model
        if not told.knows(model) or path == EMBEDDINGS_PATH:  # nothing of these stays cached
            return
        knowledge = told.knowledge
        if not knowledge.wants_tokens(fields.chain):
            knowledge.touch(fields.chain)
            return
        adapter = model if self._is_adapter(model) else None
        sizes = knowledge.block_sizes()
        self._service.submit(Job(path, body, model, sizes, adapter), fields)

    def _answered(self, job: Job, fields: Any, answer: Answer) -> None:
        if answer.error:
            _log.debug("a prompt of %s is not tokenised: %s", job.model, answer.error)
            return
        fields.counted_tokens = answer.num_prompt_tokens
        chains = {size: _hashes(packed) for size, packed in answer.token_chains.items()}
        self._told.knowledge.bind(fields.chain, chains, answer.num_tokens)


def _hashes(packed: bytes) -> array[int]:
    return array("Q", packed)
