"""`jaxserve doctor` finds what is here, and what has been broken on purpose."""

import json
import os
import subprocess
import sys

import pytest

from jaxserve import __version__

KERNEL = "C++ kernel matmul-BFloat16"


@pytest.fixture
def doctor(tmp_path):
    """Exit code and findings by name, in an empty home and with the given variables."""

    def doctor(**variables):
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAXSERVE_HOME": str(tmp_path / "home"), **variables}
        command = [sys.executable, "-m", "jaxserve", "doctor", "--json"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        return done.returncode, {finding["name"]: finding for finding in json.loads(done.stdout)}

    return doctor


def fake_nvidia_smi(tmp_path, script):
    """A PATH whose first nvidia-smi is this script."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


def test_a_machine_that_works(doctor, tmp_path):
    code, found = doctor(CXX=sys.executable)  # any program will do: nothing is compiled
    assert code == 0
    assert found["jaxserve"]["value"] == __version__
    assert found[KERNEL]["value"] == f"compiled on first use, with {sys.executable}"
    assert "(cpu)" in found["devices"]["value"]
    assert found["JAXSERVE_HOME"]["value"].startswith(str(tmp_path / "home"))
    assert found["compiled programs"]["value"].startswith("0 files")
    assert found["default model"]["state"] == "note"
    assert "jaxserve pull" in found["default model"]["advice"]
    assert not (tmp_path / "home").exists()


def test_a_machine_without_a_compiler(doctor):
    code, found = doctor(CXX="no-such-compiler")
    assert code == 0
    assert found[KERNEL]["state"] == "note"
    assert "no-such-compiler" in found[KERNEL]["value"]


def test_a_platform_that_is_not_here(doctor):
    code, found = doctor(JAX_PLATFORMS="no_such_platform")
    assert code == 1
    assert found["devices"]["state"] == "broken"
    assert "unset JAX_PLATFORMS" in found["devices"]["advice"]


def test_a_home_that_cannot_be_written(doctor, tmp_path):
    (tmp_path / "file").touch()
    code, found = doctor(JAXSERVE_HOME=str(tmp_path / "file" / "home"))
    assert code == 1
    assert "set JAXSERVE_HOME" in found["JAXSERVE_HOME"]["advice"]


def test_a_driver_that_fails(doctor, tmp_path):
    path = fake_nvidia_smi(tmp_path, "echo NVIDIA-SMI has failed; exit 9")
    code, found = doctor(PATH=path)
    assert code == 1
    assert found["NVIDIA driver"]["value"] == "NVIDIA-SMI has failed"


def test_a_gpu_that_jax_was_told_not_to_use(doctor, tmp_path):
    path = fake_nvidia_smi(tmp_path, "echo NVIDIA H200, 580.1, 143771 MiB")
    code, found = doctor(PATH=path)
    assert code == 0
    assert "H200" in found["NVIDIA driver"]["value"]
    assert found["devices"]["state"] == "note"
    assert "JAX_PLATFORMS keeps JAX off the GPU" in found["devices"]["advice"]


def test_a_gpu_without_its_build_of_jax(doctor, tmp_path):
    path = fake_nvidia_smi(tmp_path, "echo NVIDIA H200, 580.1, 143771 MiB")
    code, found = doctor(PATH=path, JAX_PLATFORMS="")
    assert code == 1
    assert "jaxserve[cuda12]" in found["devices"]["advice"]
