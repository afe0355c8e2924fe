"""PyTorch's own files, as torch writes them, and broken or hostile in every way."""

import collections
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.errors import ModelError
from jaxserve.loading.checkpoint import TORCH, open_checkpoint
from jaxserve.loading.torch_file import LATER, STORAGES, TorchFile

DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


def archive(path: Path, program: bytes, **storages: bytes) -> None:
    """A file like torch's, with any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        for key, data in storages.items():
            file.writestr(f"archive/data/{key[1:]}", data)


class Storage:
    def __init__(self, dtype="FloatStorage", key="0", count=4):
        self.pid = ("storage", Global("torch", dtype), key, "cpu", count)


class Global:
    """Pickled as the name of something elsewhere."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickled as a call of such a thing."""

    def __init__(self, function, *args):
        self.function, self.args = function, args


class Pickler(pickle._Pickler):
    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def persistent_id(self, thing):
        return thing.pid if isinstance(thing, Storage) else None

    def save_global_(self, thing):
        self.write(pickle.GLOBAL + f"{thing.module}\n{thing.name}\n".encode())

    def save_call(self, thing):
        self.save(thing.function)
        self.save(thing.args)
        self.write(pickle.REDUCE)

    dispatch[Global] = save_global_
    dispatch[Call] = save_call


def dumped(thing) -> bytes:
    out = io.BytesIO()
    Pickler(out, 2).dump(thing)
    return out.getvalue()


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def tensor(storage=None, offset=0, shape=(2, 2), strides=(2, 1)):
    return Call(REBUILD, storage or Storage(), offset, shape, strides, False, collections.OrderedDict())


FOUR = np.arange(4, dtype="<f4").tobytes()


def test_types_and_views_are_those_of_torch(path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32)
    grid = base.reshape(2, 3, 4)
    state = collections.OrderedDict(
        base=base,
        part=base[5:9],
        turned=grid.permute(2, 0, 1),
        stepped=base[1::3],
        spread=base[:1].expand(3, 5),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(torch.ones(2, 2)),
    )
    for name in DTYPES:
        state[name] = torch.tensor([[0, 1], [1, 0]]).to(getattr(torch, name)).T
    state._metadata = {"": {"version": 1}}
    torch.save(state, path)
    file = TorchFile(path)
    assert list(file.entries) == list(state)
    for name, value in state.items():
        ours = file.tensor(name)
        assert (ours.shape, ours.dtype) == (tuple(value.shape), str(value.dtype).removeprefix("torch."))
        assert not ours.flags.writeable or not ours.size
        wanted = value.detach().to(torch.float64).numpy()
        np.testing.assert_array_equal(ours.astype(np.float64), wanted, err_msg=name)
    shared = [file.entries[name].record for name in ("base", "part", "turned", "stepped", "spread")]
    assert len(set(shared)) == 1
    assert len(STORAGES) + len(LATER) == len(DTYPES)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_model_is_that_of_safetensors(tmp_path, shards):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    wanted = open_checkpoint(tmp_path)
    state = model.state_dict()
    names = list(state)
    if shards == 1:
        torch.save(state, tmp_path / TORCH.whole)
    else:
        parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
        for file, each in parts.items():
            torch.save({name: state[name] for name in each}, tmp_path / file)
        index = {name: file for file, each in parts.items() for name in each}
        (tmp_path / TORCH.index).write_text(json.dumps({"metadata": {}, "weight_map": index}))

    assert all(open_checkpoint(tmp_path).source(name) == "model.safetensors" for name in names)
    values = {name: np.array(wanted.tensor(name)) for name in names}
    (tmp_path / "model.safetensors").unlink()
    ours = open_checkpoint(tmp_path)
    assert len({ours.source(name) for name in names}) == shards
    assert ours.shapes() == {name: value.shape for name, value in values.items()}
    for name, value in values.items():
        np.testing.assert_array_equal(ours.tensor(name), value, strict=True)


def refused(path, *said):
    with pytest.raises(ModelError) as caught:
        TorchFile(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert all(word in message for word in said), message


def test_what_we_write_is_read(path):
    archive(path, dumped({"a": tensor()}), _0=FOUR)
    np.testing.assert_array_equal(TorchFile(path).tensor("a"), [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    "program",
    [
        dumped({"a": Call(Global("os", "system"), "touch /tmp/owned")}),
        dumped({"a": Call(Global("builtins", "eval"), "1")}),
        dumped({"a": Global("torch._utils", "_rebuild_wrapper_subclass")}),
        dumped({"a": Global("collections", "OrderedDict.fromkeys")}),
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"(S'echo'\nios\nsystem\n.",  # INST
    ],
    ids=["os.system", "builtins.eval", "_rebuild_wrapper_subclass", "fromkeys", "os.system", "os.system"],
)
def test_a_global_that_is_no_tensor_s_is_named_and_not_touched(path, program, request):
    archive(path, program)
    refused(path, "is refused", request.node.callspec.id.rstrip("0123456789"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x02.", "IndexError"),
        (dumped([1, 2]), "holds a list"),
        (dumped({"a": 3}), "'a'"),
        (dumped({3: tensor()}), "3 in"),
        (dumped({"a": Storage()}), "is a tuple"),
        (dumped({"a": tensor(shape=(3, 2))}), "tensor a [3, 2] ends beyond its storage"),
        (dumped({"a": tensor(shape=(2**62, 2**62))}), "ends beyond its storage"),
        (dumped({"a": tensor(offset=1)}), "ends beyond its storage"),
        (dumped({"a": tensor(strides=(-2, 1))}), "strides (-2, 1)"),
        (dumped({"a": tensor(strides=(2,))}), "strides (2,)"),
        (dumped({"a": tensor(shape=("x", 2))}), "shape ('x', 2)"),
        (dumped({"a": tensor(Storage(key="7"))}), "data/7 is missing"),
        (dumped({"a": tensor(Storage(count=2**50))}), "has 16 bytes"),
        (dumped({"a": tensor(Storage("ComplexFloatStorage"))}), "torch.ComplexFloatStorage"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "damaged"),  # memoises at two billion
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".", "damaged"),  # a text of four exabytes
    ],
)
def test_a_pickle_that_is_wrong(path, content, said):
    archive(path, content, _0=FOUR)
    refused(path, said)


def test_truncated_anywhere(path):
    archive(path, dumped({"a": tensor()}), _0=FOUR)
    whole = path.read_bytes()
    for keep in range(0, len(whole), 7):
        path.write_bytes(whole[:keep])
        refused(path, "not a whole file")


def test_any_byte_may_be_wrong(path):
    archive(path, dumped({"a": tensor()}), _0=FOUR)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            TorchFile(path).tensor("a")
        except (ModelError, KeyError) as error:
            assert "\n" not in str(error)


def test_formats_that_are_not_read(path):
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + bytes(100))
    refused(path, "before 1.6", "torch.save(torch.load(")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**6))
    refused(path, "data.pkl is no plain part")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/byteorder", b"big")
        file.writestr("archive/data.pkl", dumped({}))
    refused(path, "big-endian")
    path.unlink()
    refused(path, "is missing")


def test_a_checkpoint_names_file_and_tensor(tmp_path, path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / TORCH.index).write_text('{"weight_map": {"b": "pytorch_model.bin"}}')
    archive(path, dumped({"a": tensor()}), _0=FOUR)
    with pytest.raises(
        ModelError, match=r"pytorch_model.bin.index.json says that tensor b is in pytorch_model"
    ):
        open_checkpoint(tmp_path)
    (tmp_path / TORCH.index).unlink()
    assert open_checkpoint(tmp_path).shapes() == {"a": (2, 2)}
    archive(path, dumped({"a": tensor(Storage("IntStorage"))}), _0=FOUR)
    with pytest.raises(ModelError, match=r"tensor a in .*pytorch_model.bin has type I32; supported: F64"):
        open_checkpoint(tmp_path).tensor("a")
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).shapes() == {"a": (1,)}
