"""A Hugging Face config.json as ModelConfig: Llama, Mistral, Qwen2, Qwen3, Gemma 3 (text).

transformers 4 writes `rope_theta` beside `rope_scaling`, transformers 5 inside
`rope_parameters` (Gemma: one for each kind of layer); both are read. Of the scalings Llama 3.1's
(`llama3`) and position interpolation (`linear`) are implemented. A setting that changes the
computation and that the decoder does not implement is refused by name, never ignored.

Where a key is absent the defaults are those of transformers' configuration of the family.
"""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec

from roost_engine.config import ModelConfig
from roost_engine.loader import shapes
from roost_engine.loader.json_object import JsonObject
from roost_kernels.rope_scaling import linear_divisors, llama3_divisors

GEMMA3: Final = "gemma3_text"
_QWEN: Final = ("qwen2", "qwen3")

_ROPE_KEYS: Final = ("rope_parameters", "rope_scaling")  # transformers 5 and 4
_ROPE_TYPES: Final = ("default", "llama3", "linear")
_FULL: Final = "full_attention"
_SLIDING: Final = "sliding_attention"


class _Family(msgspec.Struct, frozen=True, kw_only=True):
    """One `model_type`: its class, and defaults of settings that a config may leave out."""

    architecture: str
    max_position: int
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    theta: float = 10000.0
    tie_embeddings: bool = False
    activation_key: str = "hidden_act"
    activation: str = "silu"  # the only one implemented for this family


_FAMILIES: Final = {
    "llama": _Family(architecture="LlamaForCausalLM", max_position=2048),
    "mistral": _Family(architecture="MistralForCausalLM", max_position=4096 * 32),
    "qwen2": _Family(architecture="Qwen2ForCausalLM", max_position=32768),
    "qwen3": _Family(architecture="Qwen3ForCausalLM", max_position=32768, head_dim=128),
    GEMMA3: _Family(
        architecture="Gemma3ForCausalLM",
        max_position=131072,
        head_dim=256,
        theta=1_000_000.0,
        tie_embeddings=True,
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
    ),
}


def read_config(config: JsonObject, eos_token_ids: frozenset[int]) -> ModelConfig:
    """The decoder's shape. ModelFileError names the setting that is missing or unsupported."""
    model_type = config.get("model_type", str, "")
    family = _check_family(config, model_type)
    _check_supported(config, family)
    hidden_size = config.get("hidden_size", int)
    num_heads = config.get("num_attention_heads", int)
    if num_heads < 1:
        config.fail(f"num_attention_heads is {num_heads}")
    num_layers = config.get("num_hidden_layers", int)
    head_dim = config.get("head_dim", int, family.head_dim or hidden_size // num_heads)
    rope, sliding_rope = _read_ropes(config)
    theta = rope.get("rope_theta", float, config.get("rope_theta", float, family.theta))
    window, sliding_layers = _read_sliding(config, model_type, num_layers)
    model_config = ModelConfig(
        vocab_size=config.get("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=config.get("intermediate_size", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads", int, num_heads),
        head_dim=head_dim,
        rope_theta=theta,
        rms_norm_eps=config.get("rms_norm_eps", float, 1e-6),
        max_position=config.get("max_position_embeddings", int, family.max_position),
        tie_embeddings=config.get("tie_word_embeddings", bool, family.tie_embeddings),
        eos_token_ids=eos_token_ids,
        attention_bias=model_type == "qwen2",
        qk_norm=model_type in ("qwen3", GEMMA3),
        sliding_window=window,
        sliding_layers=sliding_layers,
    )
    if model_type == GEMMA3:
        model_config = _with_gemma3(config, model_config, sliding_rope)
    shapes.check_config(config.path, model_config)
    divisors = _read_rope_divisors(config, rope, model_config)
    return msgspec.structs.replace(model_config, rope_divisors=divisors)


def _check_family(config: JsonObject, model_type: str) -> _Family:
    architectures = config.get("architectures", list, [])
    family = _FAMILIES.get(model_type)
    if family is None or (architectures and family.architecture not in architectures):
        found = f"model_type {model_type!r}, architectures {architectures}"
        known = ", ".join(each.architecture for each in _FAMILIES.values())
        config.fail(f"{found}: not supported, only {known}")
    return family


def _check_supported(config: JsonObject, family: _Family) -> None:
    """Refuse settings of whatever family that the decoder would have to obey."""
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if config.get(key, bool, False):
            config.fail(f"{key} is not supported")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key, float, 0.0):
            config.fail(f"{key} is not supported")
    activation = config.get(family.activation_key, str, family.activation)
    if activation != family.activation:
        problem = f"{activation!r} is not supported, only {family.activation!r}"
        config.fail(f"{family.activation_key} {problem}")
    if config.get("quantization_config", dict, {}):
        config.fail("quantization_config: quantised safetensors are not supported, GGUF is")


def _read_ropes(config: JsonObject) -> tuple[JsonObject, JsonObject]:
    """Rotary settings of full and of sliding layers, as far as transformers 5 writes them."""
    found = config.get("rope_parameters", dict, {})
    full: Any = found
    sliding: Any = {}
    if _FULL in found or _SLIDING in found:
        full, sliding = found.get(_FULL) or {}, found.get(_SLIDING) or {}
    for values in (full, sliding, config.get("rope_scaling", dict, {})):
        _check_rope(config, values)
    if _rope_type(sliding) != "default":
        config.fail(f"rope_parameters: {_SLIDING} is scaled, which is not supported")
    return JsonObject(config.path, full), JsonObject(config.path, sliding)


def _check_rope(config: JsonObject, rope: Any) -> None:
    key = "rope_parameters or rope_scaling"
    if not isinstance(rope, dict):
        config.fail(f"{key}: {rope!r:.80} is not an object")
    kind = _rope_type(rope)
    if kind not in _ROPE_TYPES:
        known = ", ".join(map(repr, _ROPE_TYPES))
        config.fail(f"{key}: rope type {kind!r} is not supported, only {known}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        config.fail(f"{key}: partial_rotary_factor is not supported")


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _read_rope_divisors(
    config: JsonObject, rope: JsonObject, model: ModelConfig
) -> tuple[float, ...]:
    """What a scaling of the full layers comes to; nothing for models without one."""
    scaling = JsonObject(config.path, config.get("rope_scaling", dict, {}))
    for values in (rope, scaling):
        kind = values.get("rope_type", str, values.get("type", str, "default"))
        if kind == "default":
            continue
        factor = values.get("factor", float)
        if not 0 < factor < math.inf:
            config.fail(f"rotary scaling by the factor {factor} makes no sense")
        if kind == "linear":
            return linear_divisors(model.head_dim, factor)
        low, high = values.get("low_freq_factor", float), values.get("high_freq_factor", float)
        original = values.get("original_max_position_embeddings", int)
        if not (0 < low < high < math.inf and original > 0):
            config.fail(f"llama3 scaling between {low} and {high} of {original} makes no sense")
        return llama3_divisors(
            model.head_dim,
            model.rope_theta,
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=original,
        )
    return ()


def _read_sliding(
    config: JsonObject, model_type: str, num_layers: int
) -> tuple[int, tuple[bool, ...]]:
    """The window and which layers have it; (0, ()) for a model that does not slide.

    As in transformers: Mistral slides in all layers; Qwen only if `use_sliding_window`, from
    layer `max_window_layers` on; Gemma in all but each sixth. `layer_types` overrides the last
    two. Llama never slides.
    """
    window = config.get("sliding_window", int, 4096 if model_type == GEMMA3 else 0)
    if model_type in _QWEN and not config.get("use_sliding_window", bool, False):
        window = 0
    if model_type == "llama" or window == 0 or num_layers > shapes.MAX_LAYERS:
        return 0, ()
    kinds = config.get("layer_types", list, [])
    if model_type == "mistral":
        slides = [True] * num_layers
    elif kinds:
        if len(kinds) != num_layers or any(kind not in (_FULL, _SLIDING) for kind in kinds):
            config.fail(f"layer_types: {kinds!r:.200} does not fit {num_layers} layers")
        slides = [kind == _SLIDING for kind in kinds]
    elif model_type == GEMMA3:
        pattern = config.get("sliding_window_pattern", int, 6)
        if pattern < 1:
            config.fail(f"sliding_window_pattern is {pattern}")
        slides = [(layer_idx + 1) % pattern != 0 for layer_idx in range(num_layers)]
    else:
        first = config.get("max_window_layers", int, 28)
        slides = [layer_idx >= first for layer_idx in range(num_layers)]
    return (window, tuple(slides)) if any(slides) else (0, ())


def _with_gemma3(config: JsonObject, model: ModelConfig, sliding_rope: JsonObject) -> ModelConfig:
    local_theta = config.get("rope_local_base_freq", float, 10000.0)
    scalar = config.get("query_pre_attn_scalar", float, 256.0)
    if not 0 < scalar < math.inf:
        config.fail(f"query_pre_attn_scalar is {scalar}")
    return msgspec.structs.replace(
        model,
        post_norms=True,
        activation="gelu_tanh",
        embedding_scale=math.sqrt(model.hidden_size),
        attention_scale=1 / math.sqrt(scalar),
        sliding_rope_theta=sliding_rope.get("rope_theta", float, local_theta),
    )
