"""store_kv against its reference."""

import pytest
import torch

from roost_kernels.kv_store import store_kv, store_kv_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference_and_leaves_other_slots_alone(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    caches = torch.randn(2, 64, 3, 8, generator=generator).to(dtype)
    expected = caches.clone()
    k, v = torch.randn(2, 10, 3, 8, generator=generator).to(dtype)
    slots = torch.randperm(64, generator=generator)[:10]

    store_kv(k, v, caches[0], caches[1], slots)

    store_kv_reference(k, v, expected[0], expected[1], slots)
    assert torch.equal(expected, caches)


def test_rows_that_are_views_of_a_larger_tensor_are_stored() -> None:
    """The decoder passes slices of its fused QKV product."""
    fused = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    k_cache, v_cache = torch.zeros(2, 16, 1, 8)

    store_kv(fused[:, 3:4], fused[:, 4:5], k_cache, v_cache, torch.tensor([3, 2, 9, 15]))

    assert torch.equal(fused[2, 3:4], k_cache[9])
    assert torch.equal(fused[2, 4:5], v_cache[9])


def test_a_slot_outside_the_cache_is_refused() -> None:
    cache = torch.zeros(16, 1, 8)

    with pytest.raises(IndexError):
        store_kv(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), cache, cache, torch.tensor([16]))
