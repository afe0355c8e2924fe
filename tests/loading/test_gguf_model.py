"""GGUF files of architecture llama: tensors and config under Hugging Face's names."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize

from jaxserve.errors import ModelError
from jaxserve.loading.checkpoint import open_checkpoint
from jaxserve.loading.dequantise import FORMATS
from jaxserve.models.llama import LlamaConfig

from .conftest import HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB, tensors

DIM = HIDDEN // HEADS


def interleaved(value, heads):
    """What llama.cpp's converter does to q and k: halves of a head to pairs."""
    return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def test_default_model_is_what_transformers_reads(default_model):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(
        default_model.parent, gguf_file=default_model.name, dtype=torch.float32
    )
    ours = open_checkpoint(default_model)
    for key in sorted(ours.config.keys() - {"architectures", "rope_parameters"}):
        assert ours.config[key] == getattr(theirs.config, key), key
    rope = {key: theirs.config.rope_parameters[key] for key in ("rope_type", "rope_theta")}
    assert ours.config["rope_parameters"] == rope
    assert ours.eos_token_ids == [theirs.config.eos_token_id]

    state = theirs.state_dict()
    assert ours.config["tie_word_embeddings"] and state.pop("lm_head.weight") is not None
    assert ours.shapes() == {name: tuple(value.shape) for name, value in state.items()}
    for name, value in state.items():
        np.testing.assert_array_equal(ours.tensor(name), value.numpy(), err_msg=name)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: FORMATS[kind].name)
def test_every_type(write, kind):
    form, theirs, rng = FORMATS[kind], gguf.GGMLQuantizationType(kind), np.random.default_rng(kind)
    values = tensors()
    up = values["blk.1.ffn_up.weight"]
    if form.unpack is None:
        expected = up.astype(form.layout)
        raw = expected.view(np.uint8)
    else:
        blocks = np.zeros(up.size // form.size, form.layout)
        for name in form.layout.names:
            field = blocks[name]
            scale = field.dtype == np.float16
            field[...] = rng.normal(size=field.shape) if scale else rng.integers(0, 127, field.shape)
        raw = blocks.view(np.uint8).reshape(len(up), -1)
        expected = dequantize(raw, theirs)
    values["blk.1.ffn_up.weight"] = (raw, theirs)
    ours = open_checkpoint(write(values=values)).tensor("model.layers.1.mlp.up_proj.weight")
    assert ours.dtype == (ml_dtypes.bfloat16 if form.name == "BF16" else expected.dtype)
    np.testing.assert_array_equal(ours, expected)


def test_q_and_k_come_back_in_halves(write):
    values, original = tensors(), {}
    for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
        for kind, shape in (("weight", (heads * DIM, HIDDEN)), ("bias", (heads * DIM,))):
            value = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
            original[f"model.layers.0.self_attn.{name[-1]}_proj.{kind}"] = value
            values[f"blk.0.{name}.{kind}"] = interleaved(value, heads)
    checkpoint = open_checkpoint(write(values=values))
    assert checkpoint.config["attention_bias"] and not checkpoint.config["mlp_bias"]
    for name, value in original.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), value, strict=True)


def test_config_ends_and_names(write):
    checkpoint = open_checkpoint(write())
    assert checkpoint.eos_token_ids == [2, 5]
    assert len(checkpoint.shapes()) == len(tensors())
    config = LlamaConfig.from_config(checkpoint.config)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (LAYERS, HIDDEN, VOCAB)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (HEADS, KV_HEADS, DIM)
    assert config.rms_norm_eps == np.float32(1e-5)
    assert config.tie_word_embeddings


def test_untied_output(write):
    head = np.ones((VOCAB, HIDDEN), np.float32)
    checkpoint = open_checkpoint(write(values=tensors() | {"output.weight": head}))
    assert not checkpoint.config["tie_word_embeddings"]
    np.testing.assert_array_equal(checkpoint.tensor("lm_head.weight"), head)


def test_defaults_of_metadata_that_may_be_absent(write):
    optional = ("attention.head_count_kv", "rope.freq_base")
    config = open_checkpoint(write({f"llama.{key}": None for key in optional})).config
    assert config["num_key_value_heads"] == HEADS
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


SCALING = "llama.rope.scaling."


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({SCALING + "type": "none", SCALING + "factor": 4.0}, {"rope_type": "default"}),
        ({SCALING + "type": "linear", SCALING + "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({SCALING + "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {SCALING + "type": "yarn", SCALING + "factor": 4.0, SCALING + "original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        (
            {
                SCALING + "type": "yarn",
                SCALING + "factor": 4.0,
                SCALING + "attn_factor": 1.0,
                SCALING + "yarn_beta_fast": 16.0,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "attention_factor": pytest.approx(1 + 0.1 * np.log(4)),
                "beta_fast": 16.0,
            },
        ),
    ],
)
def test_rope_scaling(write, metadata, expected):
    config = open_checkpoint(write(metadata)).config
    assert config["rope_parameters"] == {"rope_theta": 10000.0} | expected
    LlamaConfig.from_config(config)


def test_llama3_s_factors(write):
    factors = np.linspace(1, 8, DIM // 2, dtype=np.float32)
    checkpoint = open_checkpoint(write(values=tensors() | {"rope_freqs.weight": factors}))
    rope = checkpoint.config["rope_parameters"]
    assert (rope["rope_type"], rope["factors"]) == ("factors", factors.tolist())
    assert LlamaConfig.from_config(checkpoint.config).rope.options["factors"] == factors.tolist()
    assert len(checkpoint.shapes()) == len(tensors())


REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        *(({f"llama.{key}": None}, f"`{key}`") for key in REQUIRED),
        ({"llama.attention.head_count": 0}, "attention.head_count"),
        ({"llama.attention.head_count": "four"}, "attention.head_count"),
        ({"llama.attention.head_count_kv": [2, 2]}, "attention.head_count_kv"),
        ({"llama.rope.dimension_count": DIM // 2}, f"turns {DIM // 2} of {DIM}"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"split.count": 3}, "3 parts"),
    ],
)
def test_metadata_that_is_refused(write, metadata, said):
    with pytest.raises(ModelError) as caught:
        open_checkpoint(write(metadata))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"token_embd.weight": None}, "no tensor token_embd.weight"),
        ({"blk.0.ffn_gate_inp.weight": np.zeros((2, 2), np.float32)}, "blk.0.ffn_gate_inp.weight"),
        ({"extra": np.zeros(2, np.float32)}, "extra"),
    ],
)
def test_tensors_that_are_refused(write, values, said):
    wanted = {name: value for name, value in (tensors() | values).items() if value is not None}
    with pytest.raises(ModelError, match=said):
        open_checkpoint(write(values=wanted))


def test_another_architecture(write):
    with pytest.raises(ModelError, match="architecture 'mamba'; supported in GGUF: llama, qwen2"):
        open_checkpoint(write(arch="mamba"))


def test_a_directory_with_two_files(write, tmp_path):
    path = write()
    assert open_checkpoint(tmp_path).path == path
    (tmp_path / "other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match=r"2 \.gguf files: give the path of one"):
        open_checkpoint(tmp_path)
