"""Perplexity of the default model over a text that comes with Python, by the types of weights and KV cache:

    python -m bench.perplexity [--windows 8] [--tokens 1024] [--transformers]

The text is Python's language reference as `pydoc_data.topics` has it, in windows that know nothing of each
other. `--transformers` computes the same with transformers, on the same dequantised weights.
"""

import argparse
import math
import pydoc_data.topics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.transformers_llama import transformers_llama
from jaxserve.config import DEFAULT_MODEL, EngineConfig
from jaxserve.engine.compilation import compiler_options
from jaxserve.engine.devices import kv_type, make_mesh, platform_of
from jaxserve.engine.kernels import choose_kernels
from jaxserve.engine.model import LoadedModel
from jaxserve.loading.checkpoint import Checkpoint, open_checkpoint
from jaxserve.loading.hub import resolve
from jaxserve.pallas_kernels.paged_attention import PoolShape, empty_pool, ragged_meta
from jaxserve.text.tokenizer import load_tokenizer

FORMS = [
    {"dtype": "float32"},
    {"dtype": "float32", "quantization": "int8"},
    {"dtype": "float32", "kv_cache_dtype": "int8"},
    {"dtype": "float32", "kv_cache_dtype": "fp8"},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "quantization": "int8"},
    {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
    {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
]
BLOCK = 32


def windows(place: Path, count: int, length: int) -> np.ndarray:
    """int32 [count, length]: the tokens of the longest topics, one after the other."""
    topics = sorted(pydoc_data.topics.topics.values(), key=len, reverse=True)
    ids = load_tokenizer(place).encode("\n".join(topics[:12]))[: count * length]
    return np.array(ids, np.int32).reshape(count, length)


def ours(checkpoint: Checkpoint, ids: np.ndarray, config: EngineConfig) -> float:
    """Mean negative log likelihood of a token, by the functions that the engine's programs are made from."""
    mesh = make_mesh(config, 0)
    kernels = choose_kernels(config, mesh, jnp.dtype(config.dtype))
    model = LoadedModel(checkpoint.config, mesh, config.dtype, kernels, config.quantization)
    model.load(checkpoint)
    step, length = model.functions(), ids.shape[1]
    blocks = -(-length // BLOCK)
    bits = platform_of(mesh.devices.flat[0]).kv_as_bits
    number = kv_type(config.kv_cache_dtype, model.dtype)
    pool = PoolShape(blocks + 1, model.kv_heads, BLOCK, model.config.head_dim, number, bits)

    def run(weights: Any, ids: jax.Array) -> jax.Array:
        kv = [empty_pool(pool)] * model.config.num_hidden_layers
        table = jnp.arange(1, blocks + 1, dtype=jnp.int32)[None]
        meta = ragged_meta(table, jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32), length)
        x, _ = step.hidden(weights, ids, meta, kv)
        logits = jax.nn.log_softmax(step.logits(weights, x, jnp.int32(length))[:-1])
        return -jnp.take_along_axis(logits, ids[1:, None], axis=1).mean()

    options = compiler_options(mesh.devices.flat[0].platform, model.dtype)
    program = jax.jit(run).lower(model.weights, ids[0]).compile(compiler_options=options)
    return float(np.mean([program(model.weights, window) for window in ids]))


def theirs(checkpoint: Checkpoint, ids: np.ndarray, dtype: str) -> float:
    import torch

    model = transformers_llama(checkpoint).to(getattr(torch, dtype))
    found = []
    with torch.inference_mode():
        for window in torch.tensor(ids, dtype=torch.long):
            logits = model(window[None]).logits[0, :-1].float()
            found.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--transformers", action="store_true")
    args = parser.parse_args()
    place = resolve(DEFAULT_MODEL)
    checkpoint = open_checkpoint(place)
    ids = windows(place, args.windows, args.tokens)
    for form in FORMS:
        loss = ours(checkpoint, ids, EngineConfig(**form))
        name = " ".join(f"{option}={value}" for option, value in form.items())
        print(f"{name}: loss {loss:.4f}, perplexity {math.exp(loss):.3f}", flush=True)
    for dtype in ("float32", "bfloat16") if args.transformers else ():
        loss = theirs(checkpoint, ids, dtype)
        print(f"transformers {dtype}: loss {loss:.4f}, perplexity {math.exp(loss):.3f}", flush=True)


if __name__ == "__main__":
    main()
