"""Programs last: a second start takes every one of them from the disk, traces nothing, and trusts nothing."""

import hashlib
import json
import os
import pickle
import re
import resource
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve.engine import compilation
from jaxserve.engine.compilation import PACKAGE, TRACED, Counts, Shelf, prune
from jaxserve.engine.step import forward

SCRIPT = """
import json, sys
from jaxserve import Engine, SamplingParams
options = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "max_model_len": 128, "num_blocks": 33}
with Engine(sys.argv[1], dtype="float32", **options) as engine:
    assert engine.wait_until_warm(300)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    outputs = engine.generate([[9, 8, 7]], params, use_progress=False)
    print(json.dumps({"stats": engine.stats(), "tokens": outputs[0].outputs[0].token_ids}))
"""


def start(model_dir, home, **settings):
    env = os.environ | {"JAXSERVE_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path), **settings}
    command = [sys.executable, "-c", SCRIPT, str(model_dir)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_second_start_compiles_nothing_and_a_third_only_what_was_damaged(model_dir, tmp_path):
    first, second = start(model_dir, tmp_path), start(model_dir, tmp_path)
    entries = sorted((tmp_path / "compiled").rglob("*.program"))
    count = first["stats"]["programs"] + 1  # and the one that makes an empty pool
    assert first["stats"]["compile_cache_misses"] == len(entries) == count
    assert second["stats"]["compile_cache_misses"] == 0
    assert second["stats"]["compile_cache_hits"] == count
    for entry in entries[::2]:
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    third, fourth = start(model_dir, tmp_path), start(model_dir, tmp_path)
    assert third["stats"]["compile_cache_misses"] == len(entries[::2])
    assert fourth["stats"]["compile_cache_misses"] == 0
    assert first["tokens"] == second["tokens"] == third["tokens"] == fourth["tokens"]


def test_what_came_from_a_cache_of_jax_is_not_kept(model_dir, tmp_path):
    settings = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax")}
    settings |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first, second = (start(model_dir, tmp_path, **settings) for _ in range(2))
    assert list((tmp_path / "jax").iterdir())
    assert not list(tmp_path.rglob("*.program"))
    assert start(model_dir, tmp_path)["tokens"] == first["tokens"] == second["tokens"]


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSERVE_HOME", str(tmp_path))
    return Shelf(jax.devices()[:1], "facts")


@pytest.fixture(scope="module")
def doubled():
    lowered = jax.jit(lambda x: 2 * x).lower(jnp.ones(3))
    return lowered.compile(), lowered.as_text()


def signed(body: bytes) -> bytes:
    return hashlib.sha256(body).digest() + body


def test_a_program_is_found_under_what_it_is_made_from(shelf, doubled, monkeypatch):
    shelf.put("double", *doubled)
    assert shelf.get("double")(jnp.arange(3.0)).tolist() == [0.0, 2.0, 4.0]
    assert shelf.get("other") is None
    devices = jax.devices()[:1]
    assert Shelf(devices, "facts").get("double") is not None
    assert Shelf(devices, "other facts").get("double") is None
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_thunk_runtime=true")
    assert Shelf(devices, "facts").get("double") is None
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(compilation.processor, "identity", lambda: "another")
    assert Shelf(devices, "facts").get("double") is None


DAMAGE = {
    "empty": lambda body: b"",
    "cut": lambda body: body[: len(body) // 2],
    "one bit": lambda body: body[:-100] + bytes([body[-100] ^ 4]) + body[-99:],
    "in the digest": lambda body: bytes([body[0] ^ 1]) + body[1:],
    "garbage": lambda body: os.urandom(len(body)),
    "not a program": lambda body: signed(b"something else"),
    "of another form": lambda body: signed(pickle.dumps(([], b"something else"))),
    "no executable": lambda body: signed(pickle.dumps(([], b"x" * 99, pickle.loads(body[32:])[2]))),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_not_there_and_is_made_anew(shelf, doubled, caplog, damage):
    shelf.put("double", *doubled)
    (path,) = Path(shelf._path("double")).parent.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert shelf.get("double") is None
    assert str(path) in caplog.text
    shelf.put("double", *doubled)
    assert shelf.get("double") is not None


def test_nothing_is_kept_where_nothing_can_be(shelf, doubled, caplog, tmp_path):
    (tmp_path / "compiled").touch()
    shelf.put("double", *doubled)
    assert shelf.get("double") is None
    assert "cannot be kept" in caplog.text
    prune()


def test_a_full_disk_leaves_no_half_program(shelf, doubled, caplog, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        shelf.put("double", *doubled)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be kept" in caplog.text
    assert not [path for path in (tmp_path / "compiled").rglob("*") if path.is_file()]
    assert shelf.get("double") is None


def test_what_was_used_least_recently_is_forgotten_first(shelf, doubled, tmp_path):
    other = tmp_path / "compiled" / "of-another-version" / "old"
    other.parent.mkdir(parents=True)
    other.write_bytes(bytes(1000))
    for name in ("first", "second"):
        shelf.put(name, *doubled)
    for age, path in enumerate((shelf._path("first"), shelf._path("second"), other)):
        os.utime(path, (10**9 - age, 10**9 - age))
    size = shelf._path("first").stat().st_size
    prune(2 * size + 1)
    assert not other.exists() and shelf.get("second")  # which is the latest now
    prune(size + 1)
    assert shelf.get("first") is None and shelf.get("second")


def test_all_that_is_traced_is_part_of_what_programs_stand_under(make_engine):
    programs = make_engine()._cores[0]._programs
    layout = programs.layout(programs.buckets[0])
    state = programs._weights, programs._kv, programs._slots, programs._array(layout.size)
    text = jax.jit(partial(forward, programs._functions, layout)).lower(*state).as_text(debug_info=True)
    traced = {Path(found) for found in re.findall(rf'"({re.escape(str(PACKAGE))}/[^"]+\.py)"', text)}
    assert PACKAGE / "models/layers/decoder.py" in traced
    # these call what is traced, and decide nothing of it
    callers = {PACKAGE / f"engine/{name}.py" for name in ("core", "engine", "core_loop", "process")}
    assert traced - callers <= {path for pattern in TRACED for path in PACKAGE.glob(pattern)}


def test_each_engine_counts_what_its_own_requests_wait_for():
    ours, others = Counts(), Counts()

    def compile_beside() -> None:
        with others.request_path():
            jax.jit(lambda x: x * 3 + 7)(1.0)

    with ours.request_path():
        beside = threading.Thread(target=compile_beside)
        beside.start()
        beside.join()
        assert (ours.on_request_path, others.on_request_path) == (0, 1)
        jax.jit(lambda x: x * 5 + 9)(1.0)
    jax.jit(lambda x: x * 6 + 9)(1.0)
    assert (ours.on_request_path, others.on_request_path) == (1, 1)
