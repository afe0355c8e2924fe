"""A conversation as one prompt, by the model's own Jinja template, in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import Any

from jaxserve.errors import InvalidRequest, JaxserveError, ModelError
from jaxserve.structs import is_deep
from jaxserve.text import tool_prompt
from jaxserve.text.tool_prompt import Message

CUT = "<jaxserve:continue> "
"""Marks where the last message's text ends. Its last space tells whether the template trims messages."""
ARGUMENTS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
"""What a caller gives under its own name, and not among the template's other variables."""


class ChatTemplate:
    """One template. It is compiled when first used, as Jinja takes longer to import than to run."""

    def __init__(self, source: str, variables: Mapping[str, str], given: bool = False):
        """`variables`: what the template may name besides the messages (bos_token, eos_token, …); `given`:
        by a request, whose own fault its errors are."""
        self.source = source
        self.variables = variables
        self._given = given

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        reasoning_effort: str | None = None,
    ) -> str:
        """The prompt's text; with `continue_final_message` it ends inside the last message.

        Tools, their calls and answers are written by `tool_prompt` where the template would leave them out.
        Raises InvalidRequest with the path of what is wrong, `messages` when the template refuses them, and
        for documents or further variables that the template has no place for.
        """
        chat: list[Message]
        chat = _with_names([self._message(i, message) for i, message in enumerate(messages)])
        if not chat:
            raise InvalidRequest("messages must not be empty", "messages")
        variables = dict(chat_template_kwargs or {})
        for name in variables:
            self._check_variable(name)
        if reasoning_effort is not None:
            if "reasoning_effort" not in self._names:
                told = "the chat template has no place for reasoning_effort"
                raise InvalidRequest(told, "reasoning_effort", "unsupported_field")
            variables = {"reasoning_effort": reasoning_effort} | variables
        if documents and "documents" not in self._names:
            raise InvalidRequest("the chat template has no place for documents", "documents")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message needs add_generation_prompt=false", "continue_final_message"
            )
        given = {
            "documents": documents or None,
            "add_generation_prompt": add_generation_prompt,
            **self.variables,
            **variables,
        }
        native = not tools or "tools" in self._names
        if not native or "tool_calls" not in self.source:
            chat = tool_prompt.plain(chat)
        if continue_final_message:
            chat[-1] = _marked(chat[-1])
        if native:
            text = self._text(chat, tools=tools or None, **given)
        else:
            text = self._with_preamble(chat, tool_prompt.preamble(tools or ()), given)
        text = _cut(text) if continue_final_message else text
        if not native and tool_prompt.preamble(tools or ()) not in text:
            told = "tools need a message after the system message that is to be continued"
            raise InvalidRequest(told, "tools", "invalid_value")
        return text

    def _with_preamble(self, chat: list[Message], preamble: str, given: dict[str, Any]) -> str:
        text = ""
        with suppress(InvalidRequest):  # some have no system message, and say so
            text = self._text(tool_prompt.in_system(chat, preamble), tools=None, **given)
        if preamble not in text:
            text = self._text(tool_prompt.in_user(chat, preamble), tools=None, **given)
        if preamble not in text:
            raise InvalidRequest("the chat template has no place for tools", "tools")
        return text

    def _text(self, chat: list[Message], **given: Any) -> str:
        try:
            text: str = self._compiled.render(messages=chat, **given)
        except JaxserveError:
            raise
        except Exception as error:  # whatever the template's code runs into
            told, param = "the model's chat template refused the messages", "messages"
            if self._given:
                told, param = "the chat_template failed", "chat_template"
            raise InvalidRequest(f"{told}: {str(error) or type(error).__name__}", param) from error
        return text

    @cached_property
    def _compiled(self) -> Any:
        from jinja2 import TemplateSyntaxError

        try:
            return _environment().from_string(self.source)
        except TemplateSyntaxError as error:
            told = f"the chat template is broken in line {error.lineno}: {error.message}"
            raise (InvalidRequest(told, "chat_template") if self._given else ModelError(told)) from error

    @cached_property
    def _names(self) -> set[str]:
        """The variables that the template asks for."""
        from jinja2 import meta

        return meta.find_undeclared_variables(self._parsed)

    def _check_variable(self, name: str) -> None:
        path = f"chat_template_kwargs.{name}"
        if name in ARGUMENTS:
            raise InvalidRequest(f"{path} must be given as {name}", path)
        if name not in self._names:
            raise InvalidRequest(f"the chat template has no variable {name}", path, "unknown_field")

    @cached_property
    def _asks_for_none(self) -> bool:
        """Whether the template asks if a message has no content: some know calls by that."""
        from jinja2 import nodes

        tests = self._parsed.find_all(nodes.Test)
        return any(test.name == "none" and _is_content(test.node, nodes) for test in tests)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template itself walks over a message's parts."""
        from jinja2 import nodes

        aliases = {
            getattr(assign.target, "name", None)
            for assign in self._parsed.find_all(nodes.Assign)
            if _is_content(assign.node, nodes)
        }
        loops = [loop.iter for loop in self._parsed.find_all(nodes.For)]
        return any(_is_content(over, nodes) or getattr(over, "name", "") in aliases for over in loops)

    @cached_property
    def _parsed(self) -> Any:
        self._compiled  # noqa: B018  raises for what cannot be parsed
        return _environment().parse(self.source)

    def _message(self, i: int, message: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"messages[{i}] must be an object", f"messages[{i}]")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise InvalidRequest(f"messages[{i}].role must be a string", f"messages[{i}].role")
        if role == "developer" and role not in self.source:
            role = "system"  # its older name
        calls = _calls(message.get("tool_calls"), f"messages[{i}].tool_calls")
        if content is None and role == "assistant":
            none = calls and self._asks_for_none
            content = message.get("refusal") or (None if none else "")
        elif isinstance(content, (list, tuple)):
            kinds = part_kinds(role)
            texts = [_part_text(part, f"messages[{i}].content[{j}]", kinds) for j, part in enumerate(content)]
            parts = [{"type": "text", "text": text} for text in texts]
            content = parts if self._wants_parts else "\n".join(texts)
        elif not isinstance(content, str):
            path = f"messages[{i}].content"
            raise InvalidRequest(f"{path} must be a string or a list of parts", path)
        return {**message, **_reasoning(message), **calls, "role": role, "content": content}


def content_text(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """A message's content as a template sees it that knows no parts."""
    if isinstance(content, str | None):
        return content or ""
    return "\n".join(part[part["type"]] for part in content)


def _reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """What an assistant thought, under the names that templates know, as transformers gives it."""
    given = (message.get(name) for name in ("reasoning_content", "thinking", "reasoning"))
    reasoning = next((text for text in given if text is not None), None)
    if reasoning is None:
        return {}
    return {"reasoning_content": reasoning, "thinking": message.get("thinking", reasoning)}


def _calls(calls: Any, path: str) -> dict[str, Any]:
    """A message's `tool_calls` with their arguments as objects, which templates count on."""
    if not calls:
        return {}
    if not isinstance(calls, (list, tuple)):
        raise InvalidRequest(f"{path} must be a list", path)
    return {"tool_calls": [_call(call, f"{path}[{i}]") for i, call in enumerate(calls)]}


def _call(call: Any, path: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{path}.function must be an object with a name", f"{path}.function")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # what a model wrote may be no JSON
            read = json.loads(arguments)
            arguments = read if isinstance(read, dict) and not is_deep(read) else arguments
    return {**call, "function": {**function, "arguments": arguments}}


def _with_names(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some templates write which tool answered, and OpenAI's clients only say to which call."""
    called: dict[str, str] = {}
    for message in chat:
        for call in message.get("tool_calls") or ():
            called[str(call.get("id"))] = call["function"]["name"]
        answered = str(message.get("tool_call_id", ""))
        if message["role"] == "tool" and answered in called:
            message.setdefault("name", called[answered])
    return chat


def part_kinds(role: object) -> tuple[str, ...]:
    """The types that the parts of a message's content may have."""
    return ("text", "refusal") if role == "assistant" else ("text",)


def _part_text(part: Any, path: str, kinds: tuple[str, ...]) -> str:
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"{path} must be an object", path)
    kind = part.get("type")
    if kind not in kinds:
        raise InvalidRequest(f"{path}.type must be {' or '.join(kinds)}, not {kind!r}", f"{path}.type")
    if not isinstance(part.get(kind), str):
        raise InvalidRequest(f"{path}.{kind} must be a string", f"{path}.{kind}")
    return part[kind]


def _is_content(node: Any, nodes: Any) -> bool:
    match node:
        case nodes.Name():
            return node.name == "content"
        case nodes.Getattr():
            return node.attr == "content"
        case nodes.Getitem():
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value="content"), *_]):
            return True
    return False


def _marked(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        content += CUT
    elif content:
        content = [*content[:-1], {**content[-1], "text": content[-1]["text"] + CUT}]
    else:
        raise InvalidRequest("continue_final_message needs a last message with text", "messages")
    return {**message, "content": content}


def _cut(text: str) -> str:
    end = text.rfind(CUT.strip())
    if end < 0:
        raise InvalidRequest(
            "the model's chat template leaves out the message that continue_final_message would continue",
            "messages",
        )
    return text[:end] if text.startswith(CUT, end) else text[:end].rstrip()


def _environment() -> Any:
    """What published templates count on, beyond plain Jinja."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
