"""On an NVIDIA GPU, in one call of under ten minutes: is it right, and how far from the device's ceilings.

    python bench/gpu.py [--out FILE] [--sections NAME ...] [--attention xla] [--dry]

Needs jaxserve and jax with CUDA; no network, no checkpoint: the engine gets random weights in the shape of
Llama 3.1 8B. Each section is a process with a time limit: one that fails, hangs or breaks the device is
reported with what it measured, and the others go on. `of ceiling`: the time that a row's bytes or products
need at the rates measured first, over the time they took. `--dry`: tiny shapes on a CPU, kernels interpreted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

TRIED = {"tile": (32, 128), "num_warps": (2, 8), "num_stages": (2, 4), "block_m": (32, 128), "splits": (1, 4)}
CASES = Path(__file__).resolve().parents[1] / "tests/pallas_kernels/paged_attention"
LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0,
}  # fmt: skip
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"), help="the JSON file")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--attention", default="auto", help="the engine's implementation of attention")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--child", nargs=2, metavar=("SECTION", "BEGAN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        if not args.dry and jax.default_backend() != "gpu":
            raise SystemExit(f"no GPU: jax runs on {jax.default_backend()}; --dry needs none")
        return SECTIONS[args.child[0]][0](args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {}
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(LLAMA_8B | (TINY if args.dry else {})))
        for name in args.sections:
            report[name] = start(name, place, args.dry)
            compare(report)
            args.out.write_text(json.dumps(report, indent=1))
    for name, section in report.items():
        print(f"\n## {name}: {section['status']}, {section['seconds']:.0f} s\n")
        for names, rows in groupby(section["rows"], key=list):  # a table for each kind of row
            cells = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
            print(*(f"| {' | '.join(line)} |\n" for line in [names, ["---"] * len(names), *cells]), sep="")
    sys.exit(any(section["status"] != "ok" for section in report.values()))


def start(name: str, place: str, dry: bool) -> dict:
    """Run a section in a process of its own: its status, seconds and rows."""
    begin, limit = time.time(), SECTIONS[name][1]
    env = os.environ | {"JAXSERVE_HOME": place, "JAX_COMPILATION_CACHE_DIR": ""}
    env |= {"JAX_PLATFORMS": "cpu"} if dry else {}
    with tempfile.TemporaryFile("w+") as out:
        try:
            command = [sys.executable, *sys.argv, "--child", name, str(begin)]
            code = subprocess.run(command, env=env, stdout=out, timeout=limit).returncode
            status = f"failed with {code}" if code else "ok"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit} s"
        out.seek(0)
        rows = [json.loads(line) for line in out]
    return {"status": status, "seconds": time.time() - begin, "rows": rows}


def compare(report: dict) -> None:
    """Put rows that count GB and TFLOP beside the ceilings, if those were measured."""
    copy, read, matmul = [row["rate"] for row in report.get("ceilings", {"rows": []})["rows"]] or [0, 0, 0]
    for row in [row for section in report.values() for row in section["rows"] if "GB" in row and matmul]:
        row["of ceiling"] = 1e3 * max(row["GB"] / max(copy, read), row["TFLOP"] / matmul) / row["ms"]


def emit(**row: object) -> None:
    for stream in (sys.stdout, sys.stderr):  # for the JSON file, and for who watches
        print(json.dumps(row), file=stream, flush=True)


def seconds_per_call(step, state, calls: int = 4) -> float:
    """Median seconds of `state = step(state)`, several dispatched at a time; the first do not count."""

    def run() -> None:
        nonlocal state
        for _ in range(calls):
            state = step(state)
        jax.block_until_ready(state)

    run()
    return float(np.median(timeit.repeat(run, number=1, repeat=5))) / calls


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def ceilings(args: argparse.Namespace) -> None:
    x, side = normal(0, 2**20 if args.dry else 2**30), 256 if args.dry else 8192
    total = partial(jax.jit(lambda x, total: total + x.sum(dtype=jnp.float32)), x)
    multiply = partial(jax.jit(lambda b, a: (a @ b) * side**-0.5), normal(1, side, side))
    copy = 2e-9 * x.nbytes / seconds_per_call(jax.jit(lambda x: x + 1), x)
    read = 1e-9 * x.nbytes / seconds_per_call(total, jnp.float32(0))
    matmul = 2e-12 * side**3 / seconds_per_call(multiply, normal(2, side, side))
    for ceiling, rate in ("copy GB/s", copy), ("read GB/s", read), ("matmul TFLOP/s", matmul):
        emit(ceiling=ceiling, rate=rate, on=f"{jax.devices()[0].device_kind}, jax {jax.__version__}")


def check(args: argparse.Namespace) -> None:
    """The GPU kernel against the specification, both on this device, over the tests' case table."""
    sys.path.insert(0, str(CASES))
    import cases

    from jaxserve.pallas_kernels.paged_attention import paged_attention

    llama = partial(cases.Case, heads=32, kv_heads=8, dim=128, dtype=jnp.bfloat16)
    far = llama("llama 8b, over 2**31 numbers in the pool", (1, 1, 40), (200, 30, 17))
    decode = llama("llama 8b decode", (1,) * 16, tuple(range(100, 1700, 100)))
    mixed = llama("llama 8b mixed", (1, 1, 200, 70), (900, 17, 0, 300), pad_rows=9)
    chosen = cases.CASES[::16] if args.dry else [*cases.CASES, decode, mixed, far]
    # roundings of the kernel and of the reference, of numbers up to about 3
    limits = {"float32": 2e-5, "bfloat16": 3 * 3 * 2**-9, "float16": 3 * 3 * 2**-12}

    def prepare(case):
        x = cases.make(case)
        if case is far:  # the same blocks at the end of a large pool
            n = 2**31 // x.pool[0].size
            x.pool = jnp.zeros((n + len(x.pool), *x.pool.shape[1:]), x.pool.dtype).at[n:].set(x.pool)
            x.meta = x.meta._replace(block_tables=x.meta.block_tables + n)
        options, inputs = x.options | {"interpret": args.dry}, (x.q, x.k, x.v, x.pool, x.meta)
        both = [partial(paged_attention, implementation=name, **options) for name in ("gpu", "reference")]
        return inputs, [jax.jit(attend).lower(*inputs).compile() for attend in both]

    wrong = 0
    with ThreadPoolExecutor(8) as threads:
        for case, job in [(case, threads.submit(prepare, case)) for case in chosen]:
            worst, limit = float("nan"), limits[np.dtype(case.dtype).name]
            try:
                inputs, programs = job.result()
                (out, pool), (want, want_pool) = (program(*inputs) for program in programs)
                error = np.abs(np.asarray(out, np.float64) - np.asarray(want, np.float64))
                worst = float(error[np.asarray(inputs[-1].row_pos) >= 0].max(initial=0.0))
                same = np.array_equal(*(np.asarray(p)[1:].view(np.uint8) for p in (pool, want_pool)))
                verdict = "WRONG POOL" if not same else "ok" if worst <= limit else "WRONG"
            except Exception as problem:
                verdict = repr(problem)[:150]
            wrong += verdict != "ok"
            emit(case=case.name, max_error=worst, limit=limit, verdict=verdict)
    sys.exit(wrong)


def attention(args: argparse.Namespace) -> None:
    """One layer's attention in bf16, write included; then with one of the kernel's sizes changed."""
    from jaxserve.pallas_kernels.paged_attention import gpu, paged_attention, ragged_meta

    heads, kv_heads, dim, blocks, layers = (4, 2, 32, 65, 2) if args.dry else (32, 8, 128, 2**15 + 1, 8)
    decode, prefill = (32, 1, 4095), (1, 2048, 0)  # sequences, rows of each, rows before them
    works = [(b, 1, c - 1) for b in (1, 8, 32, 128) for c in (1024, 4096)] + [(1, 1, 32767), prefill]
    works += [(1, 512, 0), (1, 8192, 0), (1, 2048, 6144), (8, 256, 1024)]
    sizes = [{name: n} for name, ns in TRIED.items() for n in ns]
    trials = [(work, {}) for work in works] + [(work, size) for work in (decode, prefill) for size in sizes]
    if args.dry:
        trials = [((2, 1, 31), {}), ((2, 1, 31), {"splits": 2}), ((1, 20, 9), {"tile": 32})]
    pool, variant, splits = normal(0, blocks, 2, kv_heads, 16, dim), gpu.variant, gpu.num_splits

    def milliseconds(count: int, rows: int, before: int, change: dict[str, int]) -> float:
        """Some layers in a row, each over blocks of its own so that no context is in the cache."""
        width = -(-(before + rows) // 16)
        sets = min(layers, (blocks - 1) // (count * width))
        tables = 1 + np.random.default_rng(0).permutation(sets * count * width).reshape(sets, count, width)
        q, kv = (normal(h, count * rows, h, dim) for h in (heads, kv_heads))
        attend = jax.jit(partial(paged_attention, scale=0.1, implementation="gpu", interpret=args.dry))

        def step(state, kv, tables, starts, q_lens):
            q, pool = state
            for i in range(layers):
                out, pool = attend(q, kv, kv, pool, ragged_meta(tables[i % sets], starts, q_lens, len(q)))
                q = (q + out) / 2
            return q, pool

        rest = kv, *(jnp.asarray(x, jnp.int32) for x in (tables, [before] * count, [rows] * count))
        sizes, kind = {n: v for n, v in change.items() if n != "splits"}, "tiles" if rows > 1 else "rows"
        with mock.patch.multiple(
            gpu,
            variant=lambda of, *facts: variant(of, *facts)._replace(**sizes if of == kind else {}),
            num_splits=lambda *facts: change.get("splits") or splits(*facts),
        ):
            call = jax.jit(step, donate_argnums=0).lower((q, pool), *rest).compile()
        return 1e3 * seconds_per_call(lambda state: call(state, *rest), (q, jnp.copy(pool))) / layers

    for (count, rows, before), change in trials:
        row = {"sequences": count, "rows": rows, "after": before, "changed": str(change or "")}
        numbers = 2 * heads * rows + 2 * kv_heads * (before + 2 * rows)
        products = 2 * heads * (rows * before + rows * (rows + 1) / 2)
        cost = {"GB": 2e-9 * count * dim * numbers, "TFLOP": 2e-12 * count * dim * products}
        try:
            emit(**row, ms=milliseconds(count, rows, before, change), **cost)
        except Exception as error:
            emit(**row, error=repr(error)[:150])


def engine(args: argparse.Namespace, only_start: bool = False) -> None:
    """Seconds of a start, then steps, prompts and a full load through the engine's public interface."""
    from jaxserve import Engine, SamplingParams

    dry, place, began = args.dry, os.environ["JAXSERVE_HOME"], float(args.child[1])
    c = json.loads((Path(place) / "config.json").read_text())
    length, seqs, tokens, context, steps = (128, 8, 64, 64, 8) if dry else (8192, 128, 4096, 1024, 64)
    draw = partial(np.random.default_rng(0).integers, c["vocab_size"])
    llm = Engine(place, load_format="dummy", dtype="bfloat16", attention=args.attention, max_model_len=length,
                 max_num_seqs=seqs, max_num_batched_tokens=tokens)  # fmt: skip

    def event(name: str) -> None:
        counters = {n: v for n, v in llm.stats().items() if "compile" in n or n == "programs"}
        emit(event=name, seconds=time.time() - began, **counters)

    def generate(count: int, given: int, made: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=made, ignore_eos=True)
        run = partial(llm.generate, draw(size=(count, given)).tolist(), params, use_progress=False)
        return timeit.timeit(run, number=1)

    event("ready")
    generate(1, 16, 1)
    event("first token")
    event("warm" if llm.wait_until_warm(40 if only_start else 120) else "not yet warm")
    if only_start:
        return
    q, kv = (c["head_dim"] * c[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    layers, hidden, wide = (c[n] for n in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    body = layers * hidden * (2 * q + 2 * kv + 3 * wide)
    whole = body + hidden * c["vocab_size"]
    for count in (1, 4) if dry else (1, 8, 32, 64, 128):
        params = SamplingParams(temperature=0.0, max_tokens=length - context, ignore_eos=True)
        prompts = draw(size=(count, context - steps // 2)).tolist()
        end = llm.stats()["prompt_tokens"] + sum(map(len, prompts))
        ids = [llm.add_request(prompt, params) for prompt in prompts]
        while llm.stats()["prompt_tokens"] < end and llm.has_unfinished():
            llm.step()
        ms = 1e3 * float(np.median(timeit.repeat(llm.step, number=1, repeat=steps)))
        assert llm.stats()["running"] == count, "a step failed"
        llm.abort(ids)
        while llm.has_unfinished():
            llm.step()
        cost = {"GB": 2e-9 * (whole + 2 * count * context * layers * kv),
                "TFLOP": 1e-12 * count * (2 * whole + 4 * layers * q * context)}  # fmt: skip
        emit(decode=f"{count} x {context}", ms=ms, tokens_per_s=1e3 * count / ms, **cost)
    for count, rows in [(2, 100)] if dry else [(16, 512), (8, 2048), (2, 8000)]:
        ms, many = 1e3 * generate(count, rows, 1), count * rows
        cost = {"GB": 2e-9 * body, "TFLOP": 2e-12 * many * (body + layers * q * (rows + 1))}
        emit(prefill=f"{count} x {rows}", ms=ms, tokens_per_s=1e3 * many / ms, **cost)
    count, given, made = (8, 32, 16) if dry else (256, 512, 128)
    took = generate(count, given, made)
    emit(offline=f"{count} x {given} in, {made} out", seconds=took, output_tokens_per_s=count * made / took)
    event("end")
    llm.close()


SECTIONS = {"ceilings": (ceilings, 40), "check": (check, 120), "engine": (engine, 220),
            "restart": (partial(engine, only_start=True), 50), "attention": (attention, 130)}  # fmt: skip
"""What runs, and for how many seconds at most; what can be missed comes last."""

if __name__ == "__main__":
    main()
