"""Where the time of a decoding step goes: milliseconds by what it calls, of the CPU's programs as they run.

    python -m bench.step [--sequences 1 8 64] [--context 256] [--steps 20]

So many sequences decode in an engine with default settings, under a profiler. C++ kernels are named with
the shape that they make, what XLA compiles is one line, and so is the time in which nothing runs: between
what a program calls, and between programs. Medians over the steps, with the calls of a step.
"""

import argparse
import re
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from jaxserve import Engine, SamplingParams
from jaxserve.engine.batch import Bucket

CALL = re.compile(r'%(\S+) = .*?(\[[\d,]*\]).* custom-call\(.*custom_call_target="jaxserve_(\w+)_[0-9a-f]+"')


class Call(NamedTuple):
    run: int
    module: str
    op: str
    begin: float
    """Nanoseconds."""
    length: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--context", type=int, default=256, help="tokens before")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    if args.steps < 3:
        parser.error("--steps: the first and the last are not counted, so at least 3")
    with Engine(enable_prefix_caching=False, max_model_len=2 * args.context) as engine:
        engine.wait_until_warm()
        for count in args.sequences:
            show(count, *measure(engine, count, args))


def measure(engine: Engine, count: int, args: argparse.Namespace) -> tuple[list[Call], dict[str, str]]:
    """The calls of some steps in which all of `count` sequences decode, and the names of kernels in them."""
    params = SamplingParams(temperature=0.0, max_tokens=args.context, ignore_eos=True, detokenize=False)
    for i in range(count):
        engine.add_request([7 + i] * (args.context - 1), params)
    core = engine._cores[0]
    while len([each for each in core._scheduler.running if len(each.output) > 2]) < count:
        engine.step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(args.steps):
                engine.step()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        calls = sorted(found(trace), key=lambda call: call.begin)
    while engine.has_unfinished():
        engine.step()
    text = core._programs.forward(Bucket(count, count)).as_text()
    return calls, {op: f"{kernel} {shape}" for op, shape, kernel in CALL.findall(text)}


def found(trace: Path) -> Iterator[Call]:
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats and not event.name.startswith("end: "):
                    where = stats["run_id"], stats["hlo_module"], stats["hlo_op"]
                    yield Call(*where, event.start_ns, event.duration_ns)


def show(count: int, calls: list[Call], kernels: dict[str, str]) -> None:
    """A line for each part of a step, longest first. A step begins with its forward pass."""
    steps: list[list[Call]] = []
    for call in calls:
        if call.module == "jit_forward" and (not steps or call.run not in {each.run for each in steps[-1]}):
            steps.append([])
        if steps:
            steps[-1].append(call)
    parts, times = defaultdict(list), Counter()
    whole = steps[1:-1]  # that have an end, and the profiler's begin behind them
    for step, after in zip(whole, steps[2:], strict=True):
        spent: Counter[str] = Counter()
        for call in step:
            name = kernels.get(call.op, "XLA") if call.module == "jit_forward" else "sample"
            spent[name] += call.length
            times[name] += 1
        length = after[0].begin - step[0].begin
        spent["nothing"] = length - sum(spent.values())
        spent["whole step"] = length
        for name, part in spent.items():
            parts[name].append(part / 1e6)
    print(f"\n{count} sequences: {'calls':>15}{'ms':>8}")
    for name, values in sorted(parts.items(), key=lambda part: -statistics.median(part[1])):
        print(f"  {name:24}{times[name] / len(whole) or '':>8}{statistics.median(values):>8.2f}", flush=True)


if __name__ == "__main__":
    main()
