"""A request inside the engine: what was asked, what has been computed, what it holds.

Plain state, changed by the scheduler only. `token_ids` is prompt and output in one list, since
to the model they are the same: after a preemption, or when an answer that began on another
replica is continued here, output is computed like a prompt.

    WAITING --admit--> RUNNING --finish--> FINISHED
       ^------preempt-----|                    ^
       |------------abort----------------------|

Invariants: a WAITING or FINISHED request holds no blocks; positions below `num_computed` have
their KV in `block_table`; `num_computed < len(token_ids)` while it is not finished.

Not here: text and stop strings (text_stream.py), block accounting (blocks.py), HTTP.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Protocol

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
    min_tokens: int = 0  # no end-of-sequence, stop token or stop string before
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0  # least probability, as a share of the most likely token's
    seed: int = 0  # with the position it fixes the sampled token, see sampling.py
    presence_penalty: float = 0.0  # penalties: logits.py
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()  # applied to text by text_stream.py, not by the scheduler
    stop_token_ids: frozenset[int] = frozenset()  # applied by core.py
    include_stop_in_output: bool = False
    skip_special_tokens: bool = True  # in the text that clients see
    ignore_eos: bool = False  # go on after an end-of-sequence token
    logprobs: int | None = None  # how many alternatives are told with each token; None: nothing


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities at one position, of the model's own distribution."""

    logprob: float  # of the token that was sampled
    top: list[tuple[int, float]]  # the most likely tokens, most likely first


class TokenRules(Protocol):
    """What changes a request's logits before sampling; a function of its tokens. See logits.py."""

    @property
    def failure(self) -> str | None:
        """Why it cannot say what comes next; None: it can."""
        ...

    def apply(self, row: Any, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Change the logits of the token after `token_ids`, in place."""
        ...

    def is_complete(self, token_ids: Sequence[int], num_prompt_tokens: int) -> bool:
        """Whether nothing may follow `token_ids`."""
        ...


class Request:
    """One sequence being generated."""

    def __init__(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        arrival_s: float,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        rules: TokenRules | None = None,
        output_ids: Sequence[int] = (),
        num_owed: int = 0,
    ) -> None:
        """`arrival_s` and `deadline_s` are monotonic. ValueError if the prompt is empty.

        `output_ids` were generated elsewhere and are continued. The last `num_owed` of them are
        generated once more, whatever is sampled: somebody wants what comes with them.
        """
        if not prompt_ids:
            raise ValueError("a prompt has at least one token")
        self.id = request_id
        self.sampling = sampling
        self.arrival_s = arrival_s
        #: Lower runs first, as in vLLM; equal ones in order of arrival.
        self.priority = priority
        #: Still waiting then, it is refused: whoever asked has given up. None: waits for ever.
        self.deadline_s = deadline_s
        #: None: logits are sampled as they are. Belongs to this request alone.
        self.rules = rules
        num_replayed = len(output_ids) - num_owed
        self.token_ids = [*prompt_ids, *output_ids[:num_replayed]]
        #: Tokens from here on are output: penalties, `min_tokens`, grammars and the limit count
        #: them.
        self.num_prompt_tokens = len(prompt_ids)
        #: Tokens it came with.
        self.num_given_tokens = len(self.token_ids)
        #: Tokens that are generated next, whatever is sampled.
        self.owed_ids = tuple(output_ids[num_replayed:])
        self.state = RequestState.WAITING
        self.finish_reason: FinishReason | None = None
        self.block_table: list[int] = []
        self.num_computed = 0
        #: Of the prompt's, how many came from the prefix cache when it was first admitted; None
        #: before that.
        self.num_cached_tokens: int | None = None

    @property
    def num_output_tokens(self) -> int:
        """Number of tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    def settle(self, sampled: int) -> int:
        """The token that is generated next: the one that is owed, else what was sampled."""
        index = len(self.token_ids) - self.num_given_tokens
        return self.owed_ids[index] if index < len(self.owed_ids) else sampled

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
