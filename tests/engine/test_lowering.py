"""Whole steps of every family of models, lowered for GPUs and TPUs on a machine that has neither."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxserve.engine.devices import CPU, GPU, TPU
from jaxserve.engine.programs import SHAPES, VARIANTS, Programs
from tests.families import FAMILIES, config_of, programs_of
from tests.hlo import aliases, collectives, count

ROOT = Path(__file__).parents[2]


class Attention(NamedTuple):
    """What a layer's attention is in a step, by the step's kind."""

    kernel: str
    """The custom call that it is, as a pattern."""
    kernels: dict[str, int]
    loops: dict[str, int]


NONE = {"decode": 0, "mixed": 0}
ATTENTION = {
    "gpu": Attention(r"custom_call @\S*triton", {"decode": 1, "mixed": 2}, NONE),
    "tpu": Attention(r"custom_call @tpu_custom_call", {"decode": 2, "mixed": 2}, NONE),
    "xla": Attention(r"custom_call @\S*(?:triton|mosaic|tpu)", NONE, {"decode": 2, "mixed": 4}),
}
PLATFORMS = {"cuda": GPU, "tpu": TPU}
DEVICES = {"cuda": ("NVIDIA H200", 132), "tpu": ("TPU v5 lite", 1)}
LOOPS = {"cuda": {"greedy": 0, "random": 0, "full": 0}, "tpu": {"greedy": 0, "random": 2, "full": 2}}
"""Of sampling in XLA: a search for the threshold of top_k, and one for that of top_p. A GPU has a kernel."""
STEPS = [(f, p, shards) for f in FAMILIES for p in PLATFORMS for shards in (1, 4)]
STEP_IDS = [f"{family}-{platform}-{shards}x1" for family, platform, shards in STEPS]


class Lowered(Programs):
    """Programs as StableHLO, for a platform that has no compiler here."""

    platform: str

    def _compile(self, name, function, *args, donate=(0,), out=None):
        traced = self._jit(function, donate, out).trace(*args)
        return traced.lower(lowering_platforms=(self.platform,)).as_text()


def mesh_of(platform: str, shards: int) -> AbstractMesh:
    """With what kernels ask of a device."""
    kind, cores = DEVICES[platform]
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=PLATFORMS[platform].name)
    return AbstractMesh((shards,), ("tensor",), axis_types=(AxisType.Auto,), abstract_device=device)


@cache
def lowered(family: str, platform: str, shards: int, kv: str = "auto") -> tuple[Lowered, dict[str, str]]:
    """The programs, and by name the largest of each kind."""
    mesh = mesh_of(platform, shards)
    with jax.sharding.use_abstract_mesh(mesh):
        programs = programs_of(family, PLATFORMS[platform], mesh, kind=Lowered, kv_cache_dtype=kv)
        programs.platform = platform
        programs.compile_largest()
        programs._compile_admit()
        programs._compile_enter()
        programs._compile_empty()
        rows = programs.shapes.max_num_seqs
        for variant in VARIANTS:
            programs._compile_sample(rows, variant)
        for shaping in SHAPES:
            programs._compile_shape(rows, shaping)
    texts = {bucket.name.partition("[")[0]: text for bucket, text in programs._forward.items()}
    texts |= {variant: programs._sample[rows, variant] for variant in VARIANTS}
    texts |= {"admit": programs.admit, "enter": programs.enter}
    texts |= {shaping: programs.shape(rows, shaping) for shaping in SHAPES}
    return programs, texts | {"empty": programs._empty}


@pytest.mark.parametrize("step", STEPS, ids=STEP_IDS)
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_attention_is_so_many_kernels_in_each_layer_and_a_step_has_no_other_loop(step, kind):
    programs, texts = lowered(*step)
    wanted, layers = ATTENTION[programs.attention], programs.shapes.layers
    assert count(texts[kind], wanted.kernel) == layers * wanted.kernels[kind]
    assert count(texts[kind], r"stablehlo\.while") == layers * wanted.loops[kind]


@pytest.mark.parametrize("step", STEPS, ids=STEP_IDS)
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_pools_are_donated_and_written_in_place(step, kind):
    programs, texts = lowered(*step)
    pool = "x".join(map(str, programs.shapes.pool.shape)) + "xbf16"
    assert aliases(texts[kind], pool) == list(range(programs.shapes.layers))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize(("kv", "stored"), [("int8", "i8"), ("fp8", "ui8")])
def test_pools_of_8_bits_are_written_in_place_with_their_scales(platform, shards, kv, stored):
    programs, texts = lowered("LlamaForCausalLM", platform, shards, kv)
    shape, wanted = programs.shapes.pool.shape, ATTENTION["gpu" if platform == "cuda" else "xla"]
    for kind in ("decode", "mixed"):
        assert count(texts[kind], wanted.kernel) == programs.shapes.layers * wanted.kernels[kind]
        pools = ("x".join(map(str, shape)) + f"x{stored}", "x".join(map(str, shape[:-1])) + "xf32")
        found = [place for pool in pools for place in aliases(texts[kind], pool)]
        assert sorted(found) == list(range(2 * programs.shapes.layers))


@pytest.mark.parametrize("step", STEPS, ids=STEP_IDS)
@pytest.mark.parametrize("kind", ["decode", "mixed", "admit", *VARIANTS])
def test_slots_are_donated_and_written_in_place(step, kind):
    programs, texts = lowered(*step)
    seqs, width = programs.shapes.max_num_seqs, programs.shapes.table_width
    [place] = aliases(texts[kind], f"{seqs + 1}x{width}xi32")
    assert place is not None


@pytest.mark.parametrize("step", STEPS, ids=STEP_IDS)
@pytest.mark.parametrize("kind", ["enter", *SHAPES])
def test_counts_of_tokens_are_donated_and_written_in_place(step, kind):
    programs, texts = lowered(*step)
    seqs, vocab = programs.shapes.max_num_seqs, programs.shapes.vocab
    [place] = aliases(texts[kind], f"{seqs + 1}x{vocab}xui16")
    assert place is not None


@pytest.mark.parametrize("step", STEPS, ids=STEP_IDS)
def test_only_the_search_for_a_threshold_loops_when_tokens_are_chosen(step):
    _, texts = lowered(*step)
    found = {variant: count(texts[variant], r"stablehlo\.while") for variant in VARIANTS}
    assert [count(texts[name], r"stablehlo\.(while|case|if)") for name in SHAPES] == [2, 0, 0]
    assert found == LOOPS[step[1]]
    kernels = {count(texts[variant], r"custom_call @\S*triton") for variant in VARIANTS}
    assert kernels == {1 if step[1] == "cuda" else 0}
    assert not count(texts["admit"], r"stablehlo\.while")


@pytest.mark.parametrize("step", STEPS, ids=STEP_IDS)
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_products_are_rounded_but_for_logits(step, kind):
    programs, texts = lowered(*step)
    products = r"stablehlo\.dot_general.*-> tensor<\d+x\d+x"
    assert count(texts[kind], products + "bf16>") >= 4 * programs.shapes.layers
    assert count(texts[kind], products + "f32>") == 1


@pytest.mark.parametrize("step", STEPS, ids=STEP_IDS)
def test_nothing_goes_to_the_host(step):
    _, texts = lowered(*step)
    for name, text in texts.items():
        assert not re.search(r"stablehlo\.(send|recv|infeed|outfeed)|callback", text), name


def compiled_collectives() -> dict[str, Any]:
    """By family and kind of step: rows of tokens and of logits, and what travels between four devices."""
    found: dict[str, Any] = {}
    for family in FAMILIES:
        mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
        programs = programs_of(family, CPU, mesh)
        programs.compile_largest()
        found[family] = {"sample": collectives(programs.sample(16, "full").as_text())}
        for bucket, program in programs._forward.items():
            found[family][bucket.name.partition("[")[0]] = [*bucket, collectives(program.as_text())]
    return found


@pytest.fixture(scope="module")
def on_four_devices() -> dict[str, Any]:
    """In a process of four virtual CPU devices: collectives are there once XLA has partitioned a program."""
    code = "import json; from tests.engine.test_lowering import *; print(json.dumps(compiled_collectives()))"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | flags, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_a_layer_on_four_devices_adds_up_after_attention_and_after_the_mlp(on_four_devices, family, kind):
    tokens, rows, found = on_four_devices[family][kind]
    config = config_of(family)
    assert Counter((operation, tuple(shape)) for operation, shape in found) == {
        ("all-reduce", (tokens, config["hidden_size"])): 2 * config["num_hidden_layers"] + 1,  # the embedding
        ("all-gather", (rows, config["vocab_size"])): 1,  # the logits, for sampling
    }
    assert on_four_devices[family]["sample"] == []
