"""Caching, chunks, overlap, preemption, order, shaped logits, meshes: a request gets what it gets alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import write_byte_tokenizer

from .lossless_report import combinations, name

SCRIPT = Path(__file__).with_name("lossless_report.py")
MODES = ["normal", "deterministic"]


@pytest.fixture(scope="module")
def report(make_llama):
    """report(mesh, mode) of lossless_report.py, run once."""
    model, made = make_llama("lossless", eos_token_id=0), {}
    write_byte_tokenizer(model)

    def get(mesh: str, mode: str):
        if (mesh, mode) not in made:
            env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
            env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
            command = [sys.executable, str(SCRIPT), str(model), mesh, mode]
            result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            made[mesh, mode] = json.loads(result.stdout)
        return made[mesh, mode]

    return get


@pytest.mark.parametrize("mesh", ["1x1", "2x1"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axes", combinations(), ids=name)
def test_the_same_as_alone(report, mesh, mode, axes):
    found = report(mesh, mode)
    alone, results = found["alone"], found["results"][name(axes)]
    assert tokens(results) == tokens(alone)
    if mode == "deterministic":
        assert results == alone  # to the last bit of every logprob
    else:
        assert flat(results) == pytest.approx(flat(alone), abs=1e-4)
    assert bool(found["preemptions"][name(axes)]) == axes["starved"]
    assert bool(found["hits"][name(axes)]) == axes["prefix"]


def tokens(results):
    return [[token_ids for token_ids, _ in sequences] for sequences in results]


def flat(results):
    """Every logprob, in order of tokens: two that are nearly the same may change places in the report."""
    return [
        each
        for sequences in results
        for _, logprobs in sequences
        for step in logprobs
        for _, each in sorted(step.items())
    ]
