"""Formats by name, and which one a model uses."""
# ruff: noqa: RUF001 (the tags are what they are)

from collections.abc import Callable
from difflib import get_close_matches

from jaxserve.errors import ConfigError
from jaxserve.text.parsers.deepseek_v3 import deepseek_v3
from jaxserve.text.parsers.gemma import gemma
from jaxserve.text.parsers.granite import granite
from jaxserve.text.parsers.granite_reasoning import granite_reasoning
from jaxserve.text.parsers.harmony import harmony
from jaxserve.text.parsers.hermes import hermes
from jaxserve.text.parsers.llama3_json import llama3_json
from jaxserve.text.parsers.mistral import mistral
from jaxserve.text.parsers.phi4_mini_json import phi4_mini_json
from jaxserve.text.parsers.pythonic import pythonic
from jaxserve.text.parsers.qwen3_coder import qwen3_coder
from jaxserve.text.parsers.scanner import Scanner, Wait
from jaxserve.text.parsers.think import deepseek_r1, qwen3

Format = Callable[[Scanner], Wait[None]]

TOOL_PARSERS: dict[str, Format] = {
    "hermes": hermes,
    "qwen3": hermes,
    "llama3_json": llama3_json,
    "llama4_json": llama3_json,
    "mistral": mistral,
    "pythonic": pythonic,
    "llama4_pythonic": pythonic,
    "qwen3_coder": qwen3_coder,
    "qwen3_xml": qwen3_coder,
    "deepseek_v3": deepseek_v3,
    "deepseek_v31": deepseek_v3,
    "granite": granite,
    "granite4": granite,
    "phi4_mini_json": phi4_mini_json,
    "gemma": gemma,
    "functiongemma": gemma,
    "gemma4": gemma,
    "openai": harmony,
}
REASONING_PARSERS: dict[str, Format] = {
    "deepseek_r1": deepseek_r1,
    "qwen3": qwen3,
    "granite": granite_reasoning,
    "gpt_oss": harmony,
    "openai_gptoss": harmony,
}

# The first that a chat template contains decides: what a model was taught to write stands in its template.
TOOL_MARKS = {
    "<|channel|>": "openai",
    "<start_function_call>": "gemma",
    "<|tool_call>": "gemma",
    "<function=": "qwen3_coder",
    "<｜tool▁calls▁begin｜>": "deepseek_v3",
    "[TOOL_CALLS]": "mistral",
    "<|/tool|>": "phi4_mini_json",
    "<|start_of_role|>": "granite",
    "<tool_call>": "hermes",
    "<|python_start|>": "pythonic",
    "ipython": "llama3_json",
}
REASONING_MARKS = {
    "<|channel|>": "gpt_oss",
    "Here is my thought process:": "granite",
    "<｜Assistant｜><think>": "deepseek_r1",
    "<think>": "qwen3",
    "</think>": "qwen3",
}
TOOL_FAMILIES = {
    "gpt_oss": "openai",
    "gemma": "gemma",
    "llama4": "pythonic",
    "mistral": "mistral",
    "mixtral": "mistral",
    "deepseek_v3": "deepseek_v3",
    "granite": "granite",
}
REASONING_FAMILIES = {"gpt_oss": "gpt_oss", "qwen3": "qwen3"}


def register_tool_parser(name: str, format: Format) -> None:
    """`format(scanner)` reads with the scanner's primitives and writes content and calls."""
    TOOL_PARSERS[name] = format


def register_reasoning_parser(name: str, format: Format) -> None:
    """`format(scanner)` reads and writes reasoning, and returns where the rest of the output begins."""
    REASONING_PARSERS[name] = format


def tool_parser(name: str) -> Format:
    """Raises ConfigError, with the names there are and the nearest, for an unknown one."""
    return _named(TOOL_PARSERS, name, "tool parser")


def reasoning_parser(name: str) -> Format:
    """Raises ConfigError, with the names there are and the nearest, for an unknown one."""
    return _named(REASONING_PARSERS, name, "reasoning parser")


def choose_tool_parser(model_type: str, chat_template: str = "") -> str:
    """The name for a model; `hermes`, which the preamble for tools asks for, where the template has no place
    for them or nothing is known."""
    if chat_template and "tools" not in chat_template:
        return "hermes"
    return _choose(TOOL_MARKS, TOOL_FAMILIES, model_type, chat_template) or "hermes"


def choose_reasoning_parser(model_type: str, chat_template: str = "") -> str | None:
    """The name for a model; None for one that is not known to think aloud."""
    return _choose(REASONING_MARKS, REASONING_FAMILIES, model_type, chat_template)


def _choose(marks: dict[str, str], families: dict[str, str], model_type: str, template: str) -> str | None:
    by_template = (name for mark, name in marks.items() if mark in template)
    by_family = (name for family, name in families.items() if model_type.startswith(family))
    return next(by_template, None) or next(by_family, None)


def _named(formats: dict[str, Format], name: str, kind: str) -> Format:
    if name in formats:
        return formats[name]
    near = get_close_matches(name, formats, 1, 0.0)
    raise ConfigError(f"unknown {kind} {name!r}; there are: {', '.join(formats)} (nearest: {near[0]})")
