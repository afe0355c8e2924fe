"""Deterministic mode: no batch, chunk, cache, order, preemption or restart changes a bit."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import Engine, SamplingParams
from jaxserve.engine import programs
from jaxserve.engine.batch import Bucket
from jaxserve.engine.certify import Bits, best_class
from jaxserve.errors import ConfigError

from .deterministic_report import ENGINES, alone, make_requests, options, together

KERNELS = [
    pytest.param({}, id="native", marks=pytest.mark.compiler),
    pytest.param({"attention": "xla", "matmul": "xla"}, id="xla"),
]
REQUESTS = make_requests(24, 288)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_whatever_surrounds_a_request(model_dir, dtype, kernels):
    found = []
    for shape in ENGINES.values():
        with Engine(str(model_dir), dtype=dtype, **options(**kernels, **shape)) as engine:
            found.append(alone(engine, REQUESTS))
            found += [together(engine, REQUESTS, seed) for seed in range(2)]  # warm, where there is a cache
            stats = engine.stats()
            assert stats["warm"] and stats["programs_certified"] == stats["programs"]
            assert bool(stats["preemptions"]) == (not engine.config.enable_prefix_caching)
            assert bool(stats["prefix_cache_hits"]) == engine.config.enable_prefix_caching
    for answers in found[1:]:
        assert answers == found[0]
    assert any(bits for answer in found[0] for _, bits in answer)


@pytest.fixture(scope="module")
def mesh_report(make_llama):
    """report() of deterministic_report.py on two virtual devices, in a new process each time."""
    model = make_llama(
        "deterministic", num_attention_heads=6, num_key_value_heads=2, head_dim=16, vocab_size=259
    )
    script = Path(__file__).with_name("deterministic_report.py")

    def report():
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
        env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        command = [sys.executable, str(script), str(model), "2x1"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return report


def test_the_same_bits_on_a_mesh_and_after_a_restart(mesh_report):
    first, second = mesh_report(), mesh_report()
    found = [run for report in (first, second) for shape in ENGINES for run in report[shape]["together"]]
    found += [report[shape]["alone"] for report in (first, second) for shape in ENGINES]
    for answers in found[1:]:
        assert answers == found[0]
    assert first["starved"]["stats"]["preemptions"] > 0
    assert first["wide"]["stats"]["prefix_cache_hits"] > 0


def test_a_request_without_a_seed_does_not_depend_on_the_order(model_dir):
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    with Engine(str(model_dir), dtype="float32", seed=7, **options(**ENGINES["wide"])) as engine:
        prompts = [[1, 2, 3], [4, 5, 6]]
        one = [o.outputs[0].token_ids for o in engine.generate(prompts, params)]
        other = [o.outputs[0].token_ids for o in engine.generate(prompts[::-1], params)][::-1]
        assert one == other
        twins = engine.generate([1, 2, 3], SamplingParams(temperature=1.0, max_tokens=8, n=2))[0].outputs
        assert twins[0].token_ids != twins[1].token_ids


def other_weights(forward, weights, *state):
    """Computes with weights that are one step of their type off."""
    return forward([nudged(weight) for weight in weights], *state)


def other_row(forward, *state):
    """Gives other logits where a sequence is the second of its batch."""
    kv, slots, logits, *others = forward(*state)
    return kv, slots, logits.at[1].set(nudged(logits[1])), *others


def nudged(x):
    return jnp.nextafter(x, jnp.full_like(x, jnp.inf))


@pytest.fixture(scope="module")
def untouched(model_dir):
    """Each request's answer alone, and the stats of that engine."""
    with Engine(str(model_dir), dtype="float32", **options(**ENGINES["wide"])) as engine:
        return alone(engine, REQUESTS), engine.stats()


PLANTED = [
    ("decode[1]", other_weights),
    ("decode[4]", other_row),
    ("mixed[128]", other_weights),
    ("mixed[128]", other_row),
]


@pytest.mark.parametrize(("name", "change"), PLANTED, ids=lambda x: getattr(x, "__name__", x))
def test_a_program_with_other_bits_is_left_out_and_the_answers_stay_right(
    model_dir, untouched, monkeypatch, caplog, name, change
):
    wanted, whole = untouched
    real = programs.forward

    def planted(functions, layout, *args):
        forward = partial(real, functions, layout)
        return change(forward, *args) if layout.bucket.name == name else forward(*args)

    monkeypatch.setattr(programs, "forward", planted)
    with Engine(str(model_dir), dtype="float32", **options(**ENGINES["wide"])) as engine:
        assert together(engine, REQUESTS, 1) == wanted
        stats = engine.stats()
        assert name not in [bucket.name for bucket in engine._cores[0]._programs.ready]
    assert name in caplog.text
    assert stats["programs_refused"] == whole["programs_refused"] + 1
    assert stats["programs_certified"] == whole["programs_certified"] - 1


@pytest.mark.parametrize("variant", ["full", "random", "greedy"])
def test_a_sample_program_with_other_bits_is_left_out(model_dir, untouched, monkeypatch, variant):
    real = programs.sample

    def planted(kind, implementation, slots, logits, raw, targets):
        if kind == variant and logits.shape[0] == 2:
            # the least that shows: a digit of the logprobs, or another token
            logits, raw = (nudged(raw), nudged(raw)) if kind == "full" else (logits[:, ::-1], raw)
        return real(kind, implementation, slots, logits, raw, targets)

    monkeypatch.setattr(programs, "sample", planted)
    with Engine(str(model_dir), dtype="float32", **options(**ENGINES["wide"])) as engine:
        assert (2, variant) not in engine._cores[0]._programs.samples
        assert together(engine, REQUESTS, 1) == untouched[0]


def bits(**digests: int) -> Bits:
    found = Bits()
    for name, digest in digests.items():
        found.note(name, np.array(digest))
    return found


MIXED, LARGE, ONE, FOUR = Bucket(64, 4), Bucket(128, 4), Bucket(1, 1), Bucket(4, 4)


def test_the_class_that_costs_least_is_kept():
    agreeing = {MIXED: bits(a=1, b=2), LARGE: bits(a=1), ONE: bits(b=2), FOUR: bits(a=1, b=2)}
    assert set(best_class(agreeing, 4)) == set(agreeing)
    assert set(best_class(agreeing | {ONE: bits(b=3)}, 4)) == {MIXED, LARGE, FOUR}
    # whoever decodes in a mixed program computes 64 rows for a token
    assert set(best_class(agreeing | {MIXED: bits(a=5, b=5)}, 4)) == {LARGE, ONE, FOUR}
    assert set(best_class(agreeing | {LARGE: bits(a=5)}, 4)) == {MIXED, ONE, FOUR}


def test_a_program_that_contradicts_itself_is_never_kept():
    torn = bits(a=1)
    torn.note("a", np.array(2))
    assert torn.contradicted
    assert best_class({MIXED: bits(a=1), LARGE: torn}, 4) == [MIXED]
    with pytest.raises(ConfigError, match="no program gives a row the same bits"):
        best_class({MIXED: torn, FOUR: bits(a=1)}, 4)
