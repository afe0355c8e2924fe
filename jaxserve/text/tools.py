"""What a chat's request says about tools."""

from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from jaxserve.errors import InvalidRequest
from jaxserve.structs import is_deep

Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,128}\Z")]


class Function(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema; None: there are none."""
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function


class _Named(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class NamedTool(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: _Named


class ToolUse(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """The tools that a model may call, and whether it has to. Raises InvalidRequest with the field's path."""

    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """None: auto."""
    parallel_tool_calls: bool | None = None
    """False: at most one call."""

    def __post_init__(self) -> None:
        names: set[str] = set()
        for i, tool in enumerate(self.tools or ()):
            path = f"tools[{i}].function"
            if tool.function.name in names:
                told = f"{path}.name: {tool.function.name} is the name of another tool"
                raise InvalidRequest(told, f"{path}.name", "invalid_value")
            names.add(tool.function.name)
            _check_parameters(tool.function.parameters or {}, f"{path}.parameters")
        if self.tool_choice == "required" and not names:
            raise InvalidRequest("tool_choice 'required' needs tools", "tool_choice", "invalid_value")
        if isinstance(self.tool_choice, NamedTool) and (name := self.tool_choice.function.name) not in names:
            path = "tool_choice.function.name"
            raise InvalidRequest(f"{path}: there is no tool {name!r}", path, "invalid_value")

    @cached_property
    def offered(self) -> list[dict[str, Any]]:
        """The tools as templates and parsers take them; none of them with `tool_choice: none`."""
        if self.tool_choice == "none":
            return []
        return [_shown(tool) for tool in self.tools or ()]

    @property
    def named(self) -> str | None:
        """The only tool that may be called."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def strict(self) -> bool:
        """Whether there is a tool whose arguments fit wherever it is called."""
        return any(tool["function"].get("strict") for tool in self.offered)

    @property
    def forced(self) -> bool:
        """Whether there must be a call."""
        return self.tool_choice == "required" or self.named is not None

    @property
    def many(self) -> bool:
        """Whether there may be more than one call."""
        return self.parallel_tool_calls is not False and self.named is None


def _shown(tool: Tool) -> dict[str, Any]:
    """Templates count on parameters."""
    function = {"name": tool.function.name, "parameters": NO_PARAMETERS} | msgspec.to_builtins(tool.function)
    order = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: function[name] for name in order if name in function}}


NO_PARAMETERS = {"type": "object", "properties": {}}


def _check_parameters(schema: dict[str, Any], path: str) -> None:
    """What is counted on elsewhere; the rest of a schema is up to those who use it."""
    if schema.get("type", "object") != "object":
        raise InvalidRequest(f"{path}.type must be 'object'", f"{path}.type", "invalid_value")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        told = f"{path}.required must be a list of names"
        raise InvalidRequest(told, f"{path}.required", "invalid_value")
    if not isinstance(schema.get("properties", {}), dict):
        raise InvalidRequest(f"{path}.properties must be an object", f"{path}.properties", "invalid_value")
    if is_deep(schema):
        raise InvalidRequest(f"{path} is nested too deeply", path, "invalid_value")
