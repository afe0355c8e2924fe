"""What of a config.json is refused, and that it says so in its own words."""

from typing import Any

import pytest

from jaxserve.errors import ModelError
from jaxserve.models.registry import ARCHITECTURES, model_class

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def config_of(architecture: str, **changes: Any) -> Any:
    """With None a key is left out."""
    keys = {key: value for key, value in (SIZES | changes).items() if value is not None}
    config = keys | {"architectures": [architecture]}
    return model_class(config).Config.from_config(config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes_are_enough_for_any_family(architecture):
    config = config_of(architecture)
    assert config.longest == 64 and config.vocab_size == 32


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("GPT2LMHeadModel", {"hidden_size": None}, "`n_embd`"),
        ("GPT2LMHeadModel", {"hidden_size": None, "n_embd": "16"}, "`$.n_embd`"),
        ("GPT2LMHeadModel", {"hidden_size": "16"}, "`$.hidden_size`"),
        ("GPT2LMHeadModel", {"n_head": 17}, "17 heads"),
        ("GPT2LMHeadModel", {"add_cross_attention": True}, "`$.add_cross_attention`"),
        ("MptForCausalLM", {"attn_config": {"alibi": False}}, "`$.attn_config.alibi`"),
        ("FalconForCausalLM", {"alibi": True}, "`$.alibi`"),
        ("OPTForCausalLM", {"word_embed_proj_dim": 8}, "word_embed_proj_dim 8"),
        ("MistralForCausalLM", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ("MistralForCausalLM", {"layer_types": ["chunked_attention"] * 2}, "`$.layer_types[0]`"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "no_rope_layers has 1"),
        ("GPTNeoXForCausalLM", {"rotary_pct": 0.4}, "3 of 8 features"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "longrope"}}, "'longrope'"),
    ],
)
def test_what_is_not_supported_is_named(architecture, changes, said):
    with pytest.raises(ModelError) as caught:
        config_of(architecture, **changes)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_gemma_s_first_configs_mean_the_approximation():
    assert config_of("GemmaForCausalLM", hidden_act="gelu").hidden_act == "gelu_pytorch_tanh"


def test_a_family_s_own_names_count_for_more():
    found = config_of("Gemma2ForCausalLM", hidden_act="gelu", hidden_activation="gelu_pytorch_tanh")
    assert found.hidden_act == "gelu_pytorch_tanh"
