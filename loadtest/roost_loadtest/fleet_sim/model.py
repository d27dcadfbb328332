"""How long a replica's steps take: the formula of the simulated replicas. Pure.

A step computes up to `chunk_tokens` prompt tokens and one token of every running stream:

    chunk of u tokens after c computed ones    a·u + b·(u·c + u²/2)
    decode of n streams                        ov + a·n + g·(sum of their contexts)

a   token_s     arithmetic of a token
b   pair_s      attention of a prompt: a pair of query and key
ov  step_s      reading the weights once; a chunk beside it hides nothing of it
g   context_s   reading a token's keys and values for one new token

A prompt's pairs add up to the same however it is cut into chunks, so its prefill has one closed
form. So have k steps with the same streams, whose contexts grow by one token each a step:

    k·(ov + a·n) + g·(S·k + n·k·(k-1)/2)          S: sum of contexts in the first of them

Defaults are those of an 8 B model in 16 bits on one H100 (989 TFLOP/s and 3.35 TB/s by its data
sheet, of which 40 % and 80 % are reached): 16 GFLOP a token, 0.5 MFLOP a pair, 16 GB of weights,
128 KiB of keys and values a token.
"""

from __future__ import annotations

from math import ceil, sqrt

import msgspec


class StepTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Coefficients, in seconds; see the module."""

    token_s: float = 40e-6
    pair_s: float = 1.3e-9
    step_s: float = 6e-3
    context_s: float = 50e-9
    chunk_tokens: int = 2048  # prompt tokens of a step

    def at_speed(self, speed: float) -> StepTimes:
        """Those of a replica that does everything `speed` times as fast."""
        return StepTimes(
            token_s=self.token_s / speed,
            pair_s=self.pair_s / speed,
            step_s=self.step_s / speed,
            context_s=self.context_s / speed,
            chunk_tokens=self.chunk_tokens,
        )

    def prefill_s(self, num_tokens: int, num_before: int) -> float:
        """Seconds for `num_tokens` of a prompt after `num_before` computed or cached ones."""
        pairs = num_tokens * num_before + num_tokens * num_tokens / 2
        return self.token_s * num_tokens + self.pair_s * pairs

    def decode_s(self, num_steps: int, num_streams: int, context_tokens: int) -> float:
        """Seconds that `num_steps` steps spend on the same `num_streams` streams.

        `context_tokens`: the sum of their contexts in the first of these steps.
        """
        if not num_streams:
            return 0.0
        grown = num_streams * num_steps * (num_steps - 1) / 2
        each = self.step_s + self.token_s * num_streams
        return num_steps * each + self.context_s * (context_tokens * num_steps + grown)

    def steps_begun(self, elapsed_s: float, num_streams: int, context_tokens: int) -> int:
        """Steps of decode only (at least one) that have begun after `elapsed_s` seconds. O(1).

        The inverse of `decode_s`: the fewest steps that take at least so long.
        """
        square = self.context_s * num_streams / 2
        linear = self.step_s + self.token_s * num_streams + self.context_s * context_tokens - square
        if square > 0.0:
            root = sqrt(linear * linear + 4.0 * square * elapsed_s)
            steps = 2.0 * elapsed_s / (linear + root)  # the stable form of (root - linear) / 2a
        else:
            steps = elapsed_s / linear
        return max(1, ceil(steps - 1e-9))
