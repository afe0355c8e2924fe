"""What tests read from programs: StableHLO as it is lowered, and HLO as it is compiled."""

import math
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

COLLECTIVE = re.compile(
    r" = (\S+|\(.*?\)) "
    r"(all-reduce|all-gather|(?:ragged-)?all-to-all|reduce-scatter|collective-\w+?)(-start)?\("
)
ARRAY = re.compile(r"\w+\[([\d,]*)\]")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(")


def collectives(hlo: str) -> list[tuple[str, list[int]]]:
    """(operation, shape) of all that travels between devices, each array of a combined operation."""
    found = []
    for result, operation, start in COLLECTIVE.findall(hlo):
        arrays = ARRAY.findall(result)
        half = len(arrays) // 2
        if start and (operation != "all-reduce" or arrays[:half] == arrays[half:]):
            arrays = arrays[half:]  # beside what it was given
        found += [(operation, _sizes(shape)) for shape in arrays]
    return found


class Instruction(NamedTuple):
    """One that a compiled program runs."""

    name: str
    operation: str
    result: str
    """Its type, with layout."""
    line: str

    @property
    def elements(self) -> list[int]:
        """Of each array of its result."""
        return [math.prod(_sizes(shape)) for shape in ARRAY.findall(self.result)]


def instructions(hlo: str) -> Iterator[Instruction]:
    """Of all computations but those inside a fusion, a reduction or the like."""
    lines = hlo.splitlines()
    inner = {
        name
        for line in lines
        if " call(" not in line
        for name in re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", line)
    }
    runs = False
    for line in lines:
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            runs = header.group(1) not in inner
        elif runs and (found := INSTRUCTION.match(line)):
            name, result, operation = found.groups()
            yield Instruction(name, operation, result, line)


def _sizes(shape: str) -> list[int]:
    return [int(size) for size in shape.split(",") if size]


def count(stablehlo: str, pattern: str) -> int:
    """Matches in a module as it runs: those in a function count as often as it is called."""
    bodies = {}
    for function in re.split(r"\n  func\.func ", stablehlo)[1:]:
        name = re.match(r"(?:public |private )?@([\w.$-]+)", function).group(1)
        bodies[name] = function

    @cache
    def runs(name: str) -> int:
        called = re.findall(r"\bcall @([\w.$-]+)", bodies[name])
        return len(re.findall(pattern, bodies[name])) + sum(runs(other) for other in called)

    return runs("main")


def aliases(stablehlo: str, array: str) -> list[int | None]:
    """Of each argument of this type (`2x3xbf16`), the result that is written in its place."""
    signature = re.search(r"func\.func public @main\((.*)\) -> ", stablehlo).group(1)
    arguments = re.split(r"%arg\d+: ", signature)[1:]
    found = (
        re.search(r"tf\.aliasing_output = (\d+)", argument)
        for argument in arguments
        if argument.startswith(f"tensor<{array}>")
    )
    return [int(alias.group(1)) if alias else None for alias in found]
