"""What is wrong with a checkpoint is said in one line, from headers alone, before anything is compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.config import EngineConfig
from jaxserve.engine import core
from jaxserve.engine.devices import make_mesh
from jaxserve.engine.model import LoadedModel
from jaxserve.errors import ModelError
from jaxserve.loading.checkpoint import open_checkpoint

from . import conftest
from .test_torch_file import Storage, archive, dumped, tensor

UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
GGUF_NAMES = {UP: "blk.1.ffn_up.weight", NORM: "output_norm.weight"}
FILES = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin", "gguf": "model.gguf"}

Tensors = dict[str, np.ndarray]


def open_model(path: Path) -> None:
    """What a start does before it compiles and reads weights."""
    checkpoint = open_checkpoint(path)
    model = LoadedModel(checkpoint.config, make_mesh(EngineConfig(), 0), np.dtype("float32"))
    model.check(checkpoint)


def refused(path: Path, *said: str) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in said), message
    return message


@pytest.fixture(params=FILES)
def form(request):
    return request.param


@pytest.fixture
def model(form, make_llama, write, tmp_path):
    """(the path of a model, how to write its tensors anew, its tensors under its own names)."""
    if form == "gguf":
        return write(), lambda values: write(values=values), conftest.tensors()
    place = make_llama(tmp_path.name)
    values = load_file(place / "model.safetensors")

    def save(values: Tensors) -> None:
        if form == "safetensors":
            save_file(values, place / "model.safetensors")
        else:
            (place / "model.safetensors").unlink(missing_ok=True)
            save_torch(place / "pytorch_model.bin", values)

    save(values)
    return place, save, values


def save_torch(path: Path, values: Tensors) -> None:
    views, storages = {}, {}
    for i, (name, value) in enumerate(values.items()):
        strides = tuple(stride // 4 for stride in np.ascontiguousarray(value).strides)
        views[name] = tensor(Storage(key=str(i), count=value.size), 0, value.shape, strides)
        storages[f"_{i}"] = value.tobytes()
    archive(path, dumped(views), **storages)


def test_tensors(form, model):
    """One test for all mutations, as each makes the same model."""
    path, save, values = model
    theirs = {name: GGUF_NAMES[name] if form == "gguf" else name for name in (UP, NORM)}
    up, norm, file = theirs[UP], theirs[NORM], FILES[form]
    open_model(path)

    save({name: value for name, value in values.items() if name != norm})
    refused(path, f"tensor {NORM} [", "is missing")
    save(values | {up: values[up][:-1]})
    refused(path, f"tensor {UP} in {file}", up, "has shape", "the config asks for")
    save(values | {up: values[up].T.copy()})
    refused(path, f"tensor {UP} in {file}", "has shape")
    renamed = f"{up.removesuffix('.weight')}s.weight"
    save({renamed if name == up else name: value for name, value in values.items()})
    refused(path, renamed if form == "gguf" else f"tensor {UP} [")
    save(values | {"model.layers.1.extra.weight": np.ones(3, np.float32)})
    refused(path, "tensor model.layers.1.extra.weight in ", file, "has no place")


def test_truncated(form, model):
    path, _, _ = model
    file = path if form == "gguf" else path / FILES[form]
    size = file.stat().st_size
    for keep in (size - 32, size // 2, 1000, 100, 30, 5, 0):
        os.truncate(file, keep)
        refused(path, FILES[form], "is not a whole")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rms_norm_eps", float("nan"), "rms_norm_eps is NaN, which is no number"),
        ("rope_theta", float("-inf"), "rope_theta is -Infinity, which is no number"),
        ("hidden_size", None, "hidden_size"),
        ("hidden_size", 64.5, "hidden_size"),
        ("intermediate_size", -1, "intermediate_size"),
        ("vocab_size", 10**12, "model.embed_tokens.weight in model.safetensors"),
        ("num_hidden_layers", 10**12, "num_hidden_layers 1000000000000, and has 21 tensors"),
        ("num_attention_heads", 10**12, "num_attention_heads 1000000000000"),
        ("num_key_value_heads", 3, "3 key-value heads"),
        ("num_hidden_layers", 1, "tensor model.layers.1."),
        ("architectures", ["LlamaForCausalLm"], "nearest: LlamaForCausalLM"),
        ("architectures", None, "is not supported"),
    ],
)
def test_config(make_llama, tmp_path, key, value, said):
    place = make_llama(tmp_path.name)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {key: value}))
    refused(place, said)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("block_count", 2**32 - 1, "num_hidden_layers 4294967295, and has 20 tensors"),
        ("attention.head_count", 2**32 - 1, "num_attention_heads 4294967295"),
        ("embedding_length", 512, "model.embed_tokens.weight in model.gguf (token_embd.weight)"),
        ("feed_forward_length", 2**31, "mlp.down_proj.weight in model.gguf (blk.0.ffn_down.weight)"),
    ],
)
def test_gguf_metadata(write, key, value, said):
    refused(write({f"llama.{key}": value}), said)


def serve(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxserve", "serve", str(path), "--port", "0", "--num-blocks", "16"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("what", ["misshapen", "renamed", "cut"])
def test_the_command_says_it_and_ends(make_llama, write, tmp_path, what):
    if what == "cut":
        path = write()
        os.truncate(path, path.stat().st_size - 4)
        said = "is not a whole GGUF file: tensor blk.1.ffn_down.weight ends beyond the end of the file"
    else:
        path = make_llama(tmp_path.name)
        values = load_file(path / "model.safetensors")
        if what == "misshapen":
            said = f"tensor {UP} in model.safetensors has shape [64, 128], the config asks for [128, 64]"
            values[UP] = values[UP].T.copy()
        else:
            said = f"tensor {NORM} [64] is missing from the checkpoint"
            values["model.norms.weight"] = values.pop(NORM)
        save_file(values, path / "model.safetensors")
    result = serve(path)
    assert (result.returncode, result.stdout) == (1, "")
    assert said in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_nothing_is_compiled_before(make_llama, tmp_path, monkeypatch):
    path = make_llama(tmp_path.name)
    values = load_file(path / "model.safetensors")
    save_file({name: value for name, value in values.items() if name != NORM}, path / "model.safetensors")
    monkeypatch.delattr(core, "Programs")
    with pytest.raises(ModelError, match=f"{NORM} .* is missing"):
        core.EngineCore(EngineConfig(model=str(path), num_blocks=16))
