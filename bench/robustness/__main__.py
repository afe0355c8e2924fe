"""Bad input and bad luck against the real server, over real sockets.

    python -m bench.robustness [fuzz disconnect kill drain overload flood] [--model MODEL] [-- SERVE OPTIONS]

Starts `jaxserve serve` once for each scenario (all by default), with a tiny random Llama unless a model is
named, and prints what was seen. The exit status is the number of scenarios in which something was wrong.
`fuzz --seed S --only N` sends one bad request of an earlier run again.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from bench.robustness import scenarios
from bench.robustness.scenarios import Findings
from bench.robustness.server import Server, Target

SLOTS = 8
QUEUE = 64


def main() -> int:
    names = ("fuzz", "disconnect", "kill", "drain", "overload", "flood")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenarios", nargs="*", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--model", help="instead of a tiny random one")
    parser.add_argument("--requests", type=int, default=10_000, help="bad ones of fuzz")
    parser.add_argument("--clients", type=int, default=1000, help="that disconnect")
    parser.add_argument("--streams", type=int, default=50, help="that run in kill and drain")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload and flood")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this bad request alone")
    ours, serve = _split(sys.argv[1:])
    args = parser.parse_args(ours)
    if unknown := set(args.scenarios) - set(names):
        parser.error(f"no scenario {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as place:
        model = args.model or tiny_model(Path(place))
        options = [model, "--max-model-len", "512", "--dtype", "float32", *serve]
        bench = Bench(args, options, Path(place) / "log")
        return sum(asyncio.run(bench.run(name)) for name in args.scenarios or names)


class Bench:
    def __init__(self, args: argparse.Namespace, options: list[str], log: Path):
        self._args = args
        self._options = options
        self._log = log

    async def run(self, name: str) -> bool:
        """Start a server, do the scenario to it and stop it; whether something was wrong."""
        args = self._args
        few = ["--max-num-seqs", str(SLOTS)]
        # how long 50 streams take is the machine's affair
        many = ["--max-num-seqs", str(args.streams), "--shutdown-timeout", "600"]
        table: dict[str, tuple[list[str], Callable[[Target], Awaitable[Findings]]]] = {
            "fuzz": (few, lambda t: scenarios.fuzz(t, args.requests, args.seed, args.only)),
            "disconnect": (few, lambda t: scenarios.disconnect(t, args.clients, args.seed)),
            "kill": (few, lambda t: scenarios.kill(t, args.streams)),
            "drain": (many, lambda t: scenarios.drain(t, args.streams)),
            "overload": (few, lambda t: scenarios.overload(t, SLOTS, args.seconds)),
            "flood": (
                [*few, "--max-num-queued-reqs", str(QUEUE)],
                lambda t: scenarios.flood(t, SLOTS, args.seconds),
            ),
        }
        options, scenario = table[name]
        server = Server([*self._options, *options], self._log)
        try:
            await server.warm()
            if name == "kill":
                server.stop()
                server = Server([*self._options, *options], self._log)  # a warm start, to compare with
            begin = time.monotonic()
            figures, wrong = await scenario(server.target)
            seconds = time.monotonic() - begin
            status = server.wait(600) if name == "drain" else server.stop()
        finally:
            server.process.kill()
        if status != 0:
            wrong.append(f"the exit status was {status}")
        if name == "kill":
            figures["seconds of a warm start"] = server.seconds_to_ready
            if figures["seconds to ready"] > server.seconds_to_ready + 5:
                wrong.append("not ready again within a warm start and 5 s")
        elif (log := self._log.read_text()).count("Traceback"):
            wrong.insert(0, "in the server's log:\n" + log[log.index("Traceback") :][:3000])
        print(f"{name}: {'wrong' if wrong else 'held'} ({seconds:.0f} s)")
        print(json.dumps(figures, indent=2, default=str))
        print(*wrong[:20], sep="\n")
        return bool(wrong)


def tiny_model(place: Path) -> str:
    """A random Llama with a byte tokenizer, as the tests use it."""
    from tests.conftest import write_byte_tokenizer, write_llama

    path = place / "tiny"
    path.mkdir()
    write_llama(path, 0, {"eos_token_id": 0})
    write_byte_tokenizer(path)
    return str(path)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and those after `--` for `jaxserve serve`."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
