"""A step that fails on the device, under load: who gets the error, and that no one else notices."""

import random
from pathlib import Path

import jax
import pytest

from jaxserve import Engine, SamplingParams
from jaxserve.engine.core import MAX_FAILED_STEPS
from jaxserve.engine.model import LoadedModel
from jaxserve.errors import EngineDied
from jaxserve.pallas_kernels import native

pytestmark = pytest.mark.compiler

CALLS_PER_STEP = 2
"""One for each layer."""


@pytest.fixture(scope="module")
def engine(make_llama):
    """Its every layer has a native call that `fail_after` makes fail, once."""
    kernel = native.Kernel(Path(__file__).parent / "failing" / "cpu.cc")
    target = native.target(kernel, "pass_on")
    attend = LoadedModel._attend

    def attend_or_fail(self, implementation, meta, q, *rest, **options):
        like = jax.ShapeDtypeStruct(q.shape, q.dtype)
        q = jax.ffi.ffi_call(target, like, input_output_aliases={0: 0})(q)
        return attend(self, implementation, meta, q, *rest, **options)

    sizes = {"max_num_seqs": 6, "max_num_batched_tokens": 64, "block_size": 16, "num_blocks": 40}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "_attend", attend_or_fail)
        with Engine(str(make_llama("fails")), dtype="float32", matmul="xla", **sizes) as engine:
            engine.wait_until_warm()
            engine.core = engine._cores[0]
            engine.fail_after = native._library(kernel).handle.fail_after
            yield engine


@pytest.fixture
def steps(engine, monkeypatch):
    """The requests of each step that was dispatched."""
    seen = []
    dispatch = engine.core._dispatch

    def note(schedule):
        seen.append([chunk.request for chunk in schedule.chunks])
        return dispatch(schedule)

    monkeypatch.setattr(engine.core, "_dispatch", note)
    return seen


def work():
    """Thirty prompts, of which many begin alike; greedy and sampled."""
    chance = random.Random(7)
    shared = [chance.randrange(6, 262) for _ in range(40)]
    for i in range(30):
        own = [chance.randrange(6, 262) for _ in range(chance.randint(1, 60))]
        length = chance.randint(10, 40)
        params = SamplingParams(
            temperature=float(i % 2), seed=i, max_tokens=length, ignore_eos=True, output_kind="delta"
        )
        yield shared[: 20 * (i % 3)] + own, params


class Load:
    """Requests that are under way; what each has been given, and the error if it got one."""

    def __init__(self, engine):
        self.engine = engine
        self.tokens = {engine.add_request(prompt, params): [] for prompt, params in work()}
        self.errors = {}

    def step(self):
        for output in self.engine.step():
            self.tokens[output.request_id] += output.outputs[0].token_ids
            if output.error:
                self.errors[output.request_id] = output.error

    def run(self):
        while self.engine.has_unfinished():
            self.step()
        return self


@pytest.fixture(scope="module")
def undisturbed(engine):
    return list(Load(engine).run().tokens.values())


def check(load, undisturbed, failed):
    """Only these got the error, the others all their tokens; nothing is left, and the engine serves."""
    assert set(load.errors) == failed
    for (request, tokens), wanted in zip(load.tokens.items(), undisturbed, strict=True):
        assert tokens == (wanted[: len(tokens)] if request in failed else wanted)
    stats = load.engine.stats()
    assert stats["running"] == stats["waiting"] == stats["blocks_used"] == 0
    assert stats["compiles_on_request_path"] == 0
    assert list(Load(load.engine).run().tokens.values()) == undisturbed


def unfinished(requests):
    return {request.id.partition("#")[0] for request in requests if request.finish_reason is None}


@pytest.mark.parametrize("layer", range(CALLS_PER_STEP))
def test_a_call_that_fails_on_the_device_costs_only_the_requests_of_its_step(
    engine, undisturbed, steps, layer
):
    load, failed = Load(engine), set()
    core = engine.core
    for pause in (0, 3, 9, 14):
        for _ in range(pause):
            load.step()
        jax.block_until_ready([flight.targets for flight in core._flights])
        engine.fail_after(CALLS_PER_STEP + layer)  # not in the next step, but in the one after it
        at = len(steps) + 1
        told = len(load.errors)
        while len(load.errors) == told:
            hit = unfinished(steps[at]) if len(steps) > at else set()
            load.step()
        failed |= hit
        assert not core._scheduler.running and not core._pool.used, "all are recomputed from their tokens"
        assert all(block not in core._pool.cache for block in range(core._pool.num_blocks))
    assert 4 <= len(failed) < 30
    assert all("the device said no" in error for error in load.run().errors.values())
    check(load, undisturbed, failed)


def test_a_step_that_cannot_be_dispatched_takes_nothing_from_the_one_before(
    engine, undisturbed, steps, monkeypatch
):
    load = Load(engine)
    for _ in range(5):
        load.step()
    (before,) = engine.core._flights
    given = {request: len(tokens) for request, tokens in load.tokens.items()}
    with monkeypatch.context() as patch:
        patch.setattr(engine.core._programs, "forward", lambda bucket: 1 / 0)
        load.step()
    for chunk in before.chunks:
        request = chunk.request.id.partition("#")[0]
        assert len(load.tokens[request]) == given[request] + chunk.samples
    failed = set(load.errors)
    assert failed and failed <= {request.id.partition("#")[0] for request in steps[-1]}
    assert all("ZeroDivisionError" in error for error in load.errors.values())
    check(load.run(), undisturbed, failed)


def test_a_step_that_the_one_before_it_spoiled_is_not_to_blame(engine, undisturbed, steps, monkeypatch):
    """Where a dispatch itself raises the error of a spoiled pool, as a synchronous runtime does."""
    load = Load(engine)
    forward_of = engine.core._programs.forward

    def forward(bucket):
        def run(weights, kv, slots, packed):
            return forward_of(bucket)(weights, jax.block_until_ready(kv), slots, packed)

        return run

    monkeypatch.setattr(engine.core._programs, "forward", forward)
    while not engine.core._scheduler.waiting or len(steps) < 4:
        load.step()
    jax.block_until_ready(engine.core._flights[-1].targets)
    engine.fail_after(0)
    at = len(steps)
    load.step()
    hit, before = unfinished(steps[at]), len(steps)
    load.step()
    assert len(steps) == before + 1, "the spoiled pool was not met by a dispatch"
    check(load.run(), undisturbed, hit)


def test_steps_that_fail_one_after_another_end_the_engine(engine, undisturbed, monkeypatch):
    load = Load(engine)
    read = engine.core._read
    failures = []

    def failing(flight):
        if len(failures) < limit:
            failures.append(flight)
            raise RuntimeError(f"failure {len(failures)}")
        return read(flight)

    monkeypatch.setattr(engine.core, "_read", failing)
    for _ in range(3):  # each time one short of too many
        limit = len(failures) + MAX_FAILED_STEPS - 1
        while len(failures) < limit:
            load.step()
        for _ in range(2):
            load.step()
    check(load.run(), undisturbed, set(load.errors))
    limit = len(failures) + MAX_FAILED_STEPS
    load = Load(engine)
    with pytest.raises(EngineDied, match=f"{MAX_FAILED_STEPS} steps in a row failed, .*failure {limit}"):
        load.run()
    engine.abort(list(load.tokens))
    engine.core._failed_steps = 0
    engine.core._flights.clear()


def test_a_pool_that_cannot_be_made_anew_ends_the_engine(engine, monkeypatch):
    Load(engine)
    monkeypatch.setattr(engine.core, "_read", lambda flight: 1 / 0)
    monkeypatch.setattr(engine.core._programs, "empty_state", lambda: {}["no device"])
    with pytest.raises(KeyError, match="no device"):
        while True:
            engine.step()
