"""Reads a model's output piece by piece; the result does not depend on how it is cut into pieces.

A format is a generator that reads from a `Scanner` as if the text were all there: where more text is needed
to decide, the primitives yield, and go on when it has come. What they decide depends on the text alone.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from jaxserve.text.parsers.events import Arguments, CallBegin, Content, Event, Reasoning

T = TypeVar("T")
Wait = Generator[None, None, T]
Format = TypeVar("Format", bound=Callable[..., Wait[None]])
Out = Callable[[str], Any]
QUOTED = re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL)
SPACES = re.compile(r"\s*")


def tags(*tags: str) -> Callable[[Format], Format]:
    """Names the tags of a format: where they are special tokens, they must be in the text all the same."""

    def named(format: Format) -> Format:
        format.tags = frozenset(tags)
        return format

    return named


def opened_last(text: str, opening: tuple[str, ...], closing: tuple[str, ...]) -> bool:
    """Whether the last of these tags in `text` is an opening one."""
    return max(map(text.rfind, opening)) > max(map(text.rfind, closing))


class Scanner:
    """The text still to be read, and the events made of what was read."""

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] = (),
        prompt: str = "",
        special_tokens: Collection[str] = frozenset(),
        continued: str | None = None,
    ):
        """`tools` as in a chat request; `prompt`: its end, where a template may have begun the answer;
        `special_tokens`: the tags that are one for this tokenizer; `continued`: the message that the output
        goes on with, None where it begins one."""
        functions = [tool.get("function", tool) for tool in tools]
        self.tools = {function["name"]: function.get("parameters") or {} for function in functions}
        self.prompt = prompt
        self.continued = continued
        self._special_tokens = special_tokens
        self.new_id = lambda: f"call_{secrets.token_hex(12)}"
        self.pos = 0  # in the whole text
        self.spans: list[tuple[int, bool]] = []  # up to where it was read, and whether that was reasoning
        self._text = ""
        self._base = 0  # where `_text` begins in the whole text
        self._specials: set[int] | None = None
        self._closed = self._cut = False
        self._blank: str | None = ""  # whitespace that is no content if a call or the end follows
        self._index = -1
        self._events: list[Event] = []

    # The side that feeds it.

    def add(self, text: str, specials: Iterable[int] | None = None) -> None:
        """`specials`: where in `text` special tokens begin, if that is known."""
        if specials is not None:
            end = self._base + len(self._text)
            self._specials = (self._specials or set()) | {end + at for at in specials}
        self._text += text

    def close(self, cut: bool = False) -> None:
        """No more text comes. `cut`: though more was to come, and what is unread now may be half a call."""
        self._closed = True
        self._cut = cut

    def take(self) -> list[Event]:
        """What is new."""
        if self._closed and self._index < 0 and self._blank:  # a message of nothing but whitespace
            self._emit(Content(self._blank))
            self._blank = None
        events, self._events = self._events, []
        return events

    # What formats write.

    def content(self, text: str) -> None:
        if self._cut:  # what the text so far could decide is written already
            return
        if self._blank is not None:
            text = self._blank + text
            self._blank = text if not text.strip() else None
        if self._blank is None and text:
            self._emit(Content(text))

    def reasoning(self, text: str) -> None:
        if text:
            self._emit(Reasoning(text))

    def begin(self, name: str, id: str | None = None) -> None:
        self._index += 1
        self._blank = ""
        self._emit(CallBegin(self._index, id or self.new_id(), name))

    def arguments(self, text: str) -> None:
        if text:
            self._emit(Arguments(self._index, text))

    # What formats read. Nothing is read twice once it was written.

    def peek(self) -> Wait[str]:
        """The next character, not read yet; "" at the end."""
        while self.pos == self._base + len(self._text):
            if self._closed:
                return ""
            yield
        return self._text[self.pos - self._base]

    def literal(self, *options: str) -> Wait[str]:
        """Reads the one of `options` (none begins another) that comes next; "" if none does."""
        longest = max(map(len, options))
        while True:
            at = self.pos - self._base
            rest = self._text[at : at + longest]
            for option in options:
                if rest.startswith(option):
                    self.pos += len(option)
                    return option
            if self._closed or not any(option.startswith(rest) for option in options):
                return ""
            yield

    def run(self, pattern: re.Pattern[str]) -> Wait[str]:
        """Reads what `pattern`, a class of characters with a `*`, matches."""
        begin = end = self.pos
        while True:
            found = pattern.match(self._text, end - self._base)
            end = self._base + found.end() if found else end
            if end < self._base + len(self._text) or self._closed:
                self.pos = end
                return self._text[begin - self._base : end - self._base]
            yield

    def spaces(self) -> Wait[str]:
        return (yield from self.run(SPACES))

    def string(self) -> Wait[str | None]:
        """Reads a JSON string; None where there is none."""
        if (yield from self.peek()) != '"':
            return None
        begin = self.pos - self._base  # nothing is written meanwhile, so that `_base` stays
        end = begin + 1
        while True:
            end = QUOTED.match(self._text, end).end()  # it matches, if only nothing
            if self._text.startswith('"', end):
                break
            if self._closed:
                return None
            yield
        self.pos = self._base + end + 1
        try:
            text = json.loads(self._text[begin : end + 1], strict=False)
            text.encode()  # half a surrogate pair is no text
        except ValueError:
            return None
        return text

    def nested(self, out: Out, tags: tuple[str, ...] = ()) -> Wait[bool]:
        """Reads a JSON object or array, verbatim into `out` as it comes; True when its last bracket was read.

        It counts brackets outside strings, and judges nothing else. It ends early before any of `tags`, and
        before a `<` outside strings, which is no JSON but the beginning of a tag.
        """
        depth, quoted, escaped = 0, False, False
        while True:
            limit, tag = self._find(tags)
            text = self._text[self.pos - self._base : limit - self._base]
            for i, c in enumerate(text):
                if quoted:
                    quoted = escaped or c != '"'
                    escaped = c == "\\" and not escaped
                elif c == '"':
                    quoted = True
                elif c in "{[":
                    depth += 1
                elif c in "}]":
                    depth -= 1
                if not quoted and (c == "<" or not depth):
                    end = i + (c != "<")
                    self.pos += end
                    out(text[:end])
                    return c != "<"
            self.pos = limit
            out(text)
            if tag or self._closed:
                return False
            yield

    def until(self, tags: tuple[str, ...], out: Out) -> Wait[str | None]:
        """Reads up to and with the first of `tags` (none begins another), which it returns; None at the end.

        The text before goes to `out`, and only what could still become a tag waits.
        """
        while True:
            at, tag = self._find(tags)
            text = self._text[self.pos - self._base : at - self._base]
            self.pos = at
            if text:
                out(text)
            self.pos += len(tag or "")
            if tag or self._closed:
                return tag
            yield

    def attempt(self, rule: Wait[bool]) -> Wait[bool]:
        """Reads by `rule`, or nothing if it says False (it must not have written anything then)."""
        begin = self.pos
        if (yield from rule):
            return True
        self.pos = begin
        return False

    def _find(self, tags: tuple[str, ...]) -> tuple[int, str | None]:
        """Where the first tag is, or what could become one (then without it), or where the text ends."""
        start = self.pos - self._base
        pattern = _pattern(tags, self._closed)
        while tags and (found := pattern.search(self._text, start)):
            at = self._base + found.start()
            tag = next((tag for tag in tags if tag == found.group()), None)
            likely = tag or next(tag for tag in tags if tag.startswith(found.group()))
            if self._specials is None or likely not in self._special_tokens or at in self._specials:
                return at, tag
            start = found.start() + 1
        return self._base + len(self._text), None

    def _emit(self, event: Event) -> None:
        self._text = self._text[self.pos - self._base :]
        self._base = self.pos
        self.spans.append((self.pos, isinstance(event, Reasoning)))
        last = self._events[-1] if self._events else None
        if isinstance(last, Content | Reasoning | Arguments) and type(last) is type(event):
            last.text += event.text
        else:
            self._events.append(event)


@lru_cache
def _pattern(tags: tuple[str, ...], whole: bool) -> re.Pattern[str]:
    """Finds the first of `tags`, or (unless `whole`) the beginning of one at the end of the text."""

    def beginning(tag: str) -> str:
        pattern = re.escape(tag[-1])
        for c in reversed(tag[:-1]):
            pattern = rf"{re.escape(c)}(?:\Z|{pattern})"
        return pattern

    return re.compile("|".join(re.escape(tag) if whole else beginning(tag) for tag in tags))
