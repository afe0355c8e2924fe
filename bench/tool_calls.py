"""Asks a running server for calls that must come, and checks every one against the schema of its tool.

    python bench/tool_calls.py --url http://localhost:8000 --requests 100

Temperature 1; half of them streamed, a third by name. An answer without valid calls is printed, and the exit
status is 1.
"""

import argparse
import asyncio
import json
import random
import sys
from typing import Any

import jsonschema
import openai

CITY = {"type": "string", "maxLength": 30}
SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {"properties": {"city": CITY, "unit": {"enum": ["C", "F"]}}, "required": ["city"]},
    "book_flight": {
        "properties": {
            "from": CITY,
            "to": CITY,
            "seats": {"type": "integer", "minimum": 1, "maximum": 9},
            "when": {"type": "string", "format": "date"},
        },
        "required": ["from", "to", "seats"],
    },
    "send_mail": {
        "properties": {
            "to": {
                "type": "array",
                "items": {"type": "string", "maxLength": 20},
                "minItems": 1,
                "maxItems": 3,
            },
            "urgent": {"type": "boolean"},
        },
        "required": ["to", "urgent"],
    },
    "add_shape": {
        "$defs": {
            "point": {
                "type": "object",
                "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
                "required": ["x", "y"],
                "additionalProperties": False,
            }
        },
        "properties": {"corner": {"$ref": "#/$defs/point"}, "color": {"enum": ["red", "green", None]}},
        "required": ["corner"],
    },
    "get_time": {},
    "list_files": {"properties": {}},
}
QUESTIONS = (
    "What is the weather in Oslo?",
    "Fly me to Rome.",
    "Hi!",
    "Write to Ann and Bob.",
    "日本は今何時ですか",
)


async def main(url: str, count: int, at_once: int) -> int:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    model = (await client.models.list()).data[0].id
    gate = asyncio.Semaphore(at_once)

    async def one(i: int) -> str | None:
        async with gate:
            return await ask(client, model, i)

    wrong = [told for told in await asyncio.gather(*map(one, range(count))) if told]
    print("\n".join([*wrong, f"{count - len(wrong)} of {count} are valid calls"]))
    return bool(wrong)


async def ask(client: openai.AsyncOpenAI, model: str, i: int) -> str | None:
    """What is wrong with the i-th answer, if anything is."""
    rng = random.Random(i)
    names = rng.sample(list(SCHEMAS), rng.randrange(1, len(SCHEMAS) + 1))
    named = i % 3 == 0
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": rng.choice(QUESTIONS)}],
        "tools": [{"type": "function", "function": {"name": n, "parameters": SCHEMAS[n]}} for n in names],
        "tool_choice": {"type": "function", "function": {"name": names[0]}} if named else "required",
        "parallel_tool_calls": i % 2 == 0,
        "temperature": 1.0,
        "seed": i,
        "max_tokens": 4000,
    }
    if i % 4 < 2:
        try:
            async with client.chat.completions.stream(**body) as stream:
                completion = await stream.get_final_completion()
        except openai.LengthFinishReasonError as error:
            return f"{i}: cut off: {error.completion.choices[0].to_json(indent=None)}"
    else:
        completion = await client.chat.completions.create(**body)
    (choice,) = completion.choices
    calls = choice.message.tool_calls or []
    try:
        assert calls and choice.finish_reason == "tool_calls" and choice.message.content is None
        assert len(calls) == 1 or (not named and body["parallel_tool_calls"])
        for call in calls:
            assert call.function.name in (names[:1] if named else names)
            arguments = json.loads(call.function.arguments)
            assert isinstance(arguments, dict)
            jsonschema.validate(arguments, SCHEMAS[call.function.name] or {"maxProperties": 0})
    except (AssertionError, ValueError, jsonschema.ValidationError) as error:
        return f"{i}: {type(error).__name__} {error}: {choice.to_json(indent=None)}"
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=16)
    args = parser.parse_args()
    sys.exit(asyncio.run(main(args.url, args.requests, args.at_once)))
