"""The native kernels under all warnings of the compiler, and their tests under its sanitizers."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.pallas_kernels import native
from jaxserve.pallas_kernels.matmul import cpu as matmul
from jaxserve.pallas_kernels.paged_attention import cpu as paged_attention
from jaxserve.pallas_kernels.sampling import cpu as sampling

KERNELS = [
    native.Kernel(source, number)
    for source in (matmul.SOURCE, paged_attention.SOURCE)
    for number in native.NUMBERS.values()
] + [matmul.INT8, sampling.KERNEL]
# gcc 12's own AVX-512 headers read a vector before they set it; psabi is a note on ABIs, not on the code
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-psabi")
HERE = Path(__file__).parent
# what other processors have, as flags after -march=native; the matrix units are played in plain C++
PROCESSORS = {
    "AMX": ("-DEMULATE_AMX",),
    "no bf16 products": ("-mno-avx512bf16",),
    "AVX2": ("-march=x86-64-v3",),
    "no AVX": ("-march=x86-64",),
}
SANITIZERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

pytestmark = pytest.mark.compiler


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_compiles_without_a_warning(kernel, tmp_path):
    native.build(kernel, tmp_path, *WARNINGS)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_attention_compiles_without_a_warning_for(processor, tmp_path):
    kernel = native.Kernel(paged_attention.SOURCE, "BFloat16")
    native.build(kernel, tmp_path, *WARNINGS, *PROCESSORS[processor])


@pytest.fixture(scope="module")
def sanitized_home(tmp_path_factory) -> Path:
    """A $JAXSERVE_HOME of its own for what the sanitizers were compiled into."""
    return tmp_path_factory.mktemp("sanitized")


def run_sanitized(home: Path, code: str, *args: str, flags=()) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process whose native kernels are compiled with the sanitizers and these flags."""
    preloaded = [runtime("libasan.so"), runtime("libstdc++.so")]  # the interpreter has neither
    begin = f"from jaxserve.pallas_kernels import native; native.FLAGS += {SANITIZERS + flags}\n"
    # what the interpreter never frees is not looked at
    env = {"LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0", "JAXSERVE_HOME": str(home)}
    command = [sys.executable, "-c", begin + code, *args]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, cwd=HERE.parents[1])


def runtime(library: str) -> str:
    command = [*native.compiler(), f"-print-file-name={library}"]
    path = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"the compiler comes without {library}")
    return path


RUN = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"


def test_values_are_computed_within_bounds(sanitized_home):
    chosen = "cpu and (padded or everything or bits or head or block or float or every_bit)"
    chosen += " or random_layers or test_gated or (test_sampling and (cpu or cpp) and not frequencies)"
    tests = str(HERE), str(HERE.parent / "engine" / "test_sampling.py")
    # -s: what a sanitizer says as it ends the process would stay in pytest's capture
    done = run_sanitized(sanitized_home, RUN, "-qs", "-p", "no:cacheprovider", "-k", chosen, *tests)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.stem.rsplit("-", 2)[0] for path in (sanitized_home / "native").iterdir()}
    assert made == {kernel.name for kernel in KERNELS}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_bf16_attention_within_bounds_on(processor, tmp_path):
    tests = str(HERE / "paged_attention" / "test_values.py")
    chosen = "cpu and (bf16 or left_behind)"
    options = ("-qs", "-p", "no:cacheprovider", "-k", chosen, tests)
    done = run_sanitized(tmp_path, RUN, *options, flags=PROCESSORS[processor])
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_read_out_of_bounds_would_be_found(sanitized_home):
    """A block table that points past the pool."""
    code = """if True:
        import jax, jax.numpy as jnp
        from jaxserve.pallas_kernels.paged_attention import paged_attention, ragged_meta
        one = jnp.ones(1, jnp.int32)
        meta = ragged_meta(jnp.full((1, 1), 2), one, one, 1)
        x = jnp.ones((1, 1, 8))
        pool = jnp.ones((2, 2, 1, 4, 8))
        jax.block_until_ready(paged_attention(x, x, x, pool, meta, scale=1.0, implementation="cpu"))
    """
    done = run_sanitized(sanitized_home, code)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
