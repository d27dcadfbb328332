"""Headroom: whether one more request fits the pool beside those that run, now and later.

Puts together what the requests hold (blocks.py), what they are expected to need (admission.py)
and how long their prefills take turns. Blocks that several requests or pins hold are counted
once and taken to stay: whoever comes next shares them too.

A look costs more than a microsecond a running request, as much as scheduling it. A request that
was refused is therefore looked at again only when somebody has given blocks back, or after a few
steps, since what is expected shrinks all the same.

Not here: order of requests, taking blocks (scheduler.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roost_engine.admission import ExpectedOutput, future_peak_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from roost_engine.blocks import BlockPool, Hit
    from roost_engine.request import Request

STEPS_BETWEEN_LOOKS = 8


class Headroom:
    """Judges requests for one scheduler, which tells it of steps, preemptions and releases."""

    def __init__(self, pool: BlockPool, max_step_tokens: int, expected: ExpectedOutput) -> None:
        self._pool = pool
        self._max_step_tokens = max_step_tokens
        self._expected = expected
        self._num_steps = 0
        self._refused: Request | None = None
        self._refused_until_step = 0

    def note_step(self, *, has_preempted: bool, running: Sequence[Request]) -> None:
        """A step begins; those that still run after its preemptions show what to expect."""
        self._num_steps += 1
        if has_preempted:
            self._expected.note_preemption(running)
        else:
            self._expected.note_step()

    def note_release(self) -> None:
        """Somebody gave blocks back, so who was refused may fit now."""
        self._refused = None

    def was_refused(self, request: Request) -> bool:
        """Whether a request need not be looked at yet."""
        return self._refused is request and self._num_steps < self._refused_until_step

    def refuse(self, request: Request) -> None:
        """Note that a request does not fit."""
        self._refused = request
        self._refused_until_step = self._num_steps + STEPS_BETWEEN_LOOKS

    def fits(
        self,
        request: Request,
        hit: Hit,
        running: Sequence[Request],
        prefilling: Sequence[Request],
    ) -> bool:
        """Whether the peak ahead fits the pool if this request starts with this hit.

        `prefilling` are those of `running` that do not decode yet.
        O(running · log running).
        """
        pool, remaining_tokens = self._pool, self._expected.remaining_tokens
        delay_steps = self._prefill_steps(request, hit, running, prefilling)
        # The beginning of the hit that others hold: whoever holds its last block shares all of it.
        num_held = len(hit.blocks) - pool.num_free_among(hit.blocks)
        last_held = hit.blocks[num_held - 1] if num_held else -1

        demands: list[tuple[int, int, int]] = []
        num_own = 0
        for other in running:
            table = other.block_table
            num_shared = pool.num_shared(table)
            if num_shared < num_held <= len(table) and table[num_held - 1] == last_held:
                num_shared = num_held  # its own until now
            own = len(table) - num_shared
            num_own += own
            steps, num_tokens = remaining_tokens(other), len(other.token_ids)
            if other.num_computed + 1 < num_tokens:
                steps += delay_steps
            demands.append((steps, num_tokens, own))
        num_tokens = len(request.token_ids)
        own = -(-num_tokens // pool.block_size) - num_held
        demands.append((remaining_tokens(request) + delay_steps, num_tokens, own))
        num_staying = pool.num_blocks - pool.num_free - num_own
        return num_staying + future_peak_blocks(demands, pool.block_size) <= pool.num_blocks

    def _prefill_steps(
        self,
        request: Request,
        hit: Hit,
        running: Sequence[Request],
        prefilling: Sequence[Request],
    ) -> int:
        """Steps until the last prefill under way is done; each may hold its blocks so much longer.

        At most: decodes take a token of each step's budget, and nobody else starts unless the peak
        is looked at again.
        """
        backlog = request.num_uncomputed - len(hit) * self._pool.block_size
        backlog += sum(other.num_uncomputed for other in prefilling)
        budget = max(1, self._max_step_tokens - len(running) - 1)
        return (backlog - 1) // budget
