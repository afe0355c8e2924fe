"""Safetensors directories: single and sharded, as transformers writes them, and broken in every way."""

import json
import mmap
import os
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.errors import ModelError
from jaxserve.loading.checkpoint import INDEX, open_checkpoint
from jaxserve.loading.safetensors_file import SafetensorsFile


@pytest.fixture(scope="module")
def llama():
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        eos_token_id=[2, 7],
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_as_transformers_saves_it(tmp_path, llama, shard_size, dtype):
    import torch

    model = llama.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "10KB")

    checkpoint = open_checkpoint(tmp_path)
    expected = model.state_dict()
    assert checkpoint.shapes() == {name: tuple(value.shape) for name, value in expected.items()}
    for name, value in expected.items():
        ours = checkpoint.tensor(name)
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours.astype(np.float32), value.float().numpy())
        assert (tmp_path / checkpoint.source(name)).is_file()
    assert checkpoint.config["num_key_value_heads"] == 2
    assert checkpoint.eos_token_ids == [2, 7]


def write_model(path: Path, **files: dict[str, np.ndarray]) -> None:
    """A model directory whose files hold the given tensors."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    for stem, tensors in files.items():
        save_file(tensors, path / f"{stem}.safetensors")


def write_index(path: Path, **file_of: str) -> None:
    (path / INDEX).write_text(json.dumps({"weight_map": file_of}))


def raw_file(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_tensors_are_views_of_the_file(tmp_path):
    write_model(tmp_path, model={"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    view = open_checkpoint(tmp_path).tensor("a")
    base = view
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
    assert not view.flags.writeable


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int32, np.uint8, np.bool_])
def test_every_dtype_keeps_its_bits(tmp_path, dtype):
    values = {"matrix": np.array([[0, 1], [1, 0]]).astype(dtype), "empty": np.zeros((0, 3), dtype)}
    save_file(values, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    for name, value in values.items():
        ours = file.tensor(name)
        assert (ours.dtype, ours.shape, ours.tobytes()) == (value.dtype, value.shape, value.tobytes())


def test_a_scalar_and_float8(tmp_path):
    header = (
        b'{"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        b'"f":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[4,6]}}'
    )
    raw_file(tmp_path / "x.safetensors", header, struct.pack("<f", 2.5) + b"\x38\xb8")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.tensor("s").shape == () and file.tensor("s") == 2.5
    assert file.tensor("f").astype(np.float32).tolist() == [1.0, -1.0]


def test_generation_config_adds_ends(tmp_path):
    write_model(tmp_path, model={"a": np.zeros(1, np.float32)})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert open_checkpoint(tmp_path).eos_token_ids == [7, 2]


def test_a_second_copy_beside_the_whole_file_is_not_read(tmp_path):
    tensors = {"a": np.ones(3, np.float32)}
    write_model(tmp_path, model=tensors, consolidated={"other": np.ones(2, np.float32)})
    assert list(open_checkpoint(tmp_path).shapes()) == ["a"]


class TestBroken:
    """Every error is one line with the file, and the tensor where there is one."""

    @pytest.fixture
    def place(self, tmp_path):
        part = np.ones((2, 3), np.float32)
        write_model(tmp_path, one={"a": part}, two={"b": part})
        write_index(tmp_path, a="one.safetensors", b="two.safetensors")
        assert set(open_checkpoint(tmp_path).shapes()) == {"a", "b"}
        return tmp_path

    def check(self, place, *said):
        with pytest.raises(ModelError) as caught:
            open_checkpoint(place)
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in said), message

    def test_missing_shard(self, place):
        (place / "two.safetensors").unlink()
        self.check(place, "two.safetensors", "missing")

    @pytest.mark.parametrize("keep", [0, 5, 40, -1])
    def test_truncated(self, place, keep):
        file = place / "two.safetensors"
        os.truncate(file, keep if keep >= 0 else file.stat().st_size + keep)
        self.check(place, "two.safetensors", "not a whole")

    @pytest.mark.parametrize(
        "header",
        [
            b"not json",
            b"[]",
            b'{"b": 3}',
            b'{"b": {"dtype": "F32", "shape": [2, 3]}}',
            b'{"b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}}',
            b'{"b": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}}',
            b'{"b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [-24, 0]}}',
            b'{"b": {"dtype": "F32", "shape": [2, 300], "data_offsets": [0, 2400]}}',
        ],
    )
    def test_header(self, place, header):
        raw_file(place / "two.safetensors", header, bytes(24))
        self.check(place, "two.safetensors", "not a whole")

    def test_header_longer_than_the_file(self, place):
        (place / "two.safetensors").write_bytes(b"\xff" * 64)
        self.check(place, "two.safetensors", "not a whole")

    def test_unknown_type(self, place):
        header = b'{"b": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'
        raw_file(place / "two.safetensors", header, b"\0")
        self.check(place, "two.safetensors", "tensor b", "F4", "BF16")

    def test_index_names_an_absent_tensor(self, place):
        write_index(place, a="one.safetensors", c="two.safetensors")
        self.check(place, "tensor c", "two.safetensors", INDEX)

    def test_index_leads_out_of_the_directory(self, place):
        shutil.copy(place / "one.safetensors", place.parent / "outside.safetensors")
        write_index(place, a="../outside.safetensors")
        self.check(place, "../outside.safetensors", INDEX)

    @pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', "{}"])
    def test_index_is_nonsense(self, place, text):
        (place / INDEX).write_text(text)
        self.check(place, INDEX)

    def test_no_config(self, place):
        (place / "config.json").unlink()
        self.check(place, "config.json")

    def test_nothing_there(self, tmp_path):
        self.check(tmp_path, "no .safetensors", "0 .gguf")
        self.check(tmp_path / "absent", "absent", "neither")
