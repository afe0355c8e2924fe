"""`jaxserve plan`: what a model takes on a device, and what then fits."""

import argparse
import os
from typing import TYPE_CHECKING

from jaxserve.cli.flags import Parser, add_options, read_options
from jaxserve.config import EngineConfig

if TYPE_CHECKING:
    from jaxserve.engine.plan import Plan

AUTOTUNING = "kept free for trying out products; what the compiler then chooses is not in this plan"


def parser() -> Parser:
    parser = Parser(
        prog="jaxserve plan",
        usage="jaxserve plan [MODEL] [OPTIONS]",
        description="Say what an engine takes and what it then holds, before anything is loaded. Exit code\n"
        "1: it does not fit. MODEL may be a config.json alone; without it: the built-in default model.",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="plan for h200, h100, l4, v5e, … which need not be here"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, sizes in bytes")
    add_options(parser, EngineConfig)
    return parser


def run(args: argparse.Namespace) -> int:
    config = read_options(args, EngineConfig)
    if args.device is not None:
        # this machine's devices have no part in it, and compilers for others warn of what they do not find
        os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    import msgspec

    from jaxserve.engine.plan import make_plan

    plan = make_plan(config, args.device)
    print(msgspec.json.format(msgspec.json.encode(plan), indent=2).decode() if args.json else show(plan))
    return 0


def show(plan: "Plan") -> str:
    """The plan for a person."""
    kv = "" if plan.kv_cache_dtype == plan.dtype else f", KV cache {plan.kv_cache_dtype}"
    return "\n".join(
        [
            f"{plan.model} on {plan.device}, mesh {plan.mesh}, {plan.dtype}{kv}",
            "",
            *_sizes(plan),
            "",
            *_sequences(plan),
            "",
            *_programs(plan),
        ]
    )


def _sizes(plan: "Plan") -> list[str]:
    from jaxserve.engine.devices import gib

    blocks = f"{plan.num_blocks} blocks of {plan.block_size} tokens, {gib(plan.block_bytes)} each"
    in_all = f"{gib(plan.weights_in_all)} on all devices" if plan.weights_in_all > plan.weights else ""
    temporaries = f"kept free: {plan.temporaries_from}"
    if plan.temporaries < plan.reserved:
        temporaries = f"kept free; {gib(plan.temporaries)} says {plan.temporaries_from}"
    rows = [
        ("memory", plan.memory, plan.memory_from),
        ("in use", plan.memory_used, "by others"),
        ("weights", plan.weights, in_all),
        ("KV pool", plan.pool, f"{blocks}: {plan.pool_tokens:,} tokens"),
        ("state", plan.state, "block tables and sampling parameters"),
        ("temporaries", plan.reserved, temporaries),
        ("autotuning", plan.autotuning, AUTOTUNING),
        ("runtime", plan.runtime, "compiled programs, and the process where its memory is the device's"),
        ("left", plan.left, ""),
        ("host memory", plan.host, "of the process at its peak, the files of weights included"),
    ]
    kept = [(name, gib(size), about) for name, size, about in rows if size or name in ("left", "KV pool")]
    return [f"  {name:12} {size:>10}  {about}".rstrip() for name, size, about in kept]


def _sequences(plan: "Plan") -> list[str]:
    lines = ["  tokens in a sequence   fit the pool   run at once"]
    for length in plan.sequences:
        why = ""
        if length.tokens > plan.max_model_len:
            why = f"longer than max_model_len={plan.max_model_len}"
        elif length.at_once < length.in_pool:
            why = f"max_num_seqs={plan.max_num_seqs}"
        lines.append(f"  {length.tokens:20,} {length.in_pool:14,} {length.at_once:13,}  {why}".rstrip())
    if plan.max_request_tokens < plan.max_model_len:
        lines.append(
            f"  max_model_len is {plan.max_model_len}, but the pool holds {plan.max_request_tokens} tokens: "
            "longer requests are refused"
        )
    return lines


def _programs(plan: "Plan") -> list[str]:
    kinds: dict[str, list[str]] = {}
    for name in plan.programs:
        kind, _, rest = name.partition("[")
        kinds.setdefault(kind, []).append(rest.partition("]")[0])
    lines = [f"  {kind:8} {' '.join(dict.fromkeys(sizes))}".rstrip() for kind, sizes in kinds.items()]
    return [f"  {len(plan.programs)} programs, by tokens or rows; sample: greedy, random and full", *lines]
