"""Reading an output: reasoning, content and tool calls instead of plain text, where a model writes them."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import replace

from jaxserve.engine.messages import Thoughts
from jaxserve.errors import ConfigError, InvalidRequest
from jaxserve.sampling_params import SamplingParams
from jaxserve.text import call_grammar
from jaxserve.text.parsers import (
    Event,
    OutputParser,
    choose_reasoning_parser,
    choose_tool_parser,
    merged,
    reasoning_parser,
    tool_parser,
)
from jaxserve.text.parsers.registry import Format
from jaxserve.text.parsers.think import CLOSE, OPEN, deepseek_r1, qwen3, thinks
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools import ToolUse

PROMPT_END = 256
"""Characters of the prompt that tell a parser how the template began the answer."""
PROMPT_TOKENS = 8
"""Its last tokens, for the same."""


def load_plugin(path: Path) -> None:
    """Run a file that registers formats. Raises ConfigError."""
    spec = spec_from_file_location("jaxserve_tool_parser_plugin", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"tool_parser_plugin must be a .py file, not {path}")
    try:
        spec.loader.exec_module(module_from_spec(spec))
    except Exception as error:  # whatever it runs into
        raise ConfigError(f"tool_parser_plugin {path} failed: {type(error).__name__}: {error}") from error


class Tags(NamedTuple):
    """The tokens around a model's thoughts."""

    open: int
    close: int
    always: bool
    """It thinks, whether it says so or not."""

    def held(
        self, tokenizer: Tokenizer, prompt: Sequence[int], budget: int, continued: str | None = None
    ) -> Thoughts | None:
        """What the output after a prompt is held to; None where thinking is turned off, or ended in the
        message that it goes on with."""
        if continued is not None:
            return Thoughts(budget, self.close, None) if thinks("", continued) else None
        end = (token for token in reversed(prompt[-PROMPT_TOKENS:]) if tokenizer.token_text(token).strip())
        last = next(end, None)
        if last == self.close:
            return None
        return Thoughts(budget, self.close, None if self.always or last == self.open else self.open)


class MakeParser(NamedTuple):
    """Makes a parser for each output of a request; the fields are `OutputParser`'s."""

    tools: Format | None
    reasoning: Format | None
    functions: Sequence[Mapping[str, Any]]
    prompt: str
    special_tokens: Collection[str]
    parallel: bool
    continued: str | None

    def __call__(self) -> OutputParser:
        return OutputParser(*self)


class Formats(NamedTuple):
    """How a model writes."""

    tools: Format | None
    reasoning: Format | None
    chosen: tuple[str, str, str] = ("auto", "auto", "")
    """By which names, and the type of the model."""

    @classmethod
    def choose(cls, tools: str, reasoning: str, model_type: str, template: str | None) -> "Formats":
        """By the names of parsers, of which `auto` and `none` are two. Raises ConfigError."""
        chosen = tools, reasoning, model_type
        if tools == "auto":
            tools = choose_tool_parser(model_type, template or "")
        if reasoning == "auto":
            reasoning = choose_reasoning_parser(model_type, template or "") or "none"
        return cls(
            None if tools == "none" else tool_parser(tools),
            None if reasoning == "none" else reasoning_parser(reasoning),
            chosen,
        )

    def of(self, template: str | None) -> "Formats":
        """With a request's own template."""
        return self if template is None else self.choose(*self.chosen, template)

    def tags(self, tokenizer: Tokenizer | None) -> Tags | None:
        """None for a model that does not think, or spells its tags."""
        if tokenizer is None or self.reasoning not in (deepseek_r1, qwen3):
            return None
        open, close = map(tokenizer.backend.token_to_id, (OPEN, CLOSE))
        return None if open is None or close is None else Tags(open, close, self.reasoning is deepseek_r1)

    def reading(
        self,
        tokenizer: Tokenizer,
        use: ToolUse,
        prompt: str,
        params: SamplingParams,
        continued: str | None = None,
    ) -> tuple[MakeParser | None, SamplingParams]:
        """What makes the parser of each output, None where an output is nothing but text; and the parameters
        with which outputs keep to what the tools ask. `continued`: the text of the message that the output
        goes on with, None where it begins one. Raises InvalidRequest."""
        tools = self.tools if use.offered else None
        if use.offered and tools is None:
            told = "tools need an engine with a --tool-call-parser"
            raise InvalidRequest(told, "tools", "unsupported_field")
        if tools is not None and not params.detokenize:
            raise InvalidRequest("tools need detokenize: true", "detokenize")
        end, wanted = prompt[-PROMPT_END:], params.structured_outputs
        constraint = call_grammar.constraint(tools, self.reasoning, use, end, wanted, continued)
        if constraint is not wanted:
            params = replace(params, structured_outputs=constraint)
        if tools is not None:
            tools = call_grammar.read_by(tools, use)
        if tools is None and self.reasoning is None:
            return None, params
        special = tokenizer.special_tokens
        return MakeParser(tools, self.reasoning, use.offered, end, special, use.many, continued), params


class Reader:
    """One output on its way through its parser, behind the stop strings."""

    def __init__(self, parser: OutputParser, tokenizer: Tokenizer):
        ids = tokenizer.special_tokens
        self.tags = {ids[tag]: tag for tag in parser.tags if tag in ids}
        """Special tokens that the parser must see, by their ids."""
        self._reasoning_tokens = 0
        self._parser = parser
        self._events: list[Event] = []
        self._came = 0
        self._shown = 0
        self._specials: list[int] = []
        """Where tags that are special tokens begin, in the characters that came and are not shown yet."""
        self._tokens: deque[int] = deque()
        """Where tokens begin of which it is not known yet what they are."""

    def came(self, token: int, piece: str) -> None:
        """A token's text, from which the stop strings may hold something back."""
        if token in self.tags and (at := piece.rfind(self.tags[token])) >= 0:
            self._specials.append(self._came + at)
        self._tokens.append(self._came)
        self._came += len(piece)

    def show(self, text: str) -> None:
        end = self._shown + len(text)
        specials = [at - self._shown for at in self._specials if at < end]
        self._specials = self._specials[len(specials) :]
        self._shown = end
        self._events += self._parser.feed(text, specials)
        self._count()

    def finish(self, cut: bool) -> None:
        """`cut`: the model would have gone on."""
        self._events += self._parser.finish(cut)
        self._count()

    def take(self, clear: bool) -> tuple[list[Event], int]:
        """All events so far and the tokens of reasoning; with `clear` what is new since the last call."""
        events, tokens = merged(self._events), self._reasoning_tokens
        self._events = [] if clear else list(events)
        self._reasoning_tokens = 0 if clear else tokens
        return events, tokens

    def _count(self) -> None:
        for end, reasoning in self._parser.take_spans():
            while self._tokens and self._tokens[0] < end:
                self._tokens.popleft()
                self._reasoning_tokens += reasoning
