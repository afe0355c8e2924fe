"""`kv_cache_dtype=int8` and `fp8`: a pool of 8-bit numbers and scales in an engine that is like any other."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxserve import Engine, SamplingParams
from jaxserve.aliases import translate
from jaxserve.config import EngineConfig
from jaxserve.engine.devices import CPU, GPU, TPU, Memory
from jaxserve.engine.kernels import PORTABLE, attention_for, choose_kernels
from jaxserve.engine.memory import fit
from jaxserve.engine.model import LoadedModel
from jaxserve.engine.programs import Programs
from jaxserve.errors import ConfigError

from .lossless_report import OPTIONS, run, workload

CONFIGS = Path(__file__).parents[1] / "configs"
STORED = {"int8": jnp.int8, "fp8": jnp.uint8}
PLAIN = {"prefix": False, "chunk": 64, "overlap": False, "starved": False, "shuffled": False}
CHANGES = [
    {"prefix": True},
    {"chunk": 8, "overlap": True},
    {"prefix": True, "starved": True, "shuffled": True, "overlap": True, "chunk": 24},
]
PROMPTS = [np.random.default_rng(i).integers(0, 259, 3 + 9 * i).tolist() for i in range(8)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module", params=STORED)
def engine(request, model_dir):
    with Engine(str(model_dir), dtype="float32", kv_cache_dtype=request.param, **OPTIONS) as engine:
        assert engine.wait_until_warm(300)
        yield engine


def test_the_pool_is_what_the_plan_says(engine):
    (core,), plan = engine._cores, engine.plan()
    kind = {"int8": "int8", "float8_e4m3fn": "fp8"}[plan.kv_cache_dtype]
    for numbers, scales in core._kv:
        assert (numbers.dtype, scales.dtype) == (STORED[kind], jnp.float32)
        assert numbers.shape[:-1] == scales.shape == core.shapes.pool.shape[:-1]
    assert sum(array.nbytes for array in jax.tree.leaves(core._kv)) == plan.pool
    assert plan.block_bytes == len(core._kv) * scales[0].size * (numbers.shape[-1] + 4)


def test_nothing_changes_what_a_request_gets(engine, monkeypatch):
    """Other requests, prefix cache, chunks, overlap, preemption: the same tokens as alone."""
    monkeypatch.setattr(Programs, "limits", Programs.limits)  # which `run` sets
    requests = workload()
    alone = [run(engine, [request], PLAIN)[0] for request in requests]
    for change in CHANGES:
        before = engine.stats()
        results = run(engine, requests, PLAIN | change)
        after = engine.stats()
        assert tokens(results) == tokens(alone), change
        assert (after["preemptions"] > before["preemptions"]) == change.get("starved", False)
        assert (after["prefix_cache_hits"] > before["prefix_cache_hits"]) == change.get("prefix", False)


def tokens(results):
    return [[token_ids for token_ids, _ in sequences] for sequences in results]


def answers(model, **options) -> list[tuple[list[int], list[float]]]:
    """Tokens and their logprobs."""
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "num_blocks": 64, "max_model_len": 128}
    with Engine(str(model), dtype="float32", **small, **options) as engine:
        outputs = [output.outputs[0] for output in engine.generate(PROMPTS, GREEDY, use_progress=False)]
    return [
        (list(o.token_ids), [step[t].logprob for t, step in zip(o.token_ids, o.logprobs, strict=True)])
        for o in outputs
    ]


@pytest.fixture(scope="module")
def heads_for_two(make_llama):
    return make_llama("kv8", num_attention_heads=6, num_key_value_heads=3, head_dim=16, vocab_size=259)


def test_8_bits_are_near_and_not_the_same(heads_for_two):
    first = {
        kv: np.array([logprobs[0] for _, logprobs in answers(heads_for_two, kv_cache_dtype=kv)])
        for kv in ("auto", "int8", "fp8")
    }
    int8, fp8 = (np.abs(first[kv] - first["auto"]).mean() for kv in STORED)
    assert 1e-4 < int8 < fp8 < 0.3


def test_sharded_it_gives_what_one_device_gives(heads_for_two):
    code = "import json, sys; from tests.engine.test_kv_cache_dtype import answers\n"
    code += "print(json.dumps(answers(sys.argv[1], mesh='2x1', kv_cache_dtype='fp8')))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, str(heads_for_two)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sharded = json.loads(done.stdout.splitlines()[-1])
    for (tokens, ours), (others, theirs) in zip(
        answers(heads_for_two, kv_cache_dtype="fp8"), sharded, strict=True
    ):
        assert tokens == others
        np.testing.assert_allclose(ours, theirs, atol=2e-2)


def test_a_row_has_the_same_bits_everywhere_in_deterministic_mode(model_dir, monkeypatch):
    monkeypatch.setattr(Programs, "limits", Programs.limits)
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 8, "num_blocks": 60}
    options |= {"dtype": "float32", "kv_cache_dtype": "int8", "deterministic": True}
    with Engine(str(model_dir), **options) as engine:
        requests = workload()[:6]
        alone = [run(engine, [request], PLAIN)[0] for request in requests]
        assert run(engine, requests, PLAIN | {"prefix": True, "chunk": 24}) == alone


def test_auto_takes_what_reads_8_bits_and_says_so(caplog):
    config = EngineConfig(kv_cache_dtype="int8")
    with caplog.at_level(logging.WARNING):
        assert [attention_for(config, platform) for platform in (CPU, GPU, TPU)] == ["xla", "gpu", "xla"]
    assert caplog.messages == [
        f"attention=xla for kv_cache_dtype=int8: the {name} reads KV of the weights' type"
        for name in ("C++ kernel", "TPU's kernel")
    ]


@pytest.mark.parametrize(
    ("attention", "platform", "other"), [("cpu", CPU, "xla"), ("mosaic", GPU, "gpu"), ("tpu", TPU, "xla")]
)
def test_a_kernel_that_was_asked_for_and_cannot_is_refused(attention, platform, other):
    config = EngineConfig(kv_cache_dtype="fp8", attention=attention)
    with pytest.raises(ConfigError, match=f"attention={attention} .*dtype=fp8.* attention={other} can"):
        attention_for(config, platform)


def test_names_of_vllm_and_no_others(model_dir):
    assert translate({"kv_cache_dtype": "fp8_e4m3"}) == {"kv_cache_dtype": "fp8"}
    with pytest.raises(ConfigError, match="kv_cache_dtype: must be one of auto, fp8, int8, not 'fp8_e5m2'"):
        Engine(str(model_dir), kv_cache_dtype="fp8_e5m2")


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "10.0"])
def test_fp8_takes_a_gpu_that_converts_it(capability):
    device = SimpleNamespace(platform="gpu", device_kind="GPU", compute_capability=capability)
    mesh = SimpleNamespace(devices=SimpleNamespace(flat=[device]), size=1)
    assert choose_kernels(EngineConfig(kv_cache_dtype="int8"), mesh, jnp.bfloat16).attention == "gpu"
    if capability not in ("8.0", "8.6"):
        assert choose_kernels(EngineConfig(kv_cache_dtype="fp8"), mesh, jnp.bfloat16).attention == "gpu"
    else:
        with pytest.raises(ConfigError, match=r"fp8 cannot be had: .* from Ada on, and this is a GPU; int8"):
            choose_kernels(EngineConfig(kv_cache_dtype="fp8"), mesh, jnp.bfloat16)


def blocks_on_a_gpu(memory: int, kv: str, **options) -> int:
    config = EngineConfig(kv_cache_dtype=kv, **options)
    shape = json.loads((CONFIGS / "llama-3.1-8b.json").read_text())
    mesh = AbstractMesh((1,), ("tensor",), axis_types=(AxisType.Auto,))
    model = LoadedModel(shape, mesh, jnp.bfloat16, PORTABLE._replace(attention="gpu"))
    return fit(config, model, Memory(GPU, "a GPU", memory * 2**30, 0, "")).shapes.pool.num_blocks


def test_a_gpu_holds_nearly_twice_as_many_blocks_but_for_what_its_kernel_cannot_address(caplog):
    layer = 2 * 8 * 16 * 128  # bytes of a block in 8 bits
    assert blocks_on_a_gpu(60, "fp8") == pytest.approx(2 * 128 / 132 * blocks_on_a_gpu(60, "auto"), rel=0.01)
    assert not caplog.messages
    assert blocks_on_a_gpu(100, "int8") == 2**31 // layer
    assert re.fullmatch(r"1\d\.\d GiB stay free: attention=gpu .* 2 GiB .*", *caplog.messages)
    caplog.clear()
    assert blocks_on_a_gpu(200, "int8") > 2**32 // layer and not caplog.messages
    with pytest.raises(ConfigError, match=r"num_blocks=80000 .*: attention=gpu reads up to 65536 blocks"):
        blocks_on_a_gpu(200, "int8", num_blocks=80000)
