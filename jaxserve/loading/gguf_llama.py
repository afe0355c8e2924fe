"""What a GGUF of architecture `llama` calls things, in Hugging Face's names."""

from collections.abc import Mapping
from typing import Any

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
ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies: how a GGUF stores llama3's scaling."""


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
    """The keys of a `config.json`. Raises ModelError naming a key that is missing."""
    meta = file.metadata
    try:
        heads = meta["llama.attention.head_count"]
        features = meta["llama.embedding_length"]
        found = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": features,
            "intermediate_size": meta["llama.feed_forward_length"],
            "num_hidden_layers": meta["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
            "head_dim": meta.get("llama.attention.key_length", features // heads),
            "max_position_embeddings": meta["llama.context_length"],
            "rms_norm_eps": float(np.float32(meta["llama.attention.layer_norm_rms_epsilon"])),
            "vocab_size": file.tensors["token_embd.weight"].shape[0],
        }
    except KeyError as error:
        raise ModelError(f"{file.path} has no {error.args[0]}") from None
    found["tie_word_embeddings"] = "output.weight" not in file.tensors
    found["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    found["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    found["rope_parameters"] = _rope(file, meta)
    return found


def _rope(file: GGUFFile, meta: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": meta.get("llama.rope.freq_base", 10000.0), "rope_type": "default"}
    kind = meta.get("llama.rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(f"rope scaling {kind!r} in {file.path} is not supported; supported: none, linear, yarn")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": meta["llama.rope.scaling.factor"]}
        if trained := meta.get("llama.rope.scaling.original_context_length"):
            rope["original_max_position_embeddings"] = trained
    if ROPE_FACTORS in file.tensors:
        rope |= {"rope_type": "factors", "factors": file.dequantised(ROPE_FACTORS).ravel().tolist()}
    return rope


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
