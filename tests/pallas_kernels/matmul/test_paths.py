"""What other processors would run: products compiled without instructions of this one, or AMX emulated."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INTEGERS = "(cpu and (every_bit or saturate or spoils)) or (test_gated and (576 or nan))"
PATHS = {
    "avx512 without vnni": ("-mno-avx512vnni", INTEGERS),
    "avx2": ("-mno-avx512f", INTEGERS),
    "no vectors": ("-mno-avx512f -mno-avx2 -mno-fma", INTEGERS),
    "amx": ("-DEMULATE_AMX", f"{INTEGERS} or (test_value and bfloat16 and cpu)"),
}
RUN = """
import sys
import pytest
from jaxserve.pallas_kernels import native
native.FLAGS += tuple(sys.argv[1].split())
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", *sys.argv[2:]]))
"""


@pytest.mark.compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86")
@pytest.mark.parametrize("name", PATHS)
def test_values_on_other_processors(name, tmp_path):
    if name == "amx" and "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("x is rounded to bf16 by AMX, and the test takes it from what this processor has")
    flags, chosen = PATHS[name]
    command = [sys.executable, "-c", RUN, flags, chosen, str(HERE)]
    env = os.environ | {"JAXSERVE_HOME": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
