"""`python -m jaxserve.engine.simulate`: what traffic would do to an engine, with the real scheduler.

Every promise of the scheduler is checked on the way. A broken one ends the run with the fewest requests that
break it and the command that replays them.
"""

import json
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence

from jaxserve.cli.flags import Parser, add_option
from jaxserve.config import EngineConfig
from jaxserve.engine.scheduler import Limits, policy_of
from jaxserve.engine.simulation.cost import DEVICES, Cost
from jaxserve.engine.simulation.fuzz import Numbered, broken, scenario, shrink
from jaxserve.engine.simulation.invariants import Violation
from jaxserve.engine.simulation.report import lines, summary
from jaxserve.engine.simulation.run import Setup, Simulation
from jaxserve.engine.simulation.traffic import Traffic, read_trace
from jaxserve.errors import ConfigError
from jaxserve.options import build, describe

COMMAND = "python -m jaxserve.engine.simulate"
ENGINE = (
    *("max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks", "enable_prefix_caching"),
    *("scheduling_policy", "priority_aging", "fair_share", "max_prompt_share", "max_num_queued_reqs"),
)
"""Options of the engine that mean something without a device; those of size are the device's unless given."""


def main(argv: Sequence[str] | None = None) -> int:
    """0: every promise was kept; 1: one was broken."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if args.audit_every < 1:
            raise ConfigError(f"audit_every must be at least 1, not {args.audit_every}")
        return _fuzz(args) if args.fuzz is not None else _simulate(args, argv)
    except ConfigError as error:
        parser.error(str(error))


def _simulate(args: Namespace, argv: Sequence[str]) -> int:
    setup = _setup(args)
    traffic = build(Traffic, _given(args, describe(Traffic)))
    arrivals = read_trace(args.trace) if args.trace else list(traffic.draw())
    requests = _chosen(list(enumerate(arrivals)), args.requests)
    requests.sort(key=lambda request: request[1].arrival)
    simulation = Simulation(setup, requests, args.audit_every)
    began = time.perf_counter()
    try:
        simulation.run()
    except Violation as violation:
        return _explain(setup, requests, violation, args.audit_every, _without(argv, "--requests"))
    result = summary(simulation, setup)
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"{len(requests):,} requests, simulated in {time.perf_counter() - began:.1f} s")
    print("\n".join(lines(result)))
    return 0


def _fuzz(args: Namespace) -> int:
    """Small random engines, each drawn from a seed of its own."""
    first = getattr(args, "seed", 0)
    for seed in range(first, first + args.fuzz):
        setup, requests = scenario(seed)
        requests = _chosen(requests, args.requests)
        if violation := broken(setup, requests):
            return _explain(setup, requests, violation, 1, ["--fuzz", "1", "--seed", str(seed)])
    print(f"{args.fuzz:,} random engines kept every promise")
    return 0


def _explain(
    setup: Setup, requests: list[Numbered], violation: Violation, audit_every: int, flags: Sequence[str]
) -> int:
    failure = shrink(setup, requests, violation, audit_every)
    numbers = ",".join(map(str, failure.requests))
    print(f"violated: {failure.violation}")
    print(f"with {len(failure.requests)} of {len(requests)} requests. This replays it:")
    print(f"  {COMMAND} {shlex.join(flags)}{' ' if flags else ''}--requests {numbers}")
    return 1


def _setup(args: Namespace) -> Setup:
    device = DEVICES[args.device]
    config = build(EngineConfig, _given(args, ENGINE))
    seqs = config.max_num_seqs or device.max_num_seqs
    tokens = max(config.max_num_batched_tokens or device.max_num_batched_tokens, seqs)
    given = {name: ms / 1000 for name in Cost._fields if (ms := getattr(args, f"cost_{name}")) is not None}
    if any(not 0 <= seconds < float("inf") for seconds in given.values()):
        raise ConfigError("the cost of a step must be a time from 0 on")
    return Setup(
        config.num_blocks or device.num_blocks,
        config.block_size or device.block_size,
        Limits(seqs, tokens),
        policy_of(config),
        device.cost._replace(**given),
        config.enable_prefix_caching,
    )


def _given(args: Namespace, names: Iterable[str]) -> dict[str, object]:
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _chosen(requests: list[Numbered], text: str | None) -> list[Numbered]:
    if text is None:
        return requests
    try:
        numbers = {int(number) for number in text.split(",")}
        return [requests[number] for number in sorted(numbers)]
    except (ValueError, IndexError):
        raise ConfigError(f"requests must be numbers below {len(requests)}, as 0,17; not {text!r}") from None


def _without(argv: Sequence[str], flag: str) -> list[str]:
    """The command line without a flag and its value."""
    kept, skip = [], False
    for arg in argv:
        if not skip and not arg.startswith(f"{flag}=") and arg != flag:
            kept.append(arg)
        skip = arg == flag and not skip
    return kept


def _parser() -> Parser:
    parser = Parser(prog=COMMAND, description=__doc__)
    parser.add_argument("--device", choices=DEVICES, default="cpu", help=_about_devices())
    parser.add_argument(
        "--trace", metavar="FILE", help="a JSON object per line: requests instead of drawn ones"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--fuzz", type=int, metavar="N", help="try N small random engines instead, from --seed on"
    )
    parser.add_argument("--requests", metavar="N,N", help="only these of the requests, by number")
    parser.add_argument(
        "--audit-every", type=int, metavar="N", default=1000, help="steps between two checks of every block"
    )
    engine = parser.add_argument_group("engine")
    for name in ENGINE:
        add_option(engine, describe(EngineConfig)[name])
    cost = parser.add_argument_group("cost of a step, in milliseconds; the device's unless given")
    for name, what in zip(Cost._fields, _COSTS, strict=True):
        cost.add_argument(f"--cost-{name}", type=float, metavar="MS", help=what)
    traffic = parser.add_argument_group("traffic")
    for option in describe(Traffic).values():
        add_option(traffic, option)
    return parser


_COSTS = (
    "of every step",
    "of a sequence that decodes",
    "of a token of a prompt",
    "of a token of context that a decode attends to",
    "of a token of context that a token of a prompt attends to",
)


def _about_devices() -> str:
    return "; ".join(f"{name}: {device.about}" for name, device in DEVICES.items())


if __name__ == "__main__":
    sys.exit(main())
