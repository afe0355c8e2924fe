"""Feeds outputs to parsers, whole and in pieces."""

from collections.abc import Sequence

from jaxserve.text.parsers import Message, OutputParser, collect, reasoning_parser, tool_parser

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
F = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
G = {"type": "function", "function": {"name": "g"}}
TOOLS = [WEATHER, F, G]
Plain = tuple[str, str, list[tuple[str, str]]]


class Feed:
    """One way to read outputs; `prompt` is the end of the prompt."""

    def __init__(
        self,
        tools: str = "",
        reasoning: str = "",
        functions: Sequence[dict] = TOOLS,
        prompt: str = "",
        continued: str | None = None,
    ):
        self.tools = tool_parser(tools) if tools else None
        self.reasoning = reasoning_parser(reasoning) if reasoning else None
        self.functions = functions
        self.prompt = prompt
        self.continued = continued

    def parser(self) -> OutputParser:
        return OutputParser(self.tools, self.reasoning, self.functions, self.prompt, continued=self.continued)

    def __call__(self, *pieces: str) -> Plain:
        """Reasoning, content, and calls without their ids, which are random."""
        parser = self.parser()
        events = [event for piece in pieces for event in parser.feed(piece)]
        return plain(collect(events + parser.finish()))

    def check(self, text: str, expected: Plain, thrice: bool = True) -> None:
        """`text` gives `expected` whole, in all two (and three) pieces, and character by character."""
        assert self(text) == expected
        assert self(*text) == expected
        cuts = range(len(text) + 1)
        for i in cuts:
            assert self(text[:i], text[i:]) == expected, (text[:i], text[i:])
            for j in cuts[i + 1 : -1] if thrice else ():
                pieces = text[:i], text[i:j], text[j:]
                assert self(*pieces) == expected, pieces


def plain(message: Message) -> Plain:
    return message.reasoning, message.content, [(call.name, call.arguments) for call in message.tool_calls]
