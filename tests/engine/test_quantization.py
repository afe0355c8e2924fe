"""`quantization=int8`: which weights are kept in 8 bits, and that an engine with them is like any other."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxserve import Engine, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.engine.devices import make_mesh
from jaxserve.engine.kernels import Kernels
from jaxserve.engine.model import LoadedModel
from jaxserve.errors import ConfigError
from jaxserve.loading.checkpoint import open_checkpoint
from jaxserve.pallas_kernels.matmul import keep, quantise

from .deterministic_report import alone, make_requests, options, together

SMALL = {"dtype": "float32", "quantization": "int8", "max_num_seqs": 4, "max_num_batched_tokens": 64}
SMALL |= {"num_blocks": 64, "max_model_len": 128}
PROMPTS = [np.random.default_rng(i).integers(0, 259, 3 + 9 * i).tolist() for i in range(8)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
KERNELS = [
    pytest.param({"attention": "xla", "matmul": "xla"}, id="xla"),
    pytest.param({"attention": "cpu", "matmul": "cpu"}, id="cpu", marks=pytest.mark.compiler),
]


def answers(model, **more) -> list[tuple[list[int], list[float]]]:
    """Tokens and their logprobs."""
    with Engine(str(model), **SMALL | more) as engine:
        outputs = [output.outputs[0] for output in engine.generate(PROMPTS, GREEDY, use_progress=False)]
    return [
        (list(o.token_ids), [step[t].logprob for t, step in zip(o.token_ids, o.logprobs, strict=True)])
        for o in outputs
    ]


@pytest.mark.parametrize("kernels", KERNELS)
def test_linear_weights_are_kept_in_8_bits_and_nothing_else(model_dir, kernels):
    checkpoint = open_checkpoint(model_dir)
    mesh, chosen = make_mesh(EngineConfig(), 0), Kernels(**kernels, sampler="xla")
    model = LoadedModel(checkpoint.config, mesh, "bfloat16", chosen, "int8")
    model.load(checkpoint)
    held = dict(zip(model._leaves, map(np.asarray, model.weights), strict=True))
    small = {path for path, value in held.items() if value.dtype.itemsize == 1}
    parts = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    assert small == {f"layers.{i}.{part}.weight" for i in range(2) for part in parts}
    for path, value in held.items():
        if path not in small:
            assert value.dtype == ("float32" if path.endswith("scale") else "bfloat16"), path
    w8, scales = quantise(checkpoint.tensor("model.layers.1.mlp.down_proj.weight"))
    np.testing.assert_array_equal(held["layers.1.mlp.down.scale"], scales)
    kept = keep(w8, kernels["matmul"])
    np.testing.assert_array_equal(held["layers.1.mlp.down.weight"].reshape(kept.shape), kept)
    assert model.bytes == sum(value.nbytes for value in held.values())


@pytest.mark.compiler
def test_both_kernels_and_the_floats_agree_as_they_should(model_dir):
    """Integers give the same sums everywhere, so kernels differ by float32's rounding alone."""
    native, xla = (answers(model_dir, **kernels.values[0]) for kernels in KERNELS[::-1])
    floats = answers(model_dir, quantization=None)
    for (tokens, ours), (others, theirs) in zip(native, xla, strict=True):
        assert tokens == others
        np.testing.assert_allclose(ours, theirs, atol=2e-2)
    first = np.array([[ours[0] for _, ours in found] for found in (native, floats)])
    assert 1e-4 < np.abs(first[0] - first[1]).max() < 0.5


def test_sharded_it_gives_what_one_device_gives(make_llama, tmp_path):
    model = make_llama("int8", num_attention_heads=6, num_key_value_heads=3, head_dim=16, vocab_size=259)
    code = "import json, sys; from tests.engine.test_quantization import answers\n"
    code += "print(json.dumps(answers(sys.argv[1], mesh='2x1', attention='xla')))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, str(model)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (tokens, ours), (others, theirs) in zip(
        answers(model, matmul="xla", attention="xla"), json.loads(done.stdout.splitlines()[-1]), strict=True
    ):
        assert tokens == others
        np.testing.assert_allclose(ours, theirs, atol=2e-2)


@pytest.mark.compiler
def test_deterministic_mode_holds(model_dir):
    requests = make_requests(12, 288)
    shape = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "num_blocks": 256}
    with Engine(str(model_dir), dtype="bfloat16", quantization="int8", **options(**shape)) as engine:
        assert together(engine, requests, 0) == alone(engine, requests)


def test_other_quantisations_are_refused_by_name(model_dir):
    with pytest.raises(ConfigError, match="quantization: must be one of int8, not 'fp8'"):
        Engine(str(model_dir), quantization="fp8")
