"""A request inside the engine: what was asked, what has been computed, what it holds.

Plain state, changed by the scheduler only. `token_ids` is prompt and output in one list, since
to the model they are the same: after a preemption the output is recomputed like a prompt.

    WAITING --admit--> RUNNING --finish--> FINISHED
       ^------preempt-----|                    ^
       |------------abort----------------------|

Invariants: a WAITING or FINISHED request holds no blocks; positions below `num_computed` have
their KV in `block_table`; `num_computed < len(token_ids)` while it is not finished.

Not here: text and stop strings (text_stream.py), block accounting (blocks.py), HTTP.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence


class FinishReason(enum.StrEnum):
    """Why a request ended, in OpenAI's words where it has them."""

    STOP = "stop"  # end-of-sequence token or stop string
    LENGTH = "length"  # max_tokens
    ABORT = "abort"  # the client went away
    ERROR = "error"  # the engine failed; clients see an error instead


class RequestState(enum.Enum):
    """Where a request stands; see the diagram above."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen and when to stop. Ranges are checked where requests are parsed."""

    max_tokens: int
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0: no limit
    seed: int = 0  # with the position it fixes the sampled token, see sampling.py
    stop: tuple[str, ...] = ()  # applied to text by text_stream.py, not by the scheduler
    ignore_eos: bool = False  # go on after an end-of-sequence token


class Request:
    """One sequence being generated."""

    def __init__(
        self, request_id: str, prompt_ids: Sequence[int], sampling: SamplingParams, arrival_s: float
    ) -> None:
        """`arrival_s` is monotonic. ValueError if the prompt is empty."""
        if not prompt_ids:
            raise ValueError("a prompt has at least one token")
        self.id = request_id
        self.sampling = sampling
        self.arrival_s = arrival_s
        self.token_ids = list(prompt_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.state = RequestState.WAITING
        self.finish_reason: FinishReason | None = None
        self.block_table: list[int] = []
        self.num_computed = 0
        #: Tokens taken from the prefix cache at the first admission; None before it.
        self.num_cached_tokens: int | None = None

    @property
    def num_output_tokens(self) -> int:
        """Number of tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV is missing: 1 for a decode, more while prefilling."""
        return len(self.token_ids) - self.num_computed

    def __repr__(self) -> str:
        return (
            f"<Request {self.id} {self.state.name} prompt={self.num_prompt_tokens} "
            f"output={self.num_output_tokens} computed={self.num_computed} "
            f"blocks={len(self.block_table)}>"
        )
