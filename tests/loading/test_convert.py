"""`jaxserve convert`: what it writes is the model that it was given, on any mesh."""

import os
import subprocess
import sys

import numpy as np
import pytest

from jaxserve.cli import main
from jaxserve.errors import ModelError
from jaxserve.loading.checkpoint import open_checkpoint
from jaxserve.loading.hub import resolve
from jaxserve.text.tokenizer import load_tokenizer

ON_TWO_DEVICES = """
import sys
import jax.numpy as jnp
from jaxserve.config import EngineConfig
from jaxserve.engine.devices import make_mesh
from jaxserve.engine.model import LoadedModel
from jaxserve.loading.checkpoint import open_checkpoint

models = []
for path in sys.argv[1:]:
    checkpoint = open_checkpoint(path)
    model = LoadedModel(checkpoint.config, make_mesh(EngineConfig(mesh="2x1"), 0), jnp.dtype("float32"))
    model.load(checkpoint)
    models.append(model)
one, other = (model.weights for model in models)
assert any(x.addressable_shards[0].data.shape != x.shape for x in other)
print(all(x.sharding == y.sharding and bool((x == y).all()) for x, y in zip(one, other, strict=True)))
"""


def same_tensors(ours, wanted):
    assert ours.shapes() == wanted.shapes()
    for name in wanted.shapes():
        np.testing.assert_array_equal(ours.tensor(name), wanted.tensor(name), strict=True)


def test_a_directory(model_dir, tmp_path, capsys):
    dest = tmp_path / "new" / "model"
    assert main(["convert", str(model_dir), str(dest)]) == 0
    assert capsys.readouterr().out == f"{dest}\n"
    assert {file.name for file in dest.iterdir()} == {
        *("config.json", "tokenizer.json", "tokenizer_config.json", "orbax", "orbax.index.json")
    }
    assert [entry.name for entry in dest.parent.iterdir()] == ["model"]
    assert resolve(str(dest)) == dest
    wanted = open_checkpoint(model_dir)
    ours = open_checkpoint(dest)
    assert ours.config == wanted.config
    same_tensors(ours, wanted)


def test_any_mesh_loads_it(model_dir, tmp_path):
    dest = tmp_path / "model"
    assert main(["convert", str(model_dir), str(dest)]) == 0
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", ON_TWO_DEVICES, str(model_dir), str(dest)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert result.stdout == "True\n"


def test_a_gguf(write, tmp_path):
    source = write({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 40})
    dest = tmp_path / "converted"
    assert main(["convert", str(source), str(dest)]) == 0
    wanted, ours = open_checkpoint(source), open_checkpoint(dest)
    assert (ours.config, ours.eos_token_ids) == (wanted.config, wanted.eos_token_ids)
    same_tensors(ours, wanted)
    theirs, here = load_tokenizer(source), load_tokenizer(dest)
    assert here.backend.to_str() == theirs.backend.to_str()
    assert (here.named, here.eos_ids) == (theirs.named, theirs.eos_ids)


def test_what_is_refused(model_dir, tmp_path, capsys):
    dest = tmp_path / "model"
    assert main(["convert", str(model_dir), str(tmp_path)]) == 1
    assert f"{tmp_path} is there already" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "absent.gguf"), str(dest)]) == 1
    assert "absent.gguf" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_one(model_dir, tmp_path):
    dest = tmp_path / "model"
    assert main(["convert", str(model_dir), str(dest)]) == 0
    for file in (dest / "orbax").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ModelError, match=r"tensor model.norm.weight in .*orbax cannot be read: "):
        open_checkpoint(dest).tensor("model.norm.weight")
    (dest / "orbax.index.json").write_text('{"a": ["F32", "x"]}')
    with pytest.raises(ModelError, match=r"orbax.index.json cannot be read"):
        open_checkpoint(dest)
