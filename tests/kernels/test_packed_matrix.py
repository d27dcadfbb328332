"""The native matrices: what they keep of a file's numbers, and rows that do not see each other."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from native import needs_native

from roost_kernels.packed_matrix import (
    GRID_FORMATS,
    Encoding,
    Format,
    PackedMatrix,
    decode_rows,
    row_bytes,
    stored_rows,
)

pytestmark = needs_native

GGML = {
    Encoding.F32: GGMLQuantizationType.F32,
    Encoding.F16: GGMLQuantizationType.F16,
    Encoding.BF16: GGMLQuantizationType.BF16,
    Encoding.Q8_0: GGMLQuantizationType.Q8_0,
    Encoding.Q4_1: GGMLQuantizationType.Q4_1,
    Encoding.Q4_0: GGMLQuantizationType.Q4_0,
    Encoding.Q5_0: GGMLQuantizationType.Q5_0,
}
ALLOWED = [(encoding, kind) for encoding in Encoding for kind in (Format.F32, Format.BF16)]
ALLOWED += list(GRID_FORMATS.items())
KEEPING = [
    *GRID_FORMATS.items(),
    (Encoding.BF16, Format.BF16),
    *((encoding, Format.F32) for encoding in Encoding),
]
N, K = 104, 96  # six panels and a half: tiles of four, two and one


def stored(encoding: Encoding, n: int = N, k: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Rows as bytes, and the weights they stand for."""
    weights = np.random.default_rng(7).normal(0, 0.5, (n, k)).astype(np.float32)
    rows = quantize(weights, GGML[encoding]).view(np.uint8).reshape(n, -1)
    return rows, dequantize(rows, GGML[encoding]).reshape(n, k).astype(np.float32)


def any_blocks(encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose blocks hold every bit pattern there can be, scales subnormal to 8,188."""
    rng = np.random.default_rng(11)
    rows = rng.integers(0, 256, (N, row_bytes(encoding, K)), np.uint8)
    halves = rows.reshape(N * K // 32, -1)[:, : 4 if encoding is Encoding.Q4_1 else 2]
    numbers = rng.integers(0, 0x6FFF, (len(halves), halves.shape[1] // 2), np.uint16, endpoint=True)
    numbers |= rng.integers(0, 2, numbers.shape, np.uint16) << 15
    numbers[0] = 0x6FFF  # 8,188: eight times that is the largest half but for 24
    halves[:] = numbers.view(np.uint8).reshape(halves.shape)
    return rows, dequantize(rows, GGML[encoding]).reshape(N, K)


def activations(num_rows: int, k: int = K) -> np.ndarray:
    """Numbers that bfloat16 holds exactly, so that rounding them changes nothing."""
    numbers = np.random.default_rng(3).normal(size=(num_rows, k)).astype(np.float32)
    return (numbers.view(np.uint32) & 0xFFFF0000).view(np.float32)


def pack(rows: np.ndarray, encoding: Encoding, kind: Format, k: int = K) -> PackedMatrix:
    return PackedMatrix(stored_rows((rows, encoding)), k, kind, num_threads=2)


@pytest.mark.parametrize("encoding", list(Encoding))
def test_stored_rows_are_decoded_as_ggml_does(encoding: Encoding) -> None:
    rows, weights = stored(encoding)

    assert np.array_equal(decode_rows(rows, K, encoding), weights)


@pytest.mark.parametrize("encoding", GRID_FORMATS)
def test_every_bit_pattern_of_a_block_is_kept_to_the_bit(encoding: Encoding) -> None:
    rows, weights = any_blocks(encoding)

    matrix = pack(rows, encoding, GRID_FORMATS[encoding])

    assert np.array_equal(decode_rows(rows, K, encoding), weights)
    # Each product with a unit vector is one weight, without rounding.
    assert np.array_equal(matrix.multiply(np.eye(K, dtype=np.float32)), weights.T)


@pytest.mark.parametrize(("encoding", "kind"), KEEPING)
def test_a_format_that_holds_the_files_grid_loses_nothing(encoding: Encoding, kind: Format) -> None:
    rows, weights = stored(encoding)

    unit = pack(rows, encoding, kind).multiply(np.eye(K, dtype=np.float32))

    assert np.array_equal(unit, weights.T)


@pytest.mark.parametrize(("encoding", "kind"), ALLOWED)
def test_products_are_those_of_the_weights(encoding: Encoding, kind: Format) -> None:
    rows, weights = stored(encoding)
    x = activations(5)

    product = pack(rows, encoding, kind).multiply(x)

    assert product.shape == (5, N)
    scale = np.abs(x) @ np.abs(weights).T  # what the terms add up to without cancelling
    tolerance = 2e-3 if (encoding, kind) not in KEEPING else 1e-6
    assert (np.abs(product - x @ weights.T) / scale).max() < tolerance


@pytest.mark.parametrize("kind", [Format.INT8, Format.INT4])
def test_no_format_quantises(kind: Format) -> None:
    for encoding in Encoding:
        if GRID_FORMATS.get(encoding) is not kind:
            rows, _ = stored(encoding)
            with pytest.raises(ValueError, match=f"{kind.name} does not keep .* {encoding.name}"):
                pack(rows, encoding, kind)


def test_a_4_bit_scale_whose_minimum_no_half_holds_is_refused() -> None:
    rows, _ = stored(Encoding.Q4_0)
    rows[N - 1, -18:-16] = np.array([8192], np.float16).view(np.uint8)

    with pytest.raises(ValueError, match="8192 or more"):
        pack(rows, Encoding.Q4_0, Format.INT4)

    weights = dequantize(rows, GGML[Encoding.Q4_0]).reshape(N, K)
    assert np.array_equal(decode_rows(rows, K, Encoding.Q4_0), weights)


@pytest.mark.parametrize(
    ("encodings", "kind"),
    [
        ((Encoding.Q4_0, Encoding.Q4_1), Format.INT4),
        ((Encoding.Q5_0, Encoding.Q8_0), Format.INT8),
        ((Encoding.F16, Encoding.Q4_1, Encoding.F32), Format.F32),
    ],
)
def test_rows_of_one_matrix_may_be_stored_differently(
    encodings: tuple[Encoding, ...], kind: Format
) -> None:
    parts = [stored(encoding) for encoding in encodings]
    rows = stored_rows(*((part[0], each) for part, each in zip(parts, encodings, strict=True)))
    order = np.random.default_rng(1).permutation(len(rows))  # both encodings in each panel

    unit = PackedMatrix(rows.take(order), K, kind).multiply(np.eye(K, dtype=np.float32))

    assert np.array_equal(unit, np.concatenate([part[1] for part in parts])[order].T)


@pytest.mark.parametrize(
    ("encoding", "kind"),
    [(Encoding.F32, Format.F32), (Encoding.F32, Format.BF16), *GRID_FORMATS.items()],
)
def test_a_row_is_the_same_in_every_batch(encoding: Encoding, kind: Format) -> None:
    matrix = pack(stored(encoding)[0], encoding, kind)
    x = activations(40)

    alone = np.concatenate([matrix.multiply(x[i : i + 1]) for i in range(40)])

    for size in range(2, 41):
        assert np.array_equal(matrix.multiply(x[:size]), alone[:size])


def test_a_null_address_is_a_row_of_zeros() -> None:
    bytes_of_rows, weights = stored(Encoding.F32)
    rows = stored_rows((bytes_of_rows, Encoding.F32))
    rows.addresses[3] = 0

    product = PackedMatrix(rows, K, Format.F32).multiply(activations(2))

    assert not product[:, 3].any()
    np.testing.assert_allclose(product[:, 4], activations(2) @ weights[4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("k", "encoding", "kind"),
    [(24, Encoding.F32, Format.BF16), (48, Encoding.Q8_0, Format.INT8)],
)
def test_rows_that_do_not_fit_a_format_are_refused(
    k: int, encoding: Encoding, kind: Format
) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        pack(np.zeros((4, 4 * k), np.uint8), encoding, kind, k)


def test_activations_of_another_length_are_refused() -> None:
    matrix = pack(stored(Encoding.F32)[0], Encoding.F32, Format.F32)

    with pytest.raises(ValueError, match=r"shape \(2, 95\), expected \(rows, 96\)"):
        matrix.multiply(np.zeros((2, K - 1), np.float32))
