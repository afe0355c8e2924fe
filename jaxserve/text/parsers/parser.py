"""One output of a model, on its way from text to reasoning, content and tool calls."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from jaxserve.text.parsers.events import Event, Message, collect
from jaxserve.text.parsers.registry import Format
from jaxserve.text.parsers.scanner import Scanner, Wait


class OutputParser:
    """Reasoning first, then content and calls; a format that reads both (harmony) does it in one go.

    What the events add up to does not depend on how the text is cut into pieces. Nothing raises, and no
    text is lost: what is no call is content, but for what the end of a text that is cut off leaves open.
    """

    def __init__(
        self,
        tools: Format | None = None,
        reasoning: Format | None = None,
        functions: Sequence[Mapping[str, Any]] = (),
        prompt: str = "",
        special_tokens: Collection[str] = frozenset(),
        parallel: bool = True,
        continued: str | None = None,
    ):
        """`functions`: the request's `tools`; `prompt`: the rendered prompt, or its end; `special_tokens`:
        the texts of the tokenizer's; `parallel`: whether there may be more than one call; `continued`: the
        text of the message that the output goes on with, None where it begins one."""
        self.tags = frozenset().union(*(getattr(format, "tags", ()) for format in (tools, reasoning)))
        self._parallel = parallel
        self._scanner = Scanner(functions, prompt, self.tags.intersection(special_tokens), continued)
        self._run = self._read(tools, reasoning)
        next(self._run)

    def feed(self, text: str, specials: Iterable[int] | None = None) -> list[Event]:
        """What `text` adds; special tokens that are one of `tags` must be in it.

        `specials`: where in it special tokens begin. Where that is known, a tag that is a special token
        counts only there, and not when the model spells it out.
        """
        self._scanner.add(text, specials)
        next(self._run)
        return self._take()

    def finish(self, cut: bool = False) -> list[Event]:
        """The rest, once no more text comes; `cut`: though the model would have gone on."""
        self._scanner.close(cut)
        next(self._run, None)
        return self._take()

    def take_spans(self) -> list[tuple[int, bool]]:
        """Where in the whole text the spans end that were read since the last call, and whether each is
        reasoning."""
        spans, self._scanner.spans = self._scanner.spans, []
        return spans

    def _take(self) -> list[Event]:
        events = self._scanner.take()
        return events if self._parallel else [event for event in events if not getattr(event, "index", 0)]

    def _read(self, tools: Format | None, reasoning: Format | None) -> Wait[None]:
        yield
        for format in dict.fromkeys((reasoning, tools)):
            if format is not None:
                yield from format(self._scanner)
        yield from self._scanner.until((), self._scanner.content)


def parse(
    text: str,
    tools: Format | None = None,
    reasoning: Format | None = None,
    functions: Sequence[Mapping[str, Any]] = (),
    prompt: str = "",
) -> Message:
    """The message that a whole output is."""
    parser = OutputParser(tools, reasoning, functions, prompt)
    return collect(parser.feed(text) + parser.finish())
