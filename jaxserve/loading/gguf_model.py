"""What GGUF files call things, in Hugging Face's names: one table, and for each family what is its own."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np

from jaxserve.errors import ModelError
from jaxserve.loading.gguf_file import GGUFFile

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
NORMS_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
JOINED = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA = {**NORMS, **ATTENTION, **GATED}
GEMMA2 = {
    **ATTENTION,
    **GATED,
    **NORMS_AFTER,
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
}
EMBEDDING = "token_embd.weight"
ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies: how a GGUF stores llama3's scaling."""

Count = Annotated[int, msgspec.Meta(gt=0)]
Factor = Annotated[float, msgspec.Meta(gt=0)]


class Header(msgspec.Struct, rename=lambda field: field.replace("__", ".")):
    """The metadata that says how the model is built, without the architecture's name before each key."""

    block_count: Count
    context_length: Count
    embedding_length: Count
    feed_forward_length: Count
    attention__head_count: Count
    attention__layer_norm_rms_epsilon: float | None = None
    attention__layer_norm_epsilon: float | None = None
    attention__sliding_window: int | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    attention__head_count_kv: Count | None = None
    attention__key_length: Count | None = None
    rope__dimension_count: Count | None = None
    rope__freq_base: Factor = 10000.0
    rope__freq_base_swa: Factor = 10000.0
    # a factor without a type is linear; `scale_linear` is from before there were types
    rope__scale_linear: Factor = 1.0
    rope__scaling__type: Literal["none", "linear", "yarn"] = "linear"
    rope__scaling__factor: Factor | None = None
    rope__scaling__original_context_length: Count | None = None
    rope__scaling__attn_factor: Factor | None = None
    rope__scaling__yarn_beta_fast: Factor | None = None
    rope__scaling__yarn_beta_slow: Factor | None = None


class Family(NamedTuple):
    """What an architecture of llama.cpp's is, in Hugging Face's terms."""

    architecture: str
    inner: Mapping[str, str] = LLAMA
    """Its name of each part of a layer -> Hugging Face's."""
    model_type: str = ""
    """Where it is not what llama.cpp calls the architecture."""
    epsilon: str = "rms_norm_eps"
    paired: bool = False
    """Rotary pairs of q and k are stored side by side; ours lie half a head apart."""
    norm_offset: float = 0.0
    """What stored weights of norms have been added."""
    config: Callable[[Header, dict[str, Any]], dict[str, Any]] = lambda header, rope: {}
    """Keys of its own, or otherwise; `rope` is what the header says of rotary positions."""


def _capped(header: Header, rope: dict[str, Any]) -> dict[str, Any]:
    """Gemma's way to scale queries; the largest of each generation has another."""
    largest = header.block_count in (46, 62)
    own = header.embedding_length // header.attention__head_count
    return {
        "query_pre_attn_scalar": own if largest else head_dim(header),
        "attn_logit_softcapping": header.attn_logit_softcapping,
        "final_logit_softcapping": header.final_logit_softcapping,
    }


def _gemma3(header: Header, rope: dict[str, Any]) -> dict[str, Any]:
    near = {"rope_theta": header.rope__freq_base_swa, "rope_type": "default"}
    kinds = {"full_attention": rope, "sliding_attention": near}
    return _capped(header, rope) | {"rope_parameters": kinds}


FAMILIES = {
    "llama": Family("LlamaForCausalLM", paired=True),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM", {**LLAMA, **QK_NORM}),
    "gemma": Family("GemmaForCausalLM", norm_offset=1.0),
    "gemma2": Family("Gemma2ForCausalLM", GEMMA2, norm_offset=1.0, config=_capped),
    "gemma3": Family(
        "Gemma3ForCausalLM", {**GEMMA2, **QK_NORM}, "gemma3_text", norm_offset=1.0, config=_gemma3
    ),
    "phi3": Family("Phi3ForCausalLM", {**NORMS, **JOINED}),
    "olmo2": Family("Olmo2ForCausalLM", {**ATTENTION, **QK_NORM, **NORMS_AFTER, **GATED}),
    "smollm3": Family("SmolLM3ForCausalLM", paired=True),
    "starcoder2": Family(
        "Starcoder2ForCausalLM",
        {**NORMS, **ATTENTION, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        epsilon="norm_epsilon",
    ),
}
"""By llama.cpp's names of them."""


class Described(NamedTuple):
    """A model in a file."""

    config: dict[str, Any]
    """The keys of a `config.json`."""
    names: dict[str, str]
    """Hugging Face's name of each tensor -> the file's."""
    family: Family

    def as_saved(self, name: str, value: np.ndarray) -> np.ndarray:
        """A tensor as a Hugging Face checkpoint has it."""
        if self.family.norm_offset and "norm." in name:
            value = value - np.asarray(self.family.norm_offset, value.dtype)
        if not self.family.paired:
            return value
        if "self_attn.q_proj" in name:
            return _halves(value, self.config["num_attention_heads"])
        if "self_attn.k_proj" in name:
            return _halves(value, self.config["num_key_value_heads"])
        return value


def describe(file: GGUFFile) -> Described:
    """Raises ModelError for an architecture, a tensor or a key that is not known, missing or wrong."""
    architecture = file.metadata.get("general.architecture")
    if (family := FAMILIES.get(architecture)) is None:
        known = ", ".join(FAMILIES)
        raise ModelError(f"{file.path} is of architecture {architecture!r}; supported in GGUF: {known}")
    return Described(_config(file, architecture, family), _names(file, family), family)


def _names(file: GGUFFile, family: Family) -> dict[str, str]:
    found = {}
    for name in file.tensors:
        stem, _, kind = name.rpartition(".")
        if name == ROPE_FACTORS:
            continue
        if stem in OUTER:
            found[f"{OUTER[stem]}.{kind}"] = name
            continue
        parts = stem.split(".")
        if len(parts) != 3 or parts[0] != "blk" or parts[2] not in family.inner:
            raise ModelError(f"tensor {name} in {file.path} has no place in a {family.architecture}")
        found[f"model.layers.{parts[1]}.{family.inner[parts[2]]}.{kind}"] = name
    return found


def _config(file: GGUFFile, architecture: str, family: Family) -> dict[str, Any]:
    """llama3's scaling is stored as one divisor per rotary frequency: `rope_parameters` has them as
    `factors`, under the `rope_type` of that name."""
    header = _header(file, architecture)
    heads = header.attention__head_count
    epsilon = header.attention__layer_norm_rms_epsilon or header.attention__layer_norm_epsilon
    if epsilon is None:
        raise ModelError(f"{file.path} has no `attention.layer_norm_rms_epsilon` of its {architecture}")
    if EMBEDDING not in file.tensors:
        raise ModelError(f"{file.path} has no tensor {EMBEDDING}")
    rope = _rope(file, header, family)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type or architecture,
        "hidden_size": header.embedding_length,
        "intermediate_size": header.feed_forward_length,
        "num_hidden_layers": header.block_count,
        "num_attention_heads": heads,
        "num_key_value_heads": header.attention__head_count_kv or heads,
        "head_dim": head_dim(header),
        "max_position_embeddings": header.context_length,
        family.epsilon: epsilon,
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "rope_parameters": rope,
        **({"sliding_window": window} if (window := header.attention__sliding_window) else {}),
        **family.config(header, rope),
    }


def head_dim(header: Header) -> int:
    return header.attention__key_length or header.embedding_length // header.attention__head_count


def _halves(value: np.ndarray, heads: int) -> np.ndarray:
    pairs = value.reshape(heads, -1, 2, *value.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(value.shape)


def _header(file: GGUFFile, architecture: str) -> Header:
    prefix = f"{architecture}."
    meta = {key.removeprefix(prefix): file.metadata[key] for key in file.metadata if key.startswith(prefix)}
    try:
        return msgspec.convert(meta, Header)
    except msgspec.ValidationError as error:
        raise ModelError(f"{file.path} does not describe a model: metadata {prefix}*: {error}") from None


def _rope(file: GGUFFile, header: Header, family: Family) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": header.rope__freq_base, "rope_type": "default"}
    dim = head_dim(header)
    if (turned := header.rope__dimension_count or dim) != dim:
        if family.paired:
            raise ModelError(f"{file.path} turns {turned} of {dim} features of a head; a Llama turns all")
        rope["partial_rotary_factor"] = turned / dim
    kind, factor = header.rope__scaling__type, header.rope__scaling__factor or header.rope__scale_linear
    scaled = kind != "none" and factor != 1.0
    if scaled:
        rope |= {"rope_type": kind, "factor": factor}
    if scaled and kind == "yarn":
        rope |= _yarn(header, factor)
    if ROPE_FACTORS in file.tensors:
        if scaled:
            raise ModelError(f"{file.path} scales its rotary positions twice: {kind} and {ROPE_FACTORS}")
        rope |= {"rope_type": "factors", "factors": file.dequantised(ROPE_FACTORS).ravel().tolist()}
    return rope


def _yarn(header: Header, factor: float) -> dict[str, Any]:
    found = {
        "original_max_position_embeddings": header.rope__scaling__original_context_length,
        "beta_fast": header.rope__scaling__yarn_beta_fast,
        "beta_slow": header.rope__scaling__yarn_beta_slow,
    }
    if weight := header.rope__scaling__attn_factor:
        # here a multiple of YaRN's own sharpening, in a config.json the whole of it
        found["attention_factor"] = weight * (0.1 * math.log(factor) + 1.0)
    return {key: value for key, value in found.items() if value is not None}
