"""Where grammars are tried before the engine compiles them: one may take for ever, or all memory.

Reads frames (4 bytes of length, then msgpack): first `[tokens, eos_ids]`, then `[id, grammar]` for each.
Every grammar is tried in a child of its own under limits, so that none waits for another; its `[id, error,
place, bytes]` is written when it is known. Ends with its input.
"""

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import IO, Any

import msgspec

from jaxserve.engine.grammar import limits
from jaxserve.engine.grammar.schema import LEAD, embedded, subschemas
from jaxserve.engine.grammar.vocabulary import Vocabulary

PROBED = 3
"""Tokens for which it is tried: some grammars allow nothing, or are too complex only once they run."""
SHARED = ("$defs", "definitions", "$schema", "$id", "x-guidance")
"""What a subschema needs of its root."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    frames = read_frames(sys.stdin.buffer)
    vocabulary = Vocabulary(*next(frames)).backend
    os.nice(5)
    for name, text in frames:
        if os.fork() == 0:
            try:
                supervise(vocabulary, name, text)
            finally:
                os._exit(0)


def supervise(vocabulary: Any, name: int, text: str) -> None:
    """Writes what a limited child finds, or that it did not live."""
    told, tell = os.pipe()
    if os.fork() == 0:
        os.close(told)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the library's last words
        before = resident()
        limit(resource.RLIMIT_CPU, limits.CPU_SECONDS)
        limit(resource.RLIMIT_AS, mapped() + limits.MEMORY)
        error = fault(vocabulary, text)
        os.write(tell, msgspec.json.encode([error, None, resident() - before]) + b"\n")
        if error is not None:
            error, place = located(vocabulary, text) or (error, None)
            if place is not None and len(place.encode()) > limits.PLACE_BYTES:
                place = None
            os.write(tell, msgspec.json.encode([error, place, 0]) + b"\n")
        os._exit(0)
    os.close(tell)
    with os.fdopen(told, "rb") as file:
        lines = file.read().splitlines()
    seconds, memory = limits.CPU_SECONDS, limits.MEMORY // 2**20
    found = [f"takes more than {seconds} s or {memory} MiB to compile", None, 0]
    if lines:
        found = msgspec.json.decode(lines[-1])
    # in one write, which for so few bytes is never mixed with another's
    os.write(sys.stdout.fileno(), frame([name, *found]))


def limit(what: int, value: int) -> None:
    resource.setrlimit(what, (value, value))


def fault(vocabulary: Any, text: str) -> str | None:
    """Why a grammar cannot be used; None if it can."""
    matcher = limits.matcher(vocabulary, text)
    if matcher.is_error():
        return reason(matcher.get_error())
    ends = sum(1 << end for end in vocabulary.eos_tokens)
    for _ in range(PROBED):
        mask = int.from_bytes(matcher.compute_bitmask(), "little") & ~ends
        if mask:
            matcher.try_consume_tokens([(mask & -mask).bit_length() - 1])  # the lowest: often a single byte
    error = matcher.get_error()
    return "no output can match it" if error.startswith("NoExtension") else reason(error) or None


def reason(error: str) -> str:
    """The library's own, without what it says of its state, and of a pattern that is not as it was given;
    cut where that is long."""
    if LEAD in error:
        error = re.sub(r"regex parse error:\n.*\nerror:", "regex parse error:", error, flags=re.DOTALL)
    return error.partition("\n<state>")[0].encode()[: limits.ANSWER_BYTES].decode(errors="ignore")


def located(vocabulary: Any, text: str) -> tuple[str, str] | None:
    """Why the first schema in a grammar fails that does so by itself, and where: its field, and the JSON
    pointer of the smallest subschema that fails for the same reason."""
    for place, root in schemas(text):
        error = fault(vocabulary, alone(root))
        if error is not None:
            return error, f"{place}#{smallest(vocabulary, root, error)}"
    return None


def smallest(vocabulary: Any, root: Mapping[str, Any], error: str) -> str:
    shared = {key: root[key] for key in SHARED if key in root}

    def fails(schema: Any) -> bool:
        if not isinstance(schema, Mapping):
            return False
        return reason(limits.matcher(vocabulary, alone({**shared, **schema})).get_error()) == error

    at, here = "", root
    while True:
        for pointer, sub in subschemas(here):
            if fails(sub):
                at, here = at + pointer, sub
                break
        else:
            return at


def schemas(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those in a grammar, each with its field."""
    for grammar in json.loads(text)["grammars"]:
        if "json_schema" in grammar:
            found = [grammar["json_schema"]]
        else:
            found = [schema for _, _, schema in embedded(grammar["lark_grammar"])]
        yield from zip(grammar.get("places", ()), found, strict=False)


def alone(schema: Mapping[str, Any]) -> str:
    return json.dumps({"grammars": [{"json_schema": schema}]})


def mapped() -> int:
    return statm(0)


def resident() -> int:
    return statm(1)


def statm(field: int) -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[field]) * resource.getpagesize()


def frame(value: Any) -> bytes:
    data = msgspec.msgpack.encode(value)
    return len(data).to_bytes(4, "little") + data


def read_frames(file: IO[bytes]) -> Iterator[Any]:
    while len(head := file.read(4)) == 4:
        yield msgspec.msgpack.decode(file.read(int.from_bytes(head, "little")))


if __name__ == "__main__":
    main()
