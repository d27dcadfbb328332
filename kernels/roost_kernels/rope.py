"""Rotary position embedding, rotate-half layout (transformers' Llama).

    angle[p, i] = p · theta^(-2i/d)                                  i = 0 .. d/2 - 1
    y[i]        = x[i]·cos(angle) - x[i + d/2]·sin(angle)
    y[i + d/2]  = x[i + d/2]·cos(angle) + x[i]·sin(angle)

Models trained further for long contexts divide some frequencies, the slow ones most:

    angle[p, i] = p · theta^(-2i/d) / divisor[i]

Source: Su et al., "RoFormer" (2021); for the divisors see rope_scaling.py. llama.cpp pairs
neighbours (2i, 2i+1) instead; its weights must have their rows restored first (the engine's
loader does).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def build_rope_table(
    head_dim: int,
    num_positions: int,
    theta: float,
    dtype: torch.dtype,
    divisors: Sequence[float] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each (num_positions, head_dim / 2) in `dtype`, computed in fp32.

    `divisors`: head_dim / 2 of them, or none at all. Only half of head_dim is stored, the other
    half is equal: 2 MB for 8,192 positions of 64.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    positions = torch.arange(num_positions, dtype=torch.float32)
    frequencies = 1.0 / theta**exponents
    if divisors:
        frequencies /= torch.tensor(divisors)
    angles = torch.outer(positions, frequencies)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x` (num_tokens, num_heads, head_dim); returns a new tensor.

    `cos`, `sin`: rows of the table for each token, (num_tokens, head_dim / 2), dtype of `x`.
    Q and K may be passed as one tensor with their heads side by side.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def apply_rope_reference(
    x: torch.Tensor, positions: torch.Tensor, theta: float, divisors: Sequence[float] = ()
) -> torch.Tensor:
    """The same by complex multiplication in fp64, straight from the positions (num_tokens,)."""
    half = x.shape[-1] // 2
    exponents = torch.arange(half, dtype=torch.float64) * 2 / x.shape[-1]
    frequencies = theta**-exponents / torch.tensor(divisors or [1.0], dtype=torch.float64)
    angles = torch.outer(positions.double(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    rotated = torch.complex(x[..., :half].double(), x[..., half:].double()) * turns
    return torch.cat((rotated.real, rotated.imag), dim=-1).to(x.dtype)
