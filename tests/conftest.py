"""Shared by all tests: the CPU (unless JAX_PLATFORMS says otherwise) and the default model.

`$JAXSERVE_HOME` is the user's own, so that the model is fetched once and compiled programs last between runs.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Only a missing compiler skips: a kernel that does not compile is a failure."""
    if item.get_closest_marker("compiler"):
        from jaxserve.pallas_kernels import native

        try:
            native.compiler()
        except native.NativeError as error:
            pytest.skip(str(error))
    if marker := item.get_closest_marker("aot"):
        from tests.aot import missing

        if why := missing(*marker.args):
            pytest.skip(why)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What programs for other devices became, as a table."""
    from tests.aot import MADE, tables

    if MADE:
        terminalreporter.write_line(tables(MADE))


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's .gguf file, fetched as a user's first start would."""
    from jaxserve.config import DEFAULT_MODEL
    from jaxserve.loading.hub import resolve

    return resolve(DEFAULT_MODEL)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|fails|>"]


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_llama(name, **config) writes a random Llama (float32 safetensors, no tokenizer); its directory."""

    def make(name: str, seed: int = 0, **overrides: Any) -> Path:
        path = tmp_path_factory.mktemp("models") / name
        path.mkdir()
        write_llama(path, seed, overrides)
        return path

    return make


@pytest.fixture(scope="session")
def model_dir(make_llama: Callable[..., Path]) -> Path:
    """A tiny random Llama with a byte-level tokenizer: six special tokens, then one per byte."""
    path = make_llama("tiny-llama", eos_token_id=0)
    write_byte_tokenizer(path)
    return path


def write_llama(path: Path, seed: int, overrides: dict[str, Any]) -> None:
    """config.json and model.safetensors of a Llama whose logits vary enough to choose between tokens."""
    import numpy as np
    from safetensors.numpy import save_file

    c = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 288,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
    } | overrides
    c.setdefault("head_dim", c["hidden_size"] // c["num_attention_heads"])
    (path / "config.json").write_text(json.dumps(c))
    hidden, wide, dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
        attention["o_proj"] = (hidden, q)
        mlp = {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}
        for part, table, biased in (("self_attn", attention, "attention_bias"), ("mlp", mlp, "mlp_bias")):
            for name, shape in table.items():
                shapes[f"model.layers.{i}.{part}.{name}.weight"] = shape
                if c[biased]:
                    shapes[f"model.layers.{i}.{part}.{name}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (hidden,)
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        value = random.standard_normal(shape, np.float32)
        tensors[name] = 1 + 0.1 * value if "norm" in name else value * 1.5 / shape[-1] ** 0.5
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def write_byte_tokenizer(path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": SPECIAL[0], "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def interpreted_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For kernels of TPUs in interpret mode: a masked store to a part of an array, which jax lacks."""
    import jax.numpy as jnp
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

    class Played:
        def __getattr__(self, name: str) -> Any:
            return getattr(pltpu, name)

        @staticmethod
        def store(ref: Any, value: Any, *, mask: Any) -> None:
            ref[...] = jnp.where(mask, value, ref[...])

    monkeypatch.setattr(kernel, "pltpu", Played())
