"""How much memory a load takes at its peak, beside what it leaves: `python -m bench.loading`

Writes a Llama of 166 million random parameters (332 MB in bfloat16) in each format, loads it in a process
of its own as an engine would, and prints a table. `python -m bench.loading safetensors gguf` needs no torch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, WIDE, HEADS, VOCAB, LAYERS = 1024, 4096, 16, 32000, 6
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
GGUF = {
    "llama.block_count": LAYERS,
    "llama.context_length": 2048,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": WIDE,
    "llama.attention.head_count": HEADS,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "_proj": "",
}
THIS = (sys.executable, "-m", "bench.loading")
FORMS = ("safetensors", "bin", "gguf")


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
    found["lm_head"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        found |= {f"{at}{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")}
        found |= {f"{at}self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        found |= {f"{at}mlp.{name}_proj": (WIDE, HIDDEN) for name in ("gate", "up")}
        found[f"{at}mlp.down_proj"] = (HIDDEN, WIDE)
    return {f"{name}.weight": shape for name, shape in found.items()}


def write(form: str, place: Path) -> None:
    random = np.random.default_rng(0)
    # bfloat16 numbers between 0.0002 and 0.02
    tensors = {name: random.integers(0x3951, 0x3CA4, shape, np.uint16) for name, shape in shapes().items()}
    if form == "gguf":
        write_gguf(tensors, place / "model.gguf")
        return
    (place / "config.json").write_text(json.dumps(CONFIG))
    if form == "safetensors":
        import ml_dtypes
        from safetensors.numpy import save_file

        typed = {name: x.view(ml_dtypes.bfloat16) for name, x in tensors.items()}
        save_file(typed, place / "model.safetensors")
    else:
        import torch

        halves = {name: torch.from_numpy(x).view(torch.bfloat16) for name, x in tensors.items()}
        torch.save(halves, place / "pytorch_model.bin")


def write_gguf(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Matrices as Q8_0, of which one number takes 34 / 32 bytes."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in GGUF.items():
        writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, x in tensors.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if x.ndim == 1:
            writer.add_tensor(name, x.astype(np.float32))
        else:
            blocks = np.zeros((len(x), x.shape[1] // 32), [("d", "<f2"), ("q", "i1", 32)])
            blocks["d"], blocks["q"] = 1e-4, x.reshape(*blocks.shape, 32) & 127
            raw = blocks.view(np.uint8).reshape(len(x), -1)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Peak(threading.Thread):
    """The most memory that the process had since this began, looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = dict.fromkeys(self.now(), 0)
        self._ended = threading.Event()

    @staticmethod
    def now() -> dict[str, int]:
        """Bytes: in all, the process's own, and pages of files."""
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = {key: value for key, _, value in (line.partition(":") for line in lines)}
        return {key: int(sizes[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon", "RssFile")}

    def run(self) -> None:
        while not self._ended.wait(0.001):
            self.most = {key: max(value, self.most[key]) for key, value in self.now().items()}

    def end(self) -> dict[str, int]:
        self._ended.set()
        self.join()
        return self.most


def measure(place: str) -> dict[str, Any]:
    """One load in this process, as an engine does it."""
    import jax

    from jaxserve.config import EngineConfig
    from jaxserve.engine.devices import make_mesh, platform_of, weight_type
    from jaxserve.engine.kernels import choose_kernels
    from jaxserve.engine.model import LoadedModel
    from jaxserve.loading.checkpoint import open_checkpoint
    from jaxserve.loading.hub import resolve

    config = EngineConfig()
    mesh = make_mesh(config, 0)
    checkpoint = open_checkpoint(resolve(place))
    dtype = weight_type(config.dtype, checkpoint.config, platform_of(mesh.devices.flat[0]))
    model = LoadedModel(checkpoint.config, mesh, dtype, choose_kernels(config, mesh, dtype))
    jax.block_until_ready(jax.device_put(np.zeros(1)))
    before, peak, began = Peak.now(), Peak(), time.perf_counter()
    peak.start()
    model.load(checkpoint)
    jax.block_until_ready(model.weights)
    seconds, most = time.perf_counter() - began, peak.end()
    del checkpoint
    after = Peak.now()
    return {
        "weights": model.bytes,
        "seconds": seconds,
        **{f"peak {key}": most[key] - before[key] for key in most},
        **{f"left {key}": after[key] - before[key] for key in most},
    }


def main(forms: list[str]) -> None:
    print("| format | file | weights | peak of the process | its own | files' pages | left | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for form in forms:
        with tempfile.TemporaryDirectory() as place:
            subprocess.run([*THIS, "--write", form, place], check=True)
            size = sum(file.stat().st_size for file in Path(place).iterdir())
            command = [*THIS, "--measure", place]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row = [size, found["weights"]]
        row += [found[key] for key in ("peak VmRSS", "peak RssAnon", "peak RssFile", "left VmRSS")]
        print(
            f"| {form} | {' | '.join(f'{value / 1e6:.0f} MB' for value in row)} | {found['seconds']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", metavar="MODEL")
    parser.add_argument("--write", nargs=2, metavar=("FORM", "DIRECTORY"))
    parser.add_argument("forms", nargs="*", default=FORMS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
    elif args.write:
        write(args.write[0], Path(args.write[1]))
    else:
        main(args.forms)
