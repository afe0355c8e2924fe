"""Choose the sizes of the GPU's kernels by measuring them on the device that is here.

    python -m jaxserve.pallas_kernels.tune [--kernels gpu] [--head-size 128 256] [--out FILE] [--dry]

Starts from the sizes that are in use, changes one at a time and keeps what is faster over a few shapes of
work. The file it writes, one for each kind of device, stands beside the code (`paged_attention/tuning/`),
is found there by the device's name and ships with the package. `--dry`: tiny shapes, interpreted on a CPU,
whose times mean nothing.
"""

import argparse
import importlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import jax

from jaxserve.pallas_kernels.paged_attention import Implementation
from jaxserve.pallas_kernels.paged_attention.tuning import measured
from jaxserve.pallas_kernels.paged_attention.tuning.gpu import FILLED
from jaxserve.pallas_kernels.paged_attention.tuning.measure import Heads, Layers, Work
from jaxserve.pallas_kernels.paged_attention.tuning.measured import Key, Tuning

Sizes = dict[str, tuple[int, ...]]
TRIED: dict[str, dict[str, Sizes]] = {
    "gpu": {
        "rows": {"tile": (16, 32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (2, 3, 4)},
        "tiles": {
            "block_m": (32, 64, 128),
            "tile": (32, 64, 128),
            "num_warps": (4, 8),
            "num_stages": (2, 3, 4),
        },
    },
    "mosaic": {
        "rows": {"tile": (64, 128), "stages": (2, 3, 4, 6)},
        "tiles": {"tile": (64, 128), "stages": (2, 3, 4)},
    },
}
"""Of each kernel and kind of its work: sizes by name, each a field of its variants."""
FILLINGS = (132, 264, 528, 1056)
WORKS = {
    "rows": [Work(32, 1, 4095), Work(128, 1, 1023), Work(1, 1, 8191)],
    "tiles": [Work(1, 2048, 0), Work(1, 2048, 6144), Work(8, 256, 1024)],
    "splits": [Work(1, 1, 32767), Work(8, 1, 4095), Work(32, 1, 4095)],
}
DRY_TRIED: dict[str, Sizes] = {"rows": {"tile": (32,)}, "tiles": {"block_m": (32,)}}
DRY_WORKS = {"rows": [Work(2, 1, 40)], "tiles": [Work(1, 20, 9)], "splits": [Work(1, 1, 63)]}
KERNELS = [name for name in TRIED if name in get_args(Implementation)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jaxserve.pallas_kernels.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, help="all; with --dry gpu")
    parser.add_argument("--head-size", type=int, nargs="+", choices=(128, 256), default=[128, 256])
    parser.add_argument("--out", type=Path, help="another file")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU; needs --out")
    args = parser.parse_args(argv)
    if args.dry and not args.out:
        parser.error("--dry measures nothing that is worth shipping: give --out")
    if not args.dry and jax.default_backend() != "gpu":
        parser.error(f"no GPU: jax runs on {jax.default_backend()}; --dry needs none")
    device = jax.devices()[0].device_kind
    out = args.out or measured.FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', device.lower())}.json"
    print(Tuner(args).run({"device_kind": device, "jax": jax.__version__}, out))


class Tuner:
    """Chooses the lines of the kernels' tables, one after the other, from `start` on."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._kernels = args.kernels or (["gpu"] if args.dry else KERNELS)
        self._works = DRY_WORKS if args.dry else WORKS
        self._start = measured.current()

    def run(self, found: dict[str, Any], out: Path) -> Path:
        """The file has all that was found so far, whenever it ends."""
        found |= {"filled": self._start.filled or FILLED, "lines": []}
        out.parent.mkdir(parents=True, exist_ok=True)
        for head_dim in self._args.head_size:
            heads = Heads(2, 1, head_dim) if self._args.dry else Heads(32, 8, head_dim)
            layers = Layers(heads, *((1024, 1) if self._args.dry else (2**19, 8)), interpret=self._args.dry)
            for kernel in self._kernels:
                for line in self._lines(layers, kernel, head_dim):
                    found["lines"].append(line)
                    out.write_text(json.dumps(found, indent=1) + "\n")
            if head_dim == 128:
                found["filled"] = self._filling(layers)
                out.write_text(json.dumps(found, indent=1) + "\n")
        return out

    def _lines(self, layers: Layers, kernel: str, head_dim: int) -> Iterator[dict[str, Any]]:
        """What to write for each line of a kernel's table that is for 16-bit numbers of this head size."""
        own = importlib.import_module(f"jaxserve.pallas_kernels.paged_attention.tuning.{kernel}").TABLE
        for key, variant in measured.merged(kernel, own).items():
            if key[-1] == head_dim and key[1:-1] in ((), (2,)):
                before = self._milliseconds(layers, kernel, key[0], self._start)
                if math.inf in before:  # it cannot be had here
                    continue
                best, times = self._best(layers, kernel, key, variant._asdict(), before)
                line = {"kernel": kernel, "key": key, "variant": best, "ms": times, "ms_before": before}
                yield line | {"works": self._works[key[0]]}

    def _best(
        self, layers: Layers, kernel: str, key: Key, best: dict[str, int], times: list[float]
    ) -> tuple[dict[str, int], list[float]]:
        """One size after the other is changed, and the best so far kept."""
        for name, values in (DRY_TRIED if self._args.dry else TRIED[kernel])[key[0]].items():
            for trial in [best | {name: n} for n in values if n != best[name]]:
                tuning = Tuning({kernel: {key: trial}}, self._start.filled)
                took = self._milliseconds(layers, kernel, key[0], tuning)
                ratio = score(took) / score(times)
                print(kernel, key, trial, f"{ratio:.3f} times the time of the best so far", flush=True)
                if ratio < 1:
                    best, times = trial, took
        return best, times

    def _filling(self, layers: Layers) -> int:
        """How many programs fill the device, by what that makes of the splits of long contexts."""

        def took(filled: int) -> float:
            tuning = self._start._replace(filled=filled)
            return score(self._milliseconds(layers, self._kernels[0], "splits", tuning))

        return min(FILLINGS[1:3] if self._args.dry else FILLINGS, key=took)

    def _milliseconds(self, layers: Layers, kernel: Any, kind: str, tuning: Tuning) -> list[float]:
        """Of a layer, for each shape; infinite where the kernel cannot be had."""
        return list(milliseconds(layers, kernel, self._works[kind], tuning))


def milliseconds(layers: Layers, kernel: Any, works: Iterable[Work], tuning: Tuning) -> Iterator[float]:
    for work in works:
        try:
            with measured.instead(tuning):
                program = layers.compile(work, kernel)
            yield layers.milliseconds(work, program)
        except Exception as error:  # too much shared memory, too many registers: of many kinds
            print(f"{kernel} {work}: {type(error).__name__}: {str(error)[:100]}", flush=True)
            yield math.inf


def score(times: list[float]) -> float:
    """Each shape counts alike."""
    return math.prod(times) ** (1 / len(times))


if __name__ == "__main__":
    main()
