"""Admission: how many blocks the running requests will need at the worst moment ahead of them.

Requests grow by a token a step and give everything back when they end. If each ends when it is
expected to, the most blocks are held just before one of them ends. With requests in descending
order of their remaining steps r, those that are alive in the last step of request i are
0 .. i, and each has grown by r_i - 1 tokens:

    peak = max over i of  sum over j <= i of  own_j + growth_j(r_i - 1)
    growth_j(s) = ceil((tokens_j + s) / block_size) - ceil(tokens_j / block_size)

lightllm's estimator (server/router/req_queue/chunked_prefill/impl.py), in blocks instead of
tokens. A request is admitted only if the peak with it fits the pool.

The end of a request is a guess. `max_tokens` is what clients may get, rarely what they do get,
and many do not set it: reserving it whole leaves most of the pool empty. Expected is therefore a
fraction of what is left of it, as SGLang's new_token_ratio: it shrinks a little each step, and
jumps up to what was seen when the guess was so wrong that a request had to be preempted.
Requests that ignore the end of sequence are known to use all of it.

Measured in the twin (simulated.py), 300 requests at once in a pool of 16,384 tokens, generated
tokens a second, where `max_tokens` is (unset, outputs of 150 | unset, of 1,200 | exact):

    reserving max_tokens whole              130 | 206 | 414
    one free block for each that runs       229 | 506 | 390   preempts 6 | 374 | 64 times
    the peak of the expected                227 | 617 | 414   preempts 0 |   3 |  0 times

Not here: which blocks a request shares (headroom.py), who is admitted (scheduler.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from roost_engine.request import Request


#: What one request holds and how long it will go on:
#:   steps until it ends, the coming one included, at least 1;
#:   tokens that its blocks cover;
#:   blocks that are freed when it ends.
Demand = tuple[int, int, int]


def future_peak_blocks(demands: Iterable[Demand], block_size: int) -> int:
    """The most blocks that `demands` hold together until the last of them ends.

    Blocks that several of them share are not freed by the end of one and are to be added by the
    caller, once. Exact if each grows by a token a step; O(n log n).
    """
    # offsets[e] counts requests whose last block holds e + 1 tokens: after s further tokens,
    # with s = blocks * block_size + rest, the block is full for those with e + rest >= block_size.
    offsets = [0] * block_size
    own = peak = 0
    longest_first = sorted(demands, reverse=True)
    for alive, (remaining_steps, num_tokens, own_blocks) in enumerate(longest_first, start=1):
        own += own_blocks
        offsets[(num_tokens - 1) % block_size] += 1
        blocks, rest = divmod(remaining_steps - 1, block_size)
        peak = max(peak, own + alive * blocks + (sum(offsets[block_size - rest :]) if rest else 0))
    return peak


#: SGLang's defaults (SGLANG_INIT_NEW_TOKEN_RATIO 0.7, _MIN_NEW_TOKEN_RATIO_FACTOR 0.14 of it,
#: _NEW_TOKEN_RATIO_DECAY_STEPS 600, _RETRACT_DECODE_STEPS 20).
INITIAL_FRACTION = 0.7
LEAST_FRACTION = 0.7 * 0.14
DECAY_STEPS = 600
LOOKAHEAD_TOKENS = 20


class ExpectedOutput:
    """What fraction of `max_tokens` requests are expected to generate."""

    def __init__(self, initial: float = INITIAL_FRACTION, least: float = LEAST_FRACTION) -> None:
        """Between `least` and 1; with both at 1 nothing is ever preempted, and few run at once."""
        self.fraction = initial
        self._least = least
        self._decay = max(0.0, initial - least) / DECAY_STEPS

    def remaining_tokens(self, request: Request) -> int:
        """Tokens that this request is expected to generate from now on, at least 1."""
        sampling = request.sampling
        num_output_tokens = len(request.token_ids) - request.num_prompt_tokens
        most = max(1, sampling.max_tokens - num_output_tokens)
        if sampling.ignore_eos or most <= LOOKAHEAD_TOKENS:
            return most
        return max(LOOKAHEAD_TOKENS, int(most * self.fraction))

    def note_step(self) -> None:
        """A step found memory for everybody: expect a little less."""
        self.fraction = max(self._least, self.fraction - self._decay)

    def note_preemption(self, running: Iterable[Request]) -> None:
        """Too little was expected: expect what those that go on have shown, and a bit more."""
        generated = allowed = 0
        for request in running:
            generated += request.num_output_tokens + LOOKAHEAD_TOKENS
            allowed += request.sampling.max_tokens
        self.fraction = max(self.fraction, min(1.0, generated / max(1, allowed)))
