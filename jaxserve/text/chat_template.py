"""A conversation as one prompt, by the model's own Jinja template, in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jaxserve.errors import InvalidRequest, ModelError

CUT = "<jaxserve:continue> "
"""Marks where the last message's text ends. Its last space tells whether the template trims messages."""


class ChatTemplate:
    """One template. It is compiled when first used, as Jinja takes longer to import than to run."""

    def __init__(self, source: str, variables: Mapping[str, str]):
        """`variables`: what the template may name besides the messages (bos_token, eos_token, …)."""
        self.source = source
        self.variables = variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt's text; with `continue_final_message` it ends inside the last message.

        Raises InvalidRequest with the path of what is wrong, `messages` when the template refuses.
        """
        chat = [self._message(i, message) for i, message in enumerate(messages)]
        if not chat:
            raise InvalidRequest("messages must not be empty", "messages")
        if continue_final_message:
            if add_generation_prompt:
                raise InvalidRequest(
                    "continue_final_message needs add_generation_prompt=false", "continue_final_message"
                )
            _mark_end(chat[-1])
        try:
            text = self._compiled.render(
                messages=chat,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                **{**self.variables, **variables},
            )
        except ModelError:
            raise
        except Exception as error:  # whatever the template's code runs into
            raise InvalidRequest(
                f"the model's chat template refused the messages: {error}", "messages"
            ) from error
        return _cut(text) if continue_final_message else text

    @cached_property
    def _compiled(self) -> Any:
        from jinja2 import TemplateSyntaxError

        try:
            return _environment().from_string(self.source)
        except TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template is broken in line {error.lineno}: {error.message}"
            ) from error

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template itself walks over a message's parts."""
        from jinja2 import nodes

        tree = _environment().parse(self.source)
        return any(_is_content(loop.iter, nodes) for loop in tree.find_all(nodes.For))

    def _message(self, i: int, message: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"messages[{i}] must be an object", f"messages[{i}]")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise InvalidRequest(f"messages[{i}].role must be a string", f"messages[{i}].role")
        if content is None and role == "assistant":
            content = ""
        elif isinstance(content, (list, tuple)):
            texts = [_part_text(part, f"messages[{i}].content[{j}]") for j, part in enumerate(content)]
            content = [dict(part) for part in content] if self._wants_parts else "\n".join(texts)
        elif not isinstance(content, str):
            path = f"messages[{i}].content"
            raise InvalidRequest(f"{path} must be a string or a list of parts", path)
        return {**message, "content": content}


def _part_text(part: Any, path: str) -> str:
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"{path} must be an object", path)
    if part.get("type") != "text":
        raise InvalidRequest(f"{path}.type must be 'text', not {part.get('type')!r}", f"{path}.type")
    if not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{path}.text must be a string", f"{path}.text")
    return part["text"]


def _is_content(node: Any, nodes: Any) -> bool:
    match node:
        case nodes.Name():
            return node.name == "content"
        case nodes.Getattr():
            return node.attr == "content"
        case nodes.Getitem():
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return False


def _mark_end(message: dict[str, Any]) -> None:
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + CUT
    elif content:
        content[-1]["text"] += CUT
    else:
        raise InvalidRequest("continue_final_message needs a last message with text", "messages")


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
