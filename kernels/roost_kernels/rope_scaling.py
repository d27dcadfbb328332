"""What models trained further for long contexts divide their rotary frequencies by.

Plain arithmetic without torch, so that a model can be loaded where torch is not. How the
divisors are used: rope.py.
"""

from __future__ import annotations

import math


def llama3_divisors(
    head_dim: int,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position: int,
) -> tuple[float, ...]:
    """Divisors of Llama 3.1's scaling (`rope_type: llama3` in Hugging Face configs).

        turns[i]   = original_max_position · theta^(-2i/d) / 2π    in the context trained first
        blend      = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        divisor[i] = 1 / ((1 - blend) / factor + blend)            blend cut off to 0 .. 1

    Fast frequencies stay, slow ones are divided by `factor`, with a smooth passage between.
    """
    divisors: list[float] = []
    for i in range(head_dim // 2):
        turns = original_max_position * theta ** (-2 * i / head_dim) / (2 * math.pi)
        blend = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        blend = min(max(blend, 0.0), 1.0)
        divisors.append(1 / ((1 - blend) / factor + blend))
    return tuple(divisors)


def linear_divisors(head_dim: int, factor: float) -> tuple[float, ...]:
    """Divisors of position interpolation (`rope_type: linear`): `factor` for every frequency.

    Source: Chen et al., "Extending Context Window of Large Language Models via Positional
    Interpolation" (2023).
    """
    return (factor,) * (head_dim // 2)
