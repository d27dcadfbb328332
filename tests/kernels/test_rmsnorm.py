"""rms_norm against its reference, and its independence of the other rows."""

import pytest
import torch

from roost_kernels.rmsnorm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("hidden", [8, 576])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_equals_the_reference(
    num_tokens: int, hidden: int, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    weight = torch.randn(hidden, generator=generator).to(dtype)

    actual = rms_norm(x, weight, 1e-5)

    torch.testing.assert_close(
        actual, rms_norm_reference(x, weight, 1e-5), atol=tolerance, rtol=tolerance
    )
    assert actual.dtype == dtype


def test_a_row_of_zeros_stays_zero() -> None:
    actual = rms_norm(torch.zeros(1, 16), torch.ones(16), 1e-5)

    assert torch.equal(torch.zeros(1, 16), actual)


def test_a_row_does_not_depend_on_the_others() -> None:
    x = torch.randn(33, 576, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(576, generator=torch.Generator().manual_seed(2))

    together = rms_norm(x, weight, 1e-5)

    assert all(
        torch.equal(together[i : i + 1], rms_norm(x[i : i + 1], weight, 1e-5)) for i in range(33)
    )
