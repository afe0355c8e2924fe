"""`jaxserve plan` as a user runs it: a table, JSON, and exit code 1 with one line for what cannot fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[1] / "configs"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "jaxserve", "plan", *args], env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def h100() -> str:
    done = run(str(CONFIGS / "llama-3.1-8b.json"), "--device", "h100", "--max-model-len", "16384")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_table_says_what_goes_where(h100):
    rows = {line.split("  ")[1]: line for line in h100.splitlines() if line.startswith("  ") and "iB" in line}
    assert "15.0 GiB" in rows["weights"]
    assert "71.2 GiB  0.9 of 79.1 GiB, NVIDIA H100" in rows["memory"]
    assert "blocks of 16 tokens, 2.0 MiB each" in rows["KV pool"]
    assert "kept free" in rows["temporaries"]
    assert "not in this plan" in rows["autotuning"]


def test_the_table_says_how_many_sequences_fit_and_why_not_more(h100):
    lines = h100.splitlines()
    assert any(line.split()[:1] == ["1,024"] and line.endswith("256  max_num_seqs=256") for line in lines)
    assert any(line.endswith(" 0  longer than max_model_len=16384") for line in lines)


def test_the_table_lists_the_programs(h100):
    assert "mixed    64 128 256 512 1024 2048 4096 8192\n" in h100
    assert "decode   1 2 4 8 16" in h100 and "sample   1 2 4 8 16" in h100


def test_json_has_sizes_in_bytes(model_dir):
    options = ["--max-num-seqs=4", "--max-num-batched-tokens=64", "--num-blocks=33", "--dtype=float32"]
    done = run(str(model_dir), *options, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["pool"] == 33 * plan["block_bytes"] and plan["pool_tokens"] == 32 * 32
    assert 0 < plan["temporaries"] <= plan["reserved"]
    assert plan["temporaries_from"].startswith("the compiler: ")
    assert "mixed[64]" in plan["programs"] and "sample[4] full" in plan["programs"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["llama-3.1-70b.json", "--device", "h200"], "mesh=2x1"),
        (["llama-3.1-8b.json", "--device", "l4", "--dtype", "float32"], "dtype=bfloat16, or mesh=2x1"),
        (["llama-3.1-8b.json", "--device", "h100", "--num-blocks", "50000"], "num_blocks="),
    ],
)
def test_what_cannot_fit_is_one_line_and_exit_code_1(options, said):
    done = run(str(CONFIGS / options[0]), *options[1:])
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("jaxserve: ") and " does not fit: weights " in line and said in line


def test_a_server_refuses_what_a_plan_refuses(tmp_path):
    (tmp_path / "config.json").write_text((CONFIGS / "llama-3.1-70b.json").read_text())
    options = ["--load-format", "dummy", "--dtype", "float32", "--max-num-batched-tokens", str(1 << 24)]
    command = [sys.executable, "-m", "jaxserve", "serve", str(tmp_path), "--port", "0", *options]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "does not fit: weights 262.8 GiB" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "h1000"], "device must be one of"),
        (["no-such-place.json"], "no model 'no-such-place.json'"),
        (["--max-model-len", "0"], "max_model_len must be at least 1"),
    ],
)
def test_bad_input_is_named(options, said):
    done = run(*options)
    assert done.returncode == 1 and said in done.stderr and len(done.stderr.splitlines()) == 1
