"""What a step costs the host, in counts: what crosses to the device and back, and what stays behind."""

import gc
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxserve import Engine, SamplingParams

PLAIN = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
ROWS = 8


@pytest.fixture(scope="module")
def engine(model_dir):
    options = {"max_num_seqs": ROWS, "max_num_batched_tokens": 64, "num_blocks": 128}
    with Engine(str(model_dir), dtype="float32", **options) as engine:
        assert engine.wait_until_warm()
        yield engine


def decoding(engine, params):
    """Requests that all decode: every step from here on is one token of each."""
    ids = [engine.add_request([7 + i] * 5, params) for i in range(ROWS)]
    running = engine._cores[0]._scheduler.running
    while len([request for request in running if len(request.output) > 2]) < ROWS:
        engine.step()
    return ids


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (PLAIN, 1),
        (SamplingParams(temperature=1.0, top_p=0.9, max_tokens=64, ignore_eos=True), 1),
        (SamplingParams(temperature=0.0, logprobs=2, max_tokens=64, ignore_eos=True), 3 + 2 * 20),
    ],
    ids=["greedy", "random", "logprobs"],
)
def test_one_array_crosses_to_the_device_and_one_back(engine, monkeypatch, params, words):
    core = engine._cores[0]
    ids = decoding(engine, params)
    sent, read = [], []

    def watched(program):
        def call(*args):
            assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(args[:-1]))
            sent.extend(x for x in jax.tree.leaves(args) if not isinstance(x, jax.Array))
            return program(*args)

        return call

    programs = core._programs
    monkeypatch.setattr(programs, "_forward", {b: watched(p) for b, p in programs._forward.items()})
    monkeypatch.setattr(programs, "_sample", {b: watched(p) for b, p in programs._sample.items()})
    real = np.asarray

    def asarray(x, *more):
        if isinstance(x, jax.Array):
            read.append(x)
        return real(x, *more)

    monkeypatch.setattr(np, "asarray", asarray)
    steps = core.steps
    for _ in range(10):
        engine.step()
    monkeypatch.undo()
    assert core.steps == steps + 10
    (layout,) = {programs.layout(programs.bucket(ROWS, ROWS))}
    assert [x.nbytes for x in sent] == [4 * layout.size] * 10
    assert [(x.shape, x.dtype) for x in read] == [((ROWS, words), np.int32)] * 10
    engine.abort(ids)


def test_what_an_engine_process_has_loaded_is_not_collected_again(model_dir):
    code = """if True:
        import gc, sys, threading
        from jaxserve.config import EngineConfig
        from jaxserve.engine.process import _engine_core
        options = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "num_blocks": 33}
        core = _engine_core(EngineConfig(model=sys.argv[1], **options))
        assert gc.isenabled()
        [thread.join() for thread in threading.enumerate() if thread.name == "freeze"]
        print(gc.get_freeze_count(), len(gc.get_objects()), core.state)
    """
    done = subprocess.run([sys.executable, "-c", code, str(model_dir)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frozen, watched, state = done.stdout.split()
    assert state == "warm" and int(frozen) > 50_000
    assert int(watched) < 0.01 * int(frozen)


def test_steps_leave_no_objects_behind(engine):
    ids = decoding(engine, PLAIN)
    for _ in range(4):
        engine.step()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(40):
        engine.step()
    gc.collect()
    assert len(gc.get_objects()) < before + 4 * ROWS  # the prefix cache knows a block more now and then
    engine.abort(ids)
