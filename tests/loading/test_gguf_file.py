"""Reading GGUF files, and refusing broken ones with one line and nothing else."""

import struct

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.errors import ModelError
from jaxserve.loading.checkpoint import open_checkpoint
from jaxserve.loading.gguf_file import GGUFFile

BROKEN = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def header(tensors=0, pairs=0, version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, pairs)


def text(value):
    return struct.pack("<Q", len(value)) + value


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def entry(name, shape, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def test_metadata_of_every_type(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    expected = {"general.architecture": "llama"}
    for kind, value in {
        "uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 4000000000, "int32": -70000,
        "uint64": 2**63, "int64": -(2**62), "float32": 0.5, "float64": 0.1, "bool": True, "string": "é ☃",
    }.items():  # fmt: skip
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
        expected[f"a.{kind}"] = value
    for key, value in {"ints": [1, -2], "floats": [0.5, 2.0], "texts": ["a", "", "ü"]}.items():
        writer.add_array(key, value)
        expected[key] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert dict(GGUFFile(tmp_path / "x.gguf").metadata) == expected


def test_alignment(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(512)
    values = {"a": np.arange(5, dtype=np.float32), "b": np.arange(7, dtype=np.float16)}
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "x.gguf")
    for name, value in values.items():
        np.testing.assert_array_equal(file.dequantised(name), value, strict=True)


def test_plain_tensors_are_views(write):
    view = GGUFFile(write()).dequantised("token_embd.weight")
    assert not view.flags.writeable and not view.flags.owndata


@pytest.mark.parametrize(
    ("data", "said"),
    {
        "empty": (b"", "empty"),
        "magic": (header(magic=b"GGML"), "begin with GGUF"),
        "version": (header(version=1), "version 1"),
        "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version"),
        "many tensors": (header(tensors=2**60), "end of the file"),
        "many tensors, zeros": (header(tensors=2**60) + bytes(10**6), "0 dimensions"),
        "most pairs": (header(pairs=2**64 - 1), "end of the file"),
        "many pairs, zeros": (header(pairs=2**60) + bytes(10**6), "comes twice"),
        "long key": (header(pairs=1) + struct.pack("<Q", 2**63) + bytes(50), "end of the file"),
        "long string": (header(pairs=1) + pair(b"k", 8, struct.pack("<Q", 2**64 - 1)), "end of the file"),
        "long array": (header(pairs=1) + pair(b"k", 9, struct.pack("<IQ", 4, 2**60)), "end of the file"),
        "long texts": (
            header(pairs=1) + pair(b"k", 9, struct.pack("<IQ", 8, 2**60)) + bytes(10**5),
            "end of the file",
        ),
        "long text in array": (
            header(pairs=1) + pair(b"k", 9, struct.pack("<IQQQ", 8, 2, 2**63, 2**63)),
            "end of the file",
        ),
        "unknown value": (header(pairs=1) + pair(b"k", 77, bytes(8)), "unknown type 77"),
        "nested arrays": (header(pairs=1) + pair(b"k", 9, struct.pack("<IQ", 9, 1) * 9999), "unknown type 9"),
        "key that is no text": (header(pairs=1) + pair(b"\xff", 4, bytes(4)), "utf-8"),
        "one key twice": (header(pairs=2) + pair(b"k", 4, bytes(4)) * 2, "'k' comes twice"),
        "one tensor twice": (header(tensors=2) + entry(b"t", (1,)) * 2 + bytes(99), "'t' comes twice"),
        "rank": (header(tensors=1) + entry(b"t", (1,) * 5) + bytes(99), "5 dimensions"),
        "no rank": (header(tensors=1) + entry(b"t", ()) + bytes(99), "0 dimensions"),
        "huge tensor": (header(tensors=1) + entry(b"t", (2**33, 2**33)) + bytes(99), "tensor t ends"),
        "far tensor": (header(tensors=1) + entry(b"t", (1,), 0, 2**64 - 1) + bytes(99), "tensor t ends"),
        "half a block": (header(tensors=1) + entry(b"t", (33,), 2) + bytes(99), "rows of 33, which Q4_0"),
        "alignment 0": (header(pairs=1) + pair(b"general.alignment", 4, bytes(4)), "general.alignment is 0"),
        "alignment text": (header(pairs=1) + pair(b"general.alignment", 8, text(b"a")), "alignment is 'a'"),
        "ggml type": (header(tensors=1) + entry(b"t", (256,), 10) + bytes(999), "Q2_K; supported: F32, F16"),
        "no ggml type": (header(tensors=1) + entry(b"t", (256,), 999) + bytes(999), "number 999"),
    }.values(),
)
def test_refused(tmp_path, data, said):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert said in str(caught.value)


def test_a_value_that_is_no_text_is_refused_when_it_is_read(tmp_path):
    (tmp_path / "x.gguf").write_bytes(header(pairs=1) + pair(b"k", 8, text(b"\xff")))
    metadata = GGUFFile(tmp_path / "x.gguf").metadata
    with pytest.raises(ModelError, match=r"k in .* cannot be read"):
        metadata["k"]


def read_all(path):
    """What a start does with a file. True if it was whole."""
    try:
        checkpoint = open_checkpoint(path)
    except ModelError as error:
        assert "\n" not in str(error)
        return False
    for name in checkpoint.shapes():
        checkpoint.source(name)
    return True


@BROKEN
@given(data=st.data())
def test_truncated_anywhere(write, data):
    path = write()
    whole = path.read_bytes()
    assert read_all(path)
    keep = data.draw(st.integers(0, len(whole) - 4) | st.integers(0, 3000))
    path.write_bytes(whole[:keep])
    assert not read_all(path)


@BROKEN
@given(data=st.data())
def test_any_byte_of_the_header_may_be_wrong(write, data):
    path = write()
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    read_all(path)
