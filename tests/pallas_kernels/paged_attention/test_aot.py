"""Compiled for an H200 where jax's CUDA compiler is installed, GPU or not: nothing spills, all fits."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = 232448
"""Bytes that one block of an H200 can have."""

can_compile = importlib.util.find_spec("jax_cuda13_plugin") and shutil.which("ptxas")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_compile, reason="needs jax-cuda13-plugin, jax-cuda13-pjrt and ptxas"),
]


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    script = Path(__file__).with_name("aot_report.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_fit_the_device(reports):
    for report in reports:
        assert report["kernels"], report["name"]
        for kernel in report["kernels"]:
            assert kernel["spill_bytes"] == 0, (report["name"], kernel)
            assert kernel["shared_bytes"] <= SHARED_MEMORY, (report["name"], kernel)


def test_float32_uses_no_tensor_core_and_16_bits_do(reports):
    for report in reports:
        for kernel in report["kernels"]:
            assert (kernel["products"] == ["fma"]) == report["name"].endswith("f32"), (report["name"], kernel)


def test_pools_stay_in_place(reports):
    for report in reports:
        assert report["pools_aliased"] and not report["pool_copies"] and not report["whiles"], report["name"]
        assert report["temp_mib"] < report["pool_mib"] / 4, report["name"]
