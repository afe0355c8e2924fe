"""What a decoding step is made of on a CPU with the C++ kernels, in counts from the compiled programs."""

import math
import re
from collections import Counter

import pytest

from jaxserve import Engine
from jaxserve.engine.batch import Bucket

ROWS, LAYERS = 8, 2
KERNEL = re.compile(r'custom_call_target="jaxserve_(\w+)_[0-9a-f]{16}"')
COPY = re.compile(r" = \w+\[([\d,]*)\]\S* copy\(")

pytestmark = pytest.mark.compiler


@pytest.fixture(scope="module")
def engine(model_dir):
    options = {"max_num_seqs": ROWS, "max_num_batched_tokens": 64, "num_blocks": 257}
    with Engine(str(model_dir), dtype="bfloat16", **options) as engine:
        assert engine.wait_until_warm()
        yield engine


@pytest.fixture(scope="module", params=[Bucket(ROWS, ROWS), Bucket(64, ROWS)], ids=["decode", "mixed"])
def forward(engine, request):
    return engine._cores[0]._programs.forward(request.param)


def test_a_layer_is_five_kernels_and_a_step_one_more(forward):
    """qkv, attention with rotation and KV write, its output, gate and up, down; and the head."""
    assert Counter(KERNEL.findall(forward.as_text())) == {
        "matmul": 3 * LAYERS + 1,
        "gated": LAYERS,
        "paged_attention": LAYERS,
    }


def test_a_step_copies_nothing_large_and_has_no_loop(engine, forward):
    text, pool = forward.as_text(), engine._cores[0].shapes.pool
    copied = [math.prod(map(int, filter(None, dims.split(",")))) for dims in COPY.findall(text)]
    assert max(copied, default=0) <= 64 * 64  # numbers of the residual stream in a mixed step
    assert " while(" not in text
    pool_bytes = pool.num_blocks * pool.block_bytes
    assert forward.memory_analysis().alias_size_in_bytes >= LAYERS * pool_bytes
    assert forward.memory_analysis().temp_size_in_bytes < pool_bytes / 4


@pytest.mark.parametrize(
    ("variant", "kernels"),
    [
        ("greedy", ["sample"]),
        ("random", ["uniform", "sample"]),
        ("full", ["uniform", "sample", "logprobs"]),
    ],
)
def test_sampling_is_a_kernel_for_each_thing_that_is_asked(engine, variant, kernels):
    program = engine._cores[0]._programs.sample(ROWS, variant)
    assert Counter(KERNEL.findall(program.as_text())) == Counter(kernels)
    assert " while(" not in program.as_text()
