"""Small GGUF files of architecture llama, written by the `gguf` package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

HIDDEN, WIDE, HEADS, KV_HEADS, VOCAB, LAYERS = 256, 512, 4, 2, 40, 2
WRITERS = {int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}

METADATA: dict[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": WIDE,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 5,
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(VOCAB)],
}


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """A tied model's tensors by GGUF's names, float32."""
    rng = np.random.default_rng(seed)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN)}
    shapes["output_norm.weight"] = (HIDDEN,)
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k.weight": (kv, HIDDEN),
            f"blk.{i}.attn_v.weight": (kv, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_gate.weight": (WIDE, HIDDEN),
            f"blk.{i}.ffn_up.weight": (WIDE, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, WIDE),
        }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a GGUF: `metadata` changes METADATA (None leaves a key out), `values` are its tensors;
    a pair (bytes, ggml type) is written as it is."""

    def write(
        metadata: dict[str, Any] | None = None, values: dict[str, Any] | None = None, arch: str = "llama"
    ) -> Path:
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, arch)
        for key, value in (METADATA | (metadata or {})).items():
            if value is not None:
                getattr(writer, WRITERS[type(value)])(key, value)
        for name, value in (tensors() if values is None else values).items():
            if isinstance(value, tuple):
                writer.add_tensor(name, value[0], raw_dtype=value[1])
            else:
                writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
