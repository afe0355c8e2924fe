"""What a device does during some steps, from the profiler."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

SHOWN = 20


def steps(step: Callable[[], object], count: int) -> dict[str, Any]:
    """Part of the time in which nothing ran, and the kernels that took most of it, in ms of a step."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # whose cost would be seen as idle time
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(count):
                step()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        events = sorted(found(trace))
    if not events:
        raise ValueError("the profiler saw nothing on the device")
    busy, until, spent = 0.0, events[0][0], Counter()
    for begin, length, name in events:
        busy += max(0.0, begin + length - max(begin, until))
        until = max(until, begin + length)
        spent[name] += length
    kernels = {name: 1e-6 * length / count for name, length in spent.most_common(SHOWN)}
    whole = until - events[0][0]
    return {"idle": 1 - busy / whole, "kernels_per_step": len(events) / count, "ms_of_kernels": kernels}


def found(trace: Path) -> Iterator[tuple[float, float, str]]:
    """Begin and length in ns, and name, of all that ran on a GPU, or on a CPU what is of a program."""
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        gpu = plane.name.startswith("/device:GPU")
        for line in plane.lines:
            if gpu and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                if gpu or ("hlo_op" in dict(event.stats) and not event.name.startswith("end: ")):
                    yield event.start_ns, event.duration_ns, event.name
