"""paged_attention against its reference, over layouts of requests and blocks."""

from dataclasses import dataclass

import pytest
import torch

from roost_kernels.paged_attention import (
    Span,
    build_span,
    paged_attention,
    paged_attention_reference,
)

NUM_BLOCKS = 24
HEAD_DIM = 16


@dataclass
class Step:
    """Requests of one step: where each starts, how many queries it has, and its blocks."""

    starts: list[int]
    lengths: list[int]
    tables: list[list[int]]
    block_size: int
    window: int = 0

    def spans(self) -> list[Span]:
        spans, row = [], 0
        for start, length, table in zip(self.starts, self.lengths, self.tables, strict=True):
            blocks = torch.tensor(table).unsqueeze(1) * self.block_size
            slots = (blocks + torch.arange(self.block_size)).flatten()[: start + length]
            spans.append(build_span(row, length, slots, self.window))
            row += length
        return spans


def _step(starts: list[int], lengths: list[int], block_size: int) -> Step:
    """Requests whose blocks lie scattered over the cache."""
    free = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(3)).tolist()
    tables = []
    for start, length in zip(starts, lengths, strict=True):
        num_blocks = -(-(start + length) // block_size)
        tables.append([free.pop() for _ in range(num_blocks)])
    return Step(starts, lengths, tables, block_size)


def _tensors(
    step: Step, num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(step.lengths), num_heads, HEAD_DIM, generator=generator)
    num_slots = NUM_BLOCKS * step.block_size
    k, v = torch.randn(2, num_slots, num_kv_heads, HEAD_DIM, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    step: Step,
    scale: float | None = None,
) -> torch.Tensor:
    return paged_attention_reference(
        q,
        k_cache,
        v_cache,
        block_tables=step.tables,
        starts=step.starts,
        lengths=step.lengths,
        block_size=step.block_size,
        scale=scale,
        window=step.window,
    )


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (4, 4), (8, 1)])
@pytest.mark.parametrize(
    ("starts", "lengths"),
    [
        pytest.param([0], [1], id="first token"),
        pytest.param([20], [1], id="decode"),
        pytest.param([0], [13], id="whole prompt"),
        pytest.param([5], [7], id="chunk with context"),
        pytest.param([31, 0, 16, 9], [1, 9, 3, 1], id="mixed step"),
    ],
)
@pytest.mark.parametrize("block_size", [4, 16])
def test_equals_the_reference(
    num_heads: int, num_kv_heads: int, starts: list[int], lengths: list[int], block_size: int
) -> None:
    step = _step(starts, lengths, block_size)
    q, k_cache, v_cache = _tensors(step, num_heads, num_kv_heads, torch.float32)

    actual = paged_attention(q, k_cache, v_cache, step.spans())

    expected = _reference(q, k_cache, v_cache, step)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 6, 7, 8, 31, 32, 100])
@pytest.mark.parametrize("num_heads", [4, 8])
def test_a_sliding_window_and_a_scale_equal_the_reference(window: int, num_heads: int) -> None:
    """Windows within a chunk, at its edge, reaching before it and beyond everything."""
    step = _step([31, 0, 16, 0, 5], [1, 9, 3, 1, 7], 4)
    step.window = window
    q, k_cache, v_cache = _tensors(step, num_heads, 2, torch.float32)

    actual = paged_attention(q, k_cache, v_cache, step.spans(), 0.3)

    expected = _reference(q, k_cache, v_cache, step, 0.3)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_a_span_holds_only_what_its_window_reaches() -> None:
    slots = torch.arange(20)

    assert build_span(0, 1, slots, 8).slots.tolist() == list(range(12, 20))
    assert build_span(0, 1, slots, 8).mask is None
    assert build_span(0, 3, slots, 8).slots.tolist() == list(range(10, 20))
    mask = build_span(0, 3, slots, 8).mask
    assert mask is not None
    assert mask.sum(dim=1).tolist() == [8, 8, 8]
    assert build_span(0, 20, slots, 20).mask is None
    assert build_span(0, 20, slots, 19).mask is not None


def test_bf16_stays_close_to_the_reference() -> None:
    step = _step([31, 0, 16], [1, 9, 3], 4)
    q, k_cache, v_cache = _tensors(step, 9, 3, torch.bfloat16)

    actual = paged_attention(q, k_cache, v_cache, step.spans())

    expected = _reference(q, k_cache, v_cache, step)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)


def test_what_other_slots_hold_does_not_matter() -> None:
    """Reserved cache memory is not cleared: it may hold NaN."""
    step = _step([5, 20], [7, 1], 4)
    q, k_cache, v_cache = _tensors(step, 9, 3, torch.float32)
    expected = paged_attention(q, k_cache, v_cache, step.spans())
    unused = torch.ones(k_cache.shape[0], dtype=torch.bool)
    for span in step.spans():
        unused[span.slots] = False
    k_cache[unused] = torch.nan
    v_cache[unused] = torch.nan

    assert torch.equal(expected, paged_attention(q, k_cache, v_cache, step.spans()))


def test_a_span_does_not_depend_on_its_neighbours() -> None:
    step = _step([31, 0, 16], [1, 9, 3], 4)
    q, k_cache, v_cache = _tensors(step, 9, 3, torch.float32)
    together = paged_attention(q, k_cache, v_cache, step.spans())

    row = 0
    for span in step.spans():
        rows = slice(row, row + span.num_queries)
        alone = paged_attention(
            q[rows], k_cache, v_cache, [build_span(0, span.num_queries, span.slots)]
        )
        row += span.num_queries

        assert torch.equal(together[rows], alone)


def test_only_a_chunk_with_context_needs_a_mask() -> None:
    slots = torch.arange(10)

    assert build_span(0, 1, slots).mask is None
    assert build_span(0, 10, slots).mask is None
    mask = build_span(0, 3, slots).mask
    assert mask is not None
    assert mask.sum(dim=1).tolist() == [8, 9, 10]
