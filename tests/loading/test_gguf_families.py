"""GGUF files of every family: as llama.cpp's converter writes them, they are the models that it was given.

The names are those of the `gguf` package, which the converter takes them from.
"""

import json

import gguf
import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.devices import make_mesh
from jaxserve.engine.model import LoadedModel
from jaxserve.loading.checkpoint import open_checkpoint
from jaxserve.loading.gguf_model import FAMILIES, Header
from jaxserve.models.registry import model_class

PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
CHANGES = {
    "llama": PLAIN,
    "qwen2": {"use_sliding_window": False, **PLAIN},
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3": {"query_pre_attn_scalar": 14, "layer_types": None, "num_hidden_layers": 7},
    "smollm3": {"no_rope_layer_interval": 4, "use_sliding_window": False, **PLAIN},
    "starcoder2": {"sliding_window": None},
}
"""What a GGUF cannot say, as it is there."""
PAIRED = {"llama", "smollm3"}
GEMMA = {"gemma", "gemma2", "gemma3"}


def metadata(c):
    """What the converter says of a config."""
    rope = c.rope_parameters
    far = rope.get("full_attention", rope)
    found = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "rope.freq_base": float(far["rope_theta"]),
    }
    dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    found["attention.key_length"] = dim
    if part := far.get("partial_rotary_factor"):
        found["rope.dimension_count"] = int(dim * part)
    if far["rope_type"] != "default":
        found |= {"rope.scaling.type": far["rope_type"], "rope.scaling.factor": float(far["factor"])}
    if "sliding_attention" in rope:
        found["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
    if hasattr(c, "norm_epsilon"):
        found["attention.layer_norm_epsilon"] = c.norm_epsilon
    else:
        found["attention.layer_norm_rms_epsilon"] = c.rms_norm_eps
    if getattr(c, "use_sliding_window", True) and getattr(c, "sliding_window", None):
        found["attention.sliding_window"] = c.sliding_window
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(c, key, None):
            found[key] = getattr(c, key)
    return found


def converted(family, name, value, c):
    """What the converter makes of a tensor."""
    if family in GEMMA and name.endswith("norm.weight"):
        return value + 1
    for part, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
        if family in PAIRED and part in name:
            return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    return value


def same_model(ours, theirs):
    """Two configs say the same to an engine."""
    one, other = (model_class(config).Config.from_config(config) for config in (ours, theirs))
    spelled = {
        "layer_types",
        "max_window_layers",
        "no_rope_layers",
        "sliding_window",
        "attention_bias",
        "mlp_bias",
    }
    for key in one.__struct_fields__:
        if "rope" not in key and "rotary" not in key and key not in spelled:
            a, b = (getattr(config, key) or None for config in (one, other))
            assert a == pytest.approx(b) if isinstance(a, float) else a == b, key
    for layer in range(one.num_hidden_layers):
        assert one.window(layer) == other.window(layer), layer
        assert one.rope_of(layer) == other.rope_of(layer), layer
    assert one.longest == other.longest


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_is_the_one_it_was(tmp_path, family):
    pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.models import reference

    keys = json.loads((reference.CONFIGS / f"{family}.json").read_text()) | CHANGES.get(family, {})
    c = AutoConfig.for_model(keys.pop("model_type"), **keys)
    model = AutoModelForCausalLM.from_config(c)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=value.shape).astype(np.float32)
        for name, value in model.state_dict().items()
        if not (name == "lm_head.weight" and c.tie_word_embeddings)
    }
    [arch] = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family]
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", family)
    for key, value in metadata(c).items():
        kind = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        kind(f"{family}.{key}", value)
    for name, value in tensors.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(theirs, converted(family, name, value, c))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    ours = open_checkpoint(tmp_path)
    assert ours.shapes() == {name: value.shape for name, value in tensors.items()}
    for name, value in tensors.items():
        np.testing.assert_allclose(ours.tensor(name), value, atol=1e-6, err_msg=name)
    same_model(ours.config, c.to_dict() | {"architectures": [type(model).__name__]})
    assert ours.config["model_type"] == c.model_type
    LoadedModel(ours.config, make_mesh(EngineConfig(), 0), np.dtype("float32")).check(ours)


@pytest.mark.parametrize(("layers", "scalar"), [(46, 48), (62, 48), (26, 32)])
def test_the_largest_gemmas_scale_queries_otherwise(layers, scalar):
    header = Header(layers, 128, 192, 512, 4, attention__key_length=32)
    for family in ("gemma2", "gemma3"):
        assert FAMILIES[family].config(header, {})["query_pre_attn_scalar"] == scalar
