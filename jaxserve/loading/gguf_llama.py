"""What a GGUF of architecture `llama` calls things, in Hugging Face's names."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from jaxserve.errors import ModelError
from jaxserve.loading.gguf_file import GGUFFile

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EMBEDDING = "token_embd.weight"
ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies: how a GGUF stores llama3's scaling."""

Count = Annotated[int, msgspec.Meta(gt=0)]
Factor = Annotated[float, msgspec.Meta(gt=0)]


class Header(msgspec.Struct, rename=lambda field: field.replace("__", ".")):
    """The metadata that says how the model is built, without the `llama.` before each key."""

    block_count: Count
    context_length: Count
    embedding_length: Count
    feed_forward_length: Count
    attention__head_count: Count
    attention__layer_norm_rms_epsilon: float
    attention__head_count_kv: Count | None = None
    attention__key_length: Count | None = None
    rope__dimension_count: Count | None = None
    rope__freq_base: Factor = 10000.0
    # a factor without a type is linear; `scale_linear` is from before there were types
    rope__scale_linear: Factor = 1.0
    rope__scaling__type: Literal["none", "linear", "yarn"] = "linear"
    rope__scaling__factor: Factor | None = None
    rope__scaling__original_context_length: Count | None = None
    rope__scaling__attn_factor: Factor | None = None
    rope__scaling__yarn_beta_fast: Factor | None = None
    rope__scaling__yarn_beta_slow: Factor | None = None


def names(file: GGUFFile) -> dict[str, str]:
    """Hugging Face's name of each tensor -> the file's. Raises ModelError for a tensor without one."""
    found = {}
    for name in file.tensors:
        stem, _, kind = name.rpartition(".")
        if name == ROPE_FACTORS:
            continue
        if stem in OUTER:
            found[f"{OUTER[stem]}.{kind}"] = name
            continue
        parts = stem.split(".")
        if len(parts) != 3 or parts[0] != "blk" or parts[2] not in INNER:
            raise ModelError(f"tensor {name} in {file.path} has no place in a Llama")
        found[f"model.layers.{parts[1]}.{INNER[parts[2]]}.{kind}"] = name
    return found


def config(file: GGUFFile) -> dict[str, Any]:
    """The keys of a `config.json`. Raises ModelError naming a key that is missing or wrong.

    llama3's scaling is stored as one divisor per rotary frequency: `rope_parameters` has them as
    `factors`, under the `rope_type` of that name.
    """
    header = _header(file)
    heads = header.attention__head_count
    head_dim = header.attention__key_length or header.embedding_length // heads
    if (turned := header.rope__dimension_count or head_dim) != head_dim:
        raise ModelError(f"{file.path} turns {turned} of {head_dim} features of a head; a Llama turns all")
    if EMBEDDING not in file.tensors:
        raise ModelError(f"{file.path} has no tensor {EMBEDDING}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": header.embedding_length,
        "intermediate_size": header.feed_forward_length,
        "num_hidden_layers": header.block_count,
        "num_attention_heads": heads,
        "num_key_value_heads": header.attention__head_count_kv or heads,
        "head_dim": head_dim,
        "max_position_embeddings": header.context_length,
        "rms_norm_eps": header.attention__layer_norm_rms_epsilon,
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "rope_parameters": _rope(file, header),
    }


def to_half_split(name: str, value: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """A GGUF stores rotary pairs of q and k side by side; ours lie half a head apart."""
    if "self_attn.q_proj" in name:
        heads = config["num_attention_heads"]
    elif "self_attn.k_proj" in name:
        heads = config["num_key_value_heads"]
    else:
        return value
    pairs = value.reshape(heads, -1, 2, *value.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(value.shape)


def _header(file: GGUFFile) -> Header:
    prefix = "llama."
    meta = {key.removeprefix(prefix): file.metadata[key] for key in file.metadata if key.startswith(prefix)}
    try:
        return msgspec.convert(meta, Header)
    except msgspec.ValidationError as error:
        raise ModelError(f"{file.path} does not describe a Llama: metadata llama.*: {error}") from None


def _rope(file: GGUFFile, header: Header) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": header.rope__freq_base, "rope_type": "default"}
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
