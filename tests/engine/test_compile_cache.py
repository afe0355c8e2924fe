"""Programs last: a second start, in a process of its own, takes every one of them from the disk."""

import json
import os
import subprocess
import sys
import threading

import jax

from jaxserve.engine import compilation

SCRIPT = """
import json, sys
from jaxserve import Engine, SamplingParams
options = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 128, "num_blocks": 33}
with Engine(sys.argv[1], dtype="float32", **options) as engine:
    assert engine.wait_until_warm(300)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    outputs = engine.generate([[9, 8, 7]], params, use_progress=False)
    print(json.dumps({"stats": engine.stats(), "tokens": outputs[0].outputs[0].token_ids}))
"""


def start(model_dir, home):
    env = os.environ | {"JAXSERVE_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, str(model_dir)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_second_start_misses_nothing(model_dir, tmp_path):
    first, second = start(model_dir, tmp_path), start(model_dir, tmp_path)
    assert first["stats"]["compile_cache_misses"] >= first["stats"]["programs"]
    assert second["stats"]["compile_cache_misses"] == 0
    assert second["stats"]["compile_cache_hits"] >= second["stats"]["programs"]
    assert second["tokens"] == first["tokens"]


def test_a_corrupt_cache_is_no_harm(model_dir, tmp_path):
    first = start(model_dir, tmp_path)
    entries = [entry for entry in (tmp_path / "compiled").rglob("*") if entry.is_file()]
    assert entries
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    assert start(model_dir, tmp_path)["tokens"] == first["tokens"]


def test_each_engine_counts_what_its_own_threads_compile():
    compilation.enable_cache()
    ours, others = compilation.Counts(), compilation.Counts()

    def compile_beside() -> None:
        with others.counted():
            jax.jit(lambda x: x * 3 + 7)(1.0)

    with ours.request_path():
        beside = threading.Thread(target=compile_beside)
        beside.start()
        beside.join()
        assert ours.on_request_path == ours.cache_hits + ours.cache_misses == 0
        jax.jit(lambda x: x * 5 + 9)(1.0)
    assert ours.on_request_path >= 1 and ours.cache_hits + ours.cache_misses >= 1
    assert others.on_request_path == 0 and others.cache_hits + others.cache_misses >= 1
