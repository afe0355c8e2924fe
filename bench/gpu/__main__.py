"""On an NVIDIA GPU, in one call of under ten minutes: is it right, and how far from the device's ceilings.

    python -m bench.gpu [--out DIR] [--sections NAME ...] [--attention NAME] [--dry]
    python bench/gpu …      the same, from anywhere

Needs this checkout, jax with CUDA and jaxserve's dependencies; no network, no checkpoint: the engine gets
random weights in the shape of Llama 3.1 8B. Each section is a process with a time limit: one that fails,
hangs or breaks the device is reported with what it measured, and the others go on. What stands first
matters most. PyTorch, FlashAttention, transformers and matplotlib are used where they are installed. Writes
rows.jsonl (at once), gpu.json, report.md, log.txt and plots. `--dry`: tiny shapes on a CPU, kernels
interpreted.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.gpu import report
from bench.gpu.job import ROOT, ROWS, Job, append

SECTIONS = {
    "ceilings": 25,
    "check": 85,
    "engine": 215,
    "restart": 45,
    "kernels": 70,
    "experts": 25,
    "sampling": 20,
    "torch_kernels": 25,
    "peers": 55,
    "plots": 15,
}
"""What runs, and for how many seconds: each has its share of the time that is left."""
WITHOUT_JAX = ("torch_kernels", "peers", "plots")
TOTAL = 580.0
"""Seconds."""


def main() -> None:
    began = time.time()
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu", help="where results go")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--attention", default="auto", help="the engine's implementation of attention")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="that all of it may take")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return work(Job(*json.loads(args.job)))
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / ROWS).write_text("")
    append(out, {"section": "run", "created": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "dry": args.dry})
    # on SIGTERM a section must not stay behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    worked, chosen = [], [name for name in SECTIONS if name in args.sections]
    with tempfile.TemporaryDirectory() as home:
        for i, name in enumerate(chosen):
            left, later = began + args.seconds - time.time(), sum(SECTIONS[each] for each in chosen[i:])
            limit = left * SECTIONS[name] / later
            job = Job(name, str(out), home, time.time(), limit, args.dry, args.attention)
            status = run(job) if limit > 1 else "no time was left"
            append(out, {"section": "run", "of": name, "status": status, "seconds": time.time() - job.began})
            worked.append(status == "ok")
            text = report.write(out)
    print(f"\n{text}\n{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    sys.exit(not all(worked))


def run(job: Job) -> str:
    """A section in a process of its own; how it ended."""
    env = os.environ | {"JAXSERVE_HOME": job.home, "JAX_COMPILATION_CACHE_DIR": ""}
    env |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}  # as an engine has it
    env |= {"JAX_PLATFORMS": "cpu"} if job.dry else {}
    with (Path(job.out) / "log.txt").open("a+") as log:
        begin = log.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent), "--job", json.dumps(job)],
            env=env, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(job.seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {job.seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
        log.seek(begin)
        said = log.read().strip().splitlines()
    return f"failed with {code}: {said[-1][:160] if said else 'it said nothing'}" if code else "ok"


def work(job: Job) -> None:
    """Inside of a section's process."""
    if not job.dry and job.section not in WITHOUT_JAX:
        import jax

        if jax.default_backend() != "gpu":
            raise SystemExit(f"no GPU: jax runs on {jax.default_backend()}; --dry needs none")
    importlib.import_module(f"bench.gpu.{job.section}").run(job)


if __name__ == "__main__":
    main()
