"""`jaxserve compile`: what it makes, a server's start finds; a second time there is nothing to do."""

import json
import os
import re
import subprocess
import sys

import pytest

OPTIONS = {
    "dtype": "float32",
    "max_num_seqs": 2,
    "max_num_batched_tokens": 64,
    "max_model_len": 128,
    "num_blocks": 33,
}
SERVE = """
import json, sys
from jaxserve import Engine
with Engine(sys.argv[1], **json.loads(sys.argv[2])) as engine:
    assert engine.wait_until_warm(300)
    print(json.dumps(engine.stats()))
"""


def python(home, *command):
    env = os.environ | {"JAXSERVE_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def made(out):
    """{what: (compiled, were here)} of what the command printed."""
    lines = re.findall(r"^([\w+ ]+): (\d+) compiled, (\d+) were here; [\d.]+ MiB at /", out, re.MULTILINE)
    return {what: (int(compiled), int(here)) for what, compiled, here in lines}


@pytest.mark.compiler
def test_a_start_after_it_compiles_nothing(model_dir, tmp_path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    command = ["-m", "jaxserve", "compile", str(model_dir), *flags, "--port", "8123"]
    first = made(python(tmp_path, *command))
    stats = json.loads(python(tmp_path, "-c", SERVE, str(model_dir), json.dumps(OPTIONS)))
    count = stats["programs"] + 1  # and the one that makes an empty pool
    assert first == {"C++ kernels": (3, 0), "programs": (count, 0)}
    assert (stats["compile_cache_misses"], stats["compile_cache_hits"]) == (0, count)
    assert made(python(tmp_path, *command)) == {"C++ kernels": (0, 3), "programs": (0, count)}


@pytest.mark.compiler
def test_the_kernels_alone_take_no_model(tmp_path):
    command = ["-m", "jaxserve", "compile", "--native-only", "--dtype", "float32"]
    assert made(python(tmp_path, *command)) == {"C++ kernels": (3, 0)}
    assert len(list((tmp_path / "native").iterdir())) == 3
    assert made(python(tmp_path, *command)) == {"C++ kernels": (0, 3)}
    assert not (tmp_path / "compiled").exists() and not (tmp_path / "models").exists()


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert made(python(tmp_path, "-m", "jaxserve", "compile", "--native-only")) == {"C++ kernels": (0, 0)}


@pytest.mark.parametrize("model", [["not/here"], ["--model", "not/here"]])
def test_the_kernels_alone_refuse_a_model(model, capsys):
    from jaxserve.cli import main

    assert main(["compile", "--native-only", *model]) == 1
    assert "--native-only takes no model, but not/here is given" in capsys.readouterr().err
