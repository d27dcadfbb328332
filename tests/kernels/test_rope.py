"""apply_rope against its reference, and the properties a rotation has."""

import pytest
import torch

from roost_kernels.rope import apply_rope, apply_rope_reference, build_rope_table
from roost_kernels.rope_scaling import llama3_divisors


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("theta", [10000.0, 100000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_equals_the_reference(head_dim: int, theta: float) -> None:
    positions = torch.tensor([0, 1, 2, 63, 500])
    cos, sin = build_rope_table(head_dim, 501, theta, torch.float32)
    x = _random(5, 3, head_dim)

    actual = apply_rope(x, cos[positions], sin[positions])

    # fp32 angles of a few hundred radians are good to about 1e-5.
    expected = apply_rope_reference(x, positions, theta)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)


def test_divided_frequencies_equal_the_reference() -> None:
    divisors = llama3_divisors(
        64, 500000.0, factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position=8192
    )
    positions = torch.tensor([0, 1, 2, 63, 500])
    cos, sin = build_rope_table(64, 501, 500000.0, torch.float32, divisors)
    x = _random(5, 3, 64)

    actual = apply_rope(x, cos[positions], sin[positions])

    expected = apply_rope_reference(x, positions, 500000.0, divisors)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)
    assert not torch.allclose(actual, apply_rope_reference(x, positions, 500000.0), atol=1e-2)


def test_llama3_divisors_equal_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        head_dim=64, max_position_embeddings=131072, rope_parameters=rope | scaling
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)

    divisors = llama3_divisors(64, 500000.0, original_max_position=8192, **scaling)

    torch.testing.assert_close(
        plain / torch.tensor(divisors, dtype=torch.float64), frequencies.double(), rtol=1e-5, atol=0
    )


def test_position_zero_changes_nothing() -> None:
    cos, sin = build_rope_table(64, 1, 10000.0, torch.float32)
    x = _random(1, 9, 64)

    assert torch.equal(x, apply_rope(x, cos, sin))


def test_a_product_depends_on_the_distance_only() -> None:
    cos, sin = build_rope_table(16, 64, 10000.0, torch.float32)
    q, k = _random(2, 1, 16)
    q, k = q.unsqueeze(0), k.unsqueeze(0)

    def product(q_position: int, k_position: int) -> torch.Tensor:
        at_q = apply_rope(q, cos[[q_position]], sin[[q_position]])
        at_k = apply_rope(k, cos[[k_position]], sin[[k_position]])
        return (at_q * at_k).sum()

    torch.testing.assert_close(product(7, 3), product(44, 40), atol=1e-5, rtol=1e-5)


def test_the_table_has_the_dtype_asked_for() -> None:
    cos, sin = build_rope_table(8, 4, 10000.0, torch.bfloat16)

    assert (torch.bfloat16, (4, 4)) == (cos.dtype, tuple(cos.shape))
    assert (torch.bfloat16, (4, 4)) == (sin.dtype, tuple(sin.shape))
