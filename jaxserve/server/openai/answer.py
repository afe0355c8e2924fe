"""What a chat's outputs are to the client: messages, or deltas that add up to them."""

import msgspec

from jaxserve.outputs import CompletionOutput
from jaxserve.server.openai.responses import CalledFunction, ChatMessage, Delta, ToolCall
from jaxserve.text.parsers import Arguments, CallBegin, Content, Event, Reasoning, collect


class Answer:
    """All choices of one request."""

    def __init__(self, show_reasoning: bool, functions: bool):
        """`functions`: a call, which is the only one, has its older form."""
        self._show_reasoning = show_reasoning
        self._functions = functions
        self._arguments: dict[int, list[str]] = {}
        """Of the last call of each choice that has one."""

    def message(self, output: CompletionOutput, echo: str) -> ChatMessage:
        if output.events is None:
            return ChatMessage(echo + output.text)
        found = collect(self._shown(output.index, output.events))
        message = ChatMessage(echo + found.content or None)
        if found.reasoning:
            message.reasoning = message.reasoning_content = found.reasoning
        if found.tool_calls and self._functions:
            message.function_call = CalledFunction(found.tool_calls[0].name, found.tool_calls[0].arguments)
        elif found.tool_calls:
            message.tool_calls = [
                ToolCall(id=call.id, type="function", function=CalledFunction(call.name, call.arguments))
                for call in found.tool_calls
            ]
        return message

    def deltas(self, output: CompletionOutput) -> list[Delta]:
        """One after the other; each has one thing to say."""
        if output.events is None:
            return [Delta(content=output.text)] if output.text else []
        deltas: list[Delta] = []
        for event in self._shown(output.index, output.events):
            match event:
                case Content(text):
                    deltas.append(Delta(content=text))
                case Reasoning(text):
                    deltas.append(Delta(reasoning=text, reasoning_content=text))
                case CallBegin(index, id, name):
                    deltas.append(self._delta(ToolCall(index, id, "function", CalledFunction(name, ""))))
                case Arguments(index, text):
                    deltas.append(self._delta(ToolCall(index, function=CalledFunction(arguments=text))))
        return deltas

    def finish_reason(self, output: CompletionOutput) -> str | None:
        arguments = self._arguments.get(output.index)
        if arguments is None or output.finish_reason != "stop":
            return output.finish_reason
        # a stop string may stand in the middle of a call
        cut_off = isinstance(output.stop_reason, str) and not _is_json("".join(arguments))
        return "stop" if cut_off else "function_call" if self._functions else "tool_calls"

    def _delta(self, call: ToolCall) -> Delta:
        return Delta(function_call=call.function) if self._functions else Delta(tool_calls=[call])

    def _shown(self, index: int, events: list[Event]) -> list[Event]:
        for event in events:
            if isinstance(event, CallBegin):
                self._arguments[index] = []
            elif isinstance(event, Arguments):
                self._arguments[index].append(event.text)
        if self._show_reasoning:
            return events
        return [event for event in events if not isinstance(event, Reasoning)]


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except msgspec.DecodeError:
        return False
    return True
