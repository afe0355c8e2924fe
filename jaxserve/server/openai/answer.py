"""What a chat's outputs are to the client: messages, or deltas that add up to them."""

from jaxserve.outputs import CompletionOutput
from jaxserve.server.openai.responses import CalledFunction, ChatMessage, Delta, ToolCall
from jaxserve.text.parsers import Arguments, CallBegin, Content, Event, Reasoning, collect


class Answer:
    """All choices of one request."""

    def __init__(self, show_reasoning: bool):
        self._show_reasoning = show_reasoning
        self._calling: set[int] = set()
        """The choices with a call."""

    def message(self, output: CompletionOutput, echo: str) -> ChatMessage:
        if output.events is None:
            return ChatMessage(echo + output.text)
        found = collect(self._shown(output.index, output.events))
        message = ChatMessage(echo + found.content or None)
        if found.reasoning:
            message.reasoning = message.reasoning_content = found.reasoning
        if found.tool_calls:
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
                    call = ToolCall(index, id, "function", CalledFunction(name, ""))
                    deltas.append(Delta(tool_calls=[call]))
                case Arguments(index, text):
                    call = ToolCall(index, function=CalledFunction(arguments=text))
                    deltas.append(Delta(tool_calls=[call]))
        return deltas

    def finish_reason(self, output: CompletionOutput) -> str | None:
        calls = output.finish_reason == "stop" and output.index in self._calling
        return "tool_calls" if calls else output.finish_reason

    def _shown(self, index: int, events: list[Event]) -> list[Event]:
        if any(isinstance(event, CallBegin) for event in events):
            self._calling.add(index)
        if self._show_reasoning:
            return events
        return [event for event in events if not isinstance(event, Reasoning)]
