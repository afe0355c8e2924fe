"""Every format against the `gguf` package bit by bit, and against its definition, one number at a time."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize

from jaxserve.loading import dequantise
from jaxserve.loading.dequantise import FORMATS

QUANTISED = {kind: form for kind, form in FORMATS.items() if form.unpack}


def random_blocks(form, count):
    """uint8 [count, bytes]: any integers, with scales that are numbers."""
    rng = np.random.default_rng(form.layout.itemsize)
    raw = rng.integers(0, 256, (count, form.layout.itemsize), dtype=np.uint8)
    blocks = raw.reshape(-1).view(form.layout)
    for field in {"d", "m"} & set(form.layout.names):
        blocks[field] = rng.normal(size=count)
    return raw


@pytest.mark.parametrize(("kind", "form"), FORMATS.items(), ids=lambda x: getattr(x, "name", ""))
def test_names_and_sizes_are_ggml_s(kind, form):
    theirs = gguf.GGMLQuantizationType(kind)
    assert (form.name, form.size, form.layout.itemsize) == (theirs.name, *gguf.GGML_QUANT_SIZES[theirs])


@pytest.mark.parametrize(("kind", "form"), QUANTISED.items(), ids=lambda x: getattr(x, "name", ""))
def test_the_bits_are_gguf_s(kind, form, monkeypatch):
    monkeypatch.setattr(dequantise, "CHUNK", 7 * form.size)  # the last chunk is not full
    raw = random_blocks(form, 100)
    ours = dequantise.dequantise(raw.ravel(), form)
    theirs = dequantize(raw, gguf.GGMLQuantizationType(kind)).ravel()
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    rounded = dequantise.dequantise(raw.ravel(), form, ml_dtypes.bfloat16)
    np.testing.assert_array_equal(rounded, theirs.astype(ml_dtypes.bfloat16), strict=True)


def half(block, at):
    return float(block[at : at + 2].view(np.float16)[0])


def nibble(quants, i):
    """Number i of 32 in 16 bytes: the first half in the low bits."""
    return int(quants[i]) & 15 if i < 16 else int(quants[i - 16]) >> 4


def bit(packed, i):
    return int(packed[i // 8]) >> i % 8 & 1


def six_bits(s, j):
    """Scale and offset j of 8 in the 12 bytes of a Q4_K or Q5_K block."""
    if j < 4:
        return int(s[j]) & 63, int(s[j + 4]) & 63
    low = int(s[j + 4])
    return low & 15 | int(s[j - 4]) >> 6 << 4, low >> 4 | int(s[j]) >> 6 << 4


def q4_k(b, i):
    scale, offset = six_bits(b[4:16], i // 32)
    byte = int(b[16 + i // 64 * 32 + i % 32])
    return half(b, 0) * scale, byte >> i // 32 % 2 * 4 & 15, -half(b, 2) * offset


def q5_k(b, i):
    scale, offset = six_bits(b[4:16], i // 32)
    byte, high = int(b[48 + i // 64 * 32 + i % 32]), int(b[16 + i % 32]) >> i // 32 & 1
    return half(b, 0) * scale, byte >> i // 32 % 2 * 4 & 15 | high << 4, -half(b, 2) * offset


def q6_k(b, i):
    part, within = divmod(i, 128)
    low = int(b[part * 64 + within % 64]) >> within // 64 * 4 & 15
    high = int(b[128 + part * 32 + within % 32]) >> within // 32 * 2 & 3
    return half(b, 208) * int(b[192 + i // 16].view(np.int8)), (low | high << 4) - 32, 0.0


DEFINITIONS = {
    "Q4_0": lambda b, i: (half(b, 0), nibble(b[2:], i) - 8, 0.0),
    "Q4_1": lambda b, i: (half(b, 0), nibble(b[4:], i), half(b, 2)),
    "Q5_0": lambda b, i: (half(b, 0), (nibble(b[6:], i) | bit(b[2:6], i) << 4) - 16, 0.0),
    "Q5_1": lambda b, i: (half(b, 0), nibble(b[8:], i) | bit(b[4:8], i) << 4, half(b, 2)),
    "Q8_0": lambda b, i: (half(b, 0), int(b[2 + i].view(np.int8)), 0.0),
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}
"""(scale, integer, offset) of number i in a block."""


@pytest.mark.parametrize("form", QUANTISED.values(), ids=lambda form: form.name)
def test_the_definition(form):
    raw = random_blocks(form, 3)
    parts = [DEFINITIONS[form.name](block, i) for block in raw for i in range(form.size)]
    expected = [scale * integer + offset for scale, integer, offset in parts]
    np.testing.assert_allclose(dequantise.dequantise(raw.ravel(), form), expected, rtol=1e-5, atol=1e-5)
