"""The native decoder against its torch twin and transformers: every architecture, every format."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from native import needs_native
from tiny_models import TINY_MODELS, VOCAB, hf_model, load_saved, stored_as

from roost_engine.backend import BackendError, BackendOptions, build_backend, weight_bytes
from roost_engine.batch import BlockCopy, Chunk, Direction
from roost_engine.config import CacheConfig
from roost_engine.interruption import StepInterruptedError
from roost_engine.loader import LoadedModel, load_model, shapes
from roost_engine.loader.stored import Encoding, stored_floats
from roost_engine.native_runner import NativeRunner, WeightFormat, _Packer
from roost_engine.runner import ModelRunner
from roost_kernels.packed_matrix import Format

pytestmark = [pytest.mark.model, needs_native]  # much computing, if mostly on tiny models

CACHE = CacheConfig(num_blocks=32, block_size=16, num_host_blocks=4)
PROMPT = [(7 * i + i * i) % VOCAB for i in range(75)]
# The kernels work in vectors of 16.
_SIZES = {"head_dim": 32}


def native(model: LoadedModel, weights: WeightFormat = "float32", threads: int = 2) -> NativeRunner:
    return NativeRunner(model, CACHE, weights=weights, max_step_tokens=128, num_threads=threads)


def chunk(start: int, end: int, blocks: list[int], *, wants_logits: bool = True) -> Chunk:
    return Chunk(
        token_ids=PROMPT[start:end], start=start, block_table=blocks, wants_logits=wants_logits
    )


@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = hf_model(name, **_SIZES)
    runner = native(load_saved(reference, tmp_path))
    blocks = [3, 9, 1, 30, 12]

    logits = [runner.forward([chunk(i, i + 1, blocks)])[0].copy() for i in range(len(PROMPT))]

    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0].numpy()
    np.testing.assert_allclose(np.stack(logits), expected, atol=1e-4)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_chunks_and_batches_change_no_bit(name: str, weights: WeightFormat, tmp_path: Path) -> None:
    runner = native(load_saved(hf_model(name, **_SIZES), tmp_path), weights)
    whole = runner.forward([chunk(0, 75, [0, 1, 2, 3, 4])])[0].copy()

    for size in (1, 7, 64):
        for start in range(0, 75, size):
            last = runner.forward([chunk(start, min(75, start + size), [9, 8, 7, 6, 5])])
        assert np.array_equal(last[0], whole), size
    batch = runner.forward(
        [
            chunk(0, 40, [10, 11, 12], wants_logits=False),
            chunk(70, 75, [0, 1, 2, 3, 4]),
            chunk(0, 3, [13]),
            chunk(74, 75, [9, 8, 7, 6, 5]),
        ]
    )
    assert len(batch) == 3
    assert np.array_equal(batch[0], whole)
    assert np.array_equal(batch[2], whole)


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    model = load_saved(hf_model("llama", **_SIZES), tmp_path)
    exact = native(model).forward([chunk(0, 75, [0, 1, 2, 3, 4])])[0].copy()

    close = native(model, "bfloat16").forward([chunk(0, 75, [0, 1, 2, 3, 4])])[0]

    assert np.corrcoef(exact, close)[0, 1] > 0.995


# Which tensors share a matrix (q, k, v; gate, up), and so what is mixed, changes from layer to
# layer: a layer has seven.
@pytest.mark.parametrize(
    "encodings",
    [
        ("q8_0",),
        ("q5_0",),
        ("q4_1",),
        ("q4_0",),
        ("q4_0", "q4_1"),
        ("q5_0", "q8_0"),
        ("q8_0", "q4_1", "f16", "f32"),
    ],
    ids="+".join,
)
def test_stored_blocks_are_computed_as_the_float32_that_they_stand_for(
    encodings: tuple[Encoding, ...], tmp_path: Path
) -> None:
    model = load_saved(hf_model("llama", **_SIZES, intermediate_size=128), tmp_path)
    model = stored_as(model, *encodings)
    step = [chunk(0, 75, [0, 1, 2, 3, 4])]
    twin = ModelRunner(model, CACHE, torch.float32).forward(step)[0].numpy()

    exact = native(model).forward(step)[0].copy()
    close = native(model, "stored").forward(step)[0]

    np.testing.assert_allclose(exact, twin, atol=1e-4)
    assert np.corrcoef(exact, close)[0, 1] > 0.999


@pytest.mark.parametrize(
    ("encodings", "expected"),
    [
        (("q4_0", "q4_1", "q4_1"), Format.INT4),
        (("q5_0", "q5_0", "q8_0"), Format.INT8),
        (("q4_1", "q4_1", "q8_0"), Format.BF16),
        (("q4_1", "f32", "q4_1"), Format.BF16),
    ],
    ids=str,
)
def test_a_fused_matrix_has_few_bits_only_where_all_its_parts_do(
    encodings: tuple[Encoding, ...], expected: Format, tmp_path: Path
) -> None:
    model = load_saved(hf_model("llama", **_SIZES), tmp_path)
    fused = {f"{shapes.layer_prefix(0)}self_attn.{part}_proj.weight" for part in "qkv"}
    parts = {name: tensor for name, tensor in model.weights.items() if name in fused}
    stored = stored_as(msgspec.structs.replace(model, weights=parts), *encodings).weights
    mixed = msgspec.structs.replace(model, weights=model.weights | stored)

    packed = _Packer(mixed.weights, "stored", 1).pack(model.config, 16)

    assert [layer.qkv.format for layer in packed.layers] == [expected, Format.BF16, Format.BF16]


@pytest.mark.parametrize(
    ("encoding", "weights", "bytes_of_32"),
    [
        ("q4_0", "stored", 20),
        ("q4_1", "stored", 20),
        ("q5_0", "stored", 34),
        ("q8_0", "stored", 34),
        ("f32", "stored", 64),
        ("q4_0", "bfloat16", 64),
        ("q4_0", "float32", 128),
    ],
)
def test_the_weights_take_the_memory_that_is_announced(
    encoding: Encoding, weights: WeightFormat, bytes_of_32: int, tmp_path: Path
) -> None:
    sizes = {"intermediate_size": 128, "vocab_size": 96}  # whole panels
    model = stored_as(load_saved(hf_model("llama", **_SIZES, **sizes), tmp_path), encoding)
    packed = _Packer(model.weights, weights, 1).pack(model.config, 16)
    matrices = [packed.head]
    for layer in packed.layers:
        matrices += [layer.qkv, layer.o, layer.gate_up, layer.down]
    num_weights = sum(matrix.n * matrix.k for matrix in matrices)
    num_vector_bytes = 4 * 64 * (2 * len(packed.layers) + 1)

    assert sum(matrix.num_bytes for matrix in matrices) == num_weights // 32 * bytes_of_32
    assert weight_bytes(model, weights) == num_weights // 32 * bytes_of_32 + num_vector_bytes


def test_a_4_bit_scale_beyond_the_kernels_range_is_told(tmp_path: Path) -> None:
    model = load_saved(hf_model("llama", **_SIZES, intermediate_size=128), tmp_path)
    name = f"{shapes.layer_prefix(1)}self_attn.o_proj.weight"
    huge = np.array([65504], np.float16).view(np.uint8)
    model = stored_as(model, "q4_0")
    model.weights[name].rows[3, :2] = huge

    with pytest.raises(ValueError, match="may be damaged, or take its weights as bfloat16"):
        native(model, "stored")
    native(model, "bfloat16")


def test_one_thread_computes_the_same_bits_as_three(tmp_path: Path) -> None:
    model = load_saved(hf_model("qwen3", **_SIZES), tmp_path)
    step = [chunk(0, 75, [0, 1, 2, 3, 4])]

    one, three = native(model, threads=1).forward(step), native(model, threads=3).forward(step)

    assert np.array_equal(one, three)


def test_nan_left_in_a_block_does_not_reach_its_next_owner(tmp_path: Path) -> None:
    model = hf_model("llama", **_SIZES)
    clean = native(load_saved(model, tmp_path / "clean"))
    expected = clean.forward([chunk(0, 20, [0, 1])])[0].copy()
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCAB - 1] = float("nan")
    runner = native(load_saved(model, tmp_path / "poisoned"))

    poison = Chunk(token_ids=[VOCAB - 1] * 32, start=0, block_table=[0, 1], wants_logits=True)
    assert np.isnan(runner.forward([poison])).all()

    # A tied head: the logit of the poisoned token itself stays NaN.
    np.testing.assert_array_equal(runner.forward([chunk(0, 20, [0, 1])])[0][:-1], expected[:-1])


def test_blocks_survive_a_stay_in_host_memory(tmp_path: Path) -> None:
    runner = native(load_saved(hf_model("llama", **_SIZES), tmp_path), "bfloat16")
    blocks = [0, 1, 2, 3, 4]
    runner.forward([chunk(0, 74, blocks, wants_logits=False)])
    expected = runner.forward([chunk(74, 75, blocks)])[0].copy()

    runner.copy_blocks([BlockCopy(block, block, Direction.OUT) for block in range(4)])
    runner.forward([Chunk(token_ids=[5] * 64, start=0, block_table=blocks[:4], wants_logits=False)])
    runner.copy_blocks([BlockCopy(block + 10, block, Direction.IN) for block in range(4)])

    restored = runner.forward([chunk(74, 75, [10, 11, 12, 13, 4])])[0]
    assert np.array_equal(restored, expected)


def test_an_interrupted_step_spoils_its_own_positions_only(tmp_path: Path) -> None:
    runner = native(load_saved(hf_model("llama", **_SIZES), tmp_path))
    beginning = chunk(0, 48, [0, 1, 2], wants_logits=False)
    rest = chunk(48, 75, [0, 1, 2, 3, 4])
    runner.forward([beginning])
    expected = runner.forward([rest])[0].copy()

    runner.interrupt()  # nothing is under way, so the next step must not hear of it
    assert np.array_equal(runner.forward([rest])[0], expected)

    for _ in range(20):
        _interrupt_while_computing(runner, rest)
        assert np.array_equal(runner.forward([rest])[0], expected)


def _interrupt_while_computing(runner: NativeRunner, step: Chunk) -> None:
    """Compute a step again and again, until one was interrupted."""
    is_interrupted = threading.Event()

    def interrupt() -> None:
        while not is_interrupted.wait(0.0003):
            runner.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(StepInterruptedError):
            while True:
                runner.forward([step])
    finally:
        is_interrupted.set()
        thread.join()


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (Chunk([VOCAB], 0, [0], True), "token"),
        (Chunk([-1], 0, [0], True), "token"),
        (Chunk([1], 0, [32], True), "block"),
        (Chunk([1], 16, [0], True), "position 16"),
        (Chunk([1], 200, [0] * 20, True), "position 200"),
        (Chunk([1] * 129, 0, [0] * 9, True), "129 tokens"),
        (Chunk([1], -1, [0], True), "position -1"),
        (Chunk([], 0, [0], True), "0 tokens"),
    ],
)
def test_what_does_not_exist_is_refused_before_it_is_read(
    step: Chunk, problem: str, tmp_path: Path
) -> None:
    runner = native(load_saved(hf_model("llama", **_SIZES), tmp_path))

    with pytest.raises(IndexError, match=problem):
        runner.forward([step])


@pytest.mark.parametrize(
    ("name", "shape"),
    [(shapes.EMBEDDING, (VOCAB - 1, 64)), (shapes.FINAL_NORM, (48,)), (shapes.HEAD, (16, 64))],
)
def test_weights_smaller_than_the_kernels_would_read_are_refused(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    model = load_saved(hf_model("llama, one to one, untied", **_SIZES), tmp_path)
    model.weights[name] = stored_floats(np.zeros(shape, np.float32))

    with pytest.raises(ValueError, match="expected"):
        native(model)


def test_a_sliding_window_of_nothing_is_refused(tmp_path: Path) -> None:
    model = load_saved(hf_model("mistral", **_SIZES), tmp_path)
    config = msgspec.structs.replace(model.config, sliding_window=0)

    with pytest.raises(ValueError, match="window of 0"):
        native(msgspec.structs.replace(model, config=config))


def test_no_threads_are_refused_instead_of_waited_for(tmp_path: Path) -> None:
    model = load_saved(hf_model("llama", **_SIZES), tmp_path)

    with pytest.raises(ValueError, match="0 threads"):
        native(model, threads=0)


def test_a_cache_that_cannot_be_allocated_is_the_operators_fault(tmp_path: Path) -> None:
    model = load_saved(hf_model("llama", **_SIZES), tmp_path)
    cache = CacheConfig(num_blocks=2**31 - 1, block_size=256)  # beyond any address space

    with pytest.raises(BackendError, match="lower kv_tokens"):
        build_backend(model, cache, BackendOptions(num_threads=1))


def test_the_real_model_agrees_with_its_torch_twin() -> None:
    smollm2 = load_model("smollm2")
    ids = smollm2.tokenizer.encode("The router sends each request home, to the replica that")
    step = [Chunk(ids, 0, [0, 1], True)]
    small = CacheConfig(num_blocks=8)
    torch_logits = ModelRunner(smollm2, small, torch.float32).forward(step)[0].numpy()

    exact = NativeRunner(
        smollm2, small, weights="float32", max_step_tokens=64, num_threads=2
    ).forward(step)[0]

    np.testing.assert_allclose(exact, torch_logits, atol=2e-3)
    assert exact.argmax() == torch_logits.argmax()
