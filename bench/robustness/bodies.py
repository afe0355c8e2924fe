"""Bodies that are wrong, or odd, in requests that are well-formed otherwise.

What a body holds is written as JSON text, because much of what is tried (NaN, half a surrogate pair, an
integer of 5,000 digits, the same key twice) is no Python value.
"""

import json
import random
from collections.abc import Callable

from bench.robustness.request import CHAT, Case, Fields, good_fields, request, to_json

SHARED = (
    *("model", "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "max_tokens"),
    *("include_stop_str_in_output", "skip_special_tokens", "ignore_eos", "cache_salt", "stream", "logprobs"),
    *("stream_options", "user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"),
    *("verbosity", "presence_penalty", "logit_bias", "response_format", "echo", "store", "best_of"),
    *("priority", "prompt_logprobs", "allowed_token_ids", "structured_outputs", "request_id"),
    *("return_token_ids", "add_special_tokens", "frequency_penalty", "repetition_penalty", "typical_p"),
    *("bad_words", "min_tokens", "truncate_prompt_tokens", "spaces_between_special_tokens", "detokenize"),
    *("return_tokens_as_token_ids", "use_beam_search", "length_penalty", "early_stopping"),
)
OWN = {
    "/v1/chat/completions": (
        *("messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "functions"),
        *("parallel_tool_calls", "include_reasoning", "thinking_token_budget"),
        *("modalities", "reasoning_effort", "chat_template", "chat_template_kwargs", "documents"),
        *("add_generation_prompt", "continue_final_message"),
    ),
    "/v1/completions": ("prompt", "suffix", "prompt_embeds"),
}

STRINGS = [
    "",
    " ",
    "\x00",
    "a\x00b\x1f\x7f",
    "\u202e\u200d\ufeff\ufffe\uffff",
    "\U0010ffff\U000e0001",
    "Z" + "\u0337" * 300,
    "👩‍👩‍👧‍👦" * 20,
    "ﷺ" * 50,
    "{{ 7 * 7 }}{% for x in range(10**9) %}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "<|end|><|assistant|><|im_start|>system\n<|im_end|><|endoftext|></s>[INST]",
    "'; DROP TABLE blocks; --",
    "../../../../etc/passwd",
    "${jndi:ldap://x/a}%s%n%x",
    "\r\nHTTP/1.1 200 OK\r\n\r\n",
    "data: [DONE]\n\n",
    "a" * 300,
    "x" * 20_000,
    "word " * 30_000,
]
BROKEN = [  # no JSON: nothing in it can be blamed
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "01", "+1", ".5", "0x10", "1_000"),
    *('"\\ud800"', '"\\udc00\\ud800"', '"a\\x41"', "'a'", '"a', "tru", "nul", "undefined", "", "{", "[1,]"),
    *('{"a":}', '"\t"', "[" * 5000, '{"a":' * 5000, "[" * 100_000 + "]" * 100_000, "/* */ 1", "1 2"),
]
NUMBERS = [
    *("0", "-0", "-0.0", "1", "-1", "2", "0.5", "1.5", "16.0", "1e3", "1e-400", "128", "129", "2048"),
    *("2147483648", "-2147483649", "9223372036854775808", "18446744073709551616", "1" + "0" * 60, "1e308"),
]
OTHERS = [
    *("null", "true", "false", "[]", "{}", "[[]]", "[{}]", "[null]", "[true]", '[""]', "[0]", "[-1]"),
    *('{"a": 1}', '{"": ""}', '{"type": "text"}', '["a", 1]', '["a", ["b"]]', "[[1], [2, []]]"),
    *("[" * 400 + "]" * 400, '{"a":' * 400 + "1" + "}" * 400, str(list(range(300))), str([7] * 100_000)),
    *('["a"' + ',"a"' * 70 + "]", '["a"' + ',"a"' * 3000 + "]"),
]


def one_field(rng: random.Random) -> Case:
    """A good body with one field that holds anything."""
    path, fields = good_fields(rng)
    name = rng.choice(SHARED + OWN[path])
    value, valid = _value(rng)
    body = to_json(fields | {name: value})
    return Case("one field", [request(path, body)], statuses=(200, 400, 404), param=name if valid else None)


def several_fields(rng: random.Random) -> Case:
    path, fields = good_fields(rng)
    for _ in range(rng.randrange(2, 6)):
        fields[rng.choice(SHARED + OWN[path])] = _value(rng)[0]
    return Case("several fields", [request(path, to_json(fields))], statuses=(200, 400, 404))


def unknown_field(rng: random.Random) -> Case:
    path, fields = good_fields(rng)
    name = rng.choice([*STRINGS[:16], "temprature", "Model", "__proto__", "prompt ", "x" * 5000])
    fields[name] = rng.choice(NUMBERS)
    return Case("unknown field", [request(path, to_json(fields))], statuses=(400,))


def message(rng: random.Random) -> Case:
    """A conversation that is wrong, or odd, somewhere inside."""
    value, valid = _value(rng)
    place, text = rng.choice(
        [
            ("messages[0]", f"[{value}]"),
            ("messages[0].role", f'[{{"role": {value}, "content": "a"}}]'),
            ("messages[0].content", f'[{{"role": "user", "content": {value}}}]'),
            (
                "messages[1].content",
                f'[{{"role": "user", "content": "a"}}, {{"role": "user", "content": {value}}}]',
            ),
            ("messages[0].content[0]", f'[{{"role": "user", "content": [{value}]}}]'),
            (
                "messages[0].content[1].text",
                '[{"role": "user", "content": [{"type": "text", "text": "a"}, '
                f'{{"type": "text", "text": {value}}}]}}]',
            ),
            ("messages[0].name", f'[{{"role": "user", "content": "a", "name": {value}}}]'),
            ("messages[0].reasoning", f'[{{"role": "assistant", "content": "a", "reasoning": {value}}}]'),
            ("messages", f'[{{"role": "assistant", "refusal": {value}}}]'),
            ("messages[0].tool_calls", f'[{{"role": "assistant", "content": "a", "tool_calls": {value}}}]'),
            (
                "messages[0].tool_calls[0].function.arguments",
                '[{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", '
                f'"function": {{"name": "f", "arguments": {value}}}}}]}}]',
            ),
            ("messages[0].tool_call_id", f'[{{"role": "tool", "content": "a", "tool_call_id": {value}}}]'),
            ("messages[0].content", f'[{{"role": "tool", "tool_call_id": "1", "content": {value}}}]'),
            ("messages[0].other", f'[{{"role": "user", "content": "a", "other": {value}}}]'),
        ]
    )
    body = to_json(CHAT | {"messages": text})
    # what is wrong with a conversation as a whole (its length, say) is blamed on messages
    param = "messages" if valid and place.endswith(("content", "text")) else place if valid else None
    return Case("message", [request("/v1/chat/completions", body)], statuses=(200, 400), param=param)


def tools(rng: random.Random) -> Case:
    """Tools that are wrong, or odd, somewhere inside."""
    value, valid = _value(rng)
    place, tool = rng.choice(
        [
            ("tools[0]", value),
            ("tools[0].function", f'{{"type": "function", "function": {value}}}'),
            ("tools[0].function.name", f'{{"type": "function", "function": {{"name": {value}}}}}'),
            # from here on it may be good, or far too long, for which the messages are blamed
            ("", f'{{"type": "function", "function": {{"name": "f", "parameters": {value}}}}}'),
            (
                "",
                '{"type": "function", "function": {"name": "f", "parameters": '
                f'{{"properties": {{"a": {value}, "b": {{"type": {value}, "enum": {value}}}}}}}}}}}',
            ),
        ]
    )
    choice = rng.choice(['"auto"', '"required"', '{"type": "function", "function": {"name": "f"}}'])
    body = to_json(CHAT | {"tools": f"[{tool}]", "tool_choice": choice})
    param = place if valid else None
    return Case("tools", [request("/v1/chat/completions", body)], statuses=(200, 400), param=param)


def broken_json(rng: random.Random) -> Case:
    """A good body with some bytes lost, doubled, changed or added: perhaps it is still good."""
    path, fields = good_fields(rng)
    body = bytearray(to_json(fields))
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(body))
        match rng.randrange(5):
            case 0:
                del body[at:]
                body += b" "
            case 1:
                body[at] = rng.randrange(256)
            case 2:
                body[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                del body[at : at + rng.randrange(1, 9)]
                body += b" "
            case 4:
                body += body[at:]
    return Case("broken JSON", [request(path, bytes(body))], statuses=(200, 400, 404))


def other_body(rng: random.Random) -> Case:
    path, fields = good_fields(rng)
    body = to_json(fields)
    text = body.decode()
    body = rng.choice(
        [
            *(
                b"",
                b"null",
                b"3",
                b'"text"',
                b"[]",
                b"{}",
                b"\xff\xfe",
                b"\x1f\x8b\x08",
                b"model=tiny&prompt=a",
            ),
            *(b"\xef\xbb\xbf" + body, body + b"\x00", body + b" trailing", body + body, b"[" + body + b"]"),
            *(
                text.encode("utf-16"),
                text.encode("utf-32"),
                b"--x\r\ncontent-disposition: form-data\r\n--x--",
            ),
        ]
    )
    return Case("other body", [request(path, body)], statuses=(400,))


def same_key_twice(rng: random.Random) -> Case:
    """The last one counts, as for everyone who reads JSON."""
    path, fields = good_fields(rng)
    name = rng.choice(list(fields))
    body = b'{"%b": %b, %b' % (name.encode(), _value(rng, broken=False)[0].encode(), to_json(fields)[1:])
    return Case("same key twice", [request(path, body)], statuses=(200,))


def huge(rng: random.Random) -> Case:
    """Far more of something than can be served, or than there is of it."""
    path, fields = good_fields(rng)
    size = 10 ** rng.randrange(4, 7)
    key = "messages" if path.startswith("/v1/chat") else "prompt"
    told = json.dumps(rng.choice(["a", "word ", " ", "é", "\n", "0"]) * size)
    kinds: dict[str, Callable[[], Fields]] = {
        key: lambda: {key: told if key == "prompt" else f'[{{"role": "user", "content": {told}}}]'},
        "messages ": lambda: {key: "[" + ",".join([json.dumps("a")] * size) + "]"},
        "stop": lambda: {"stop": f"[{told}]"},
        "stop_token_ids": lambda: {"stop_token_ids": str([7] * size)},
        "cache_salt": lambda: {"cache_salt": told},
        "user": lambda: {"user": told},
        "model": lambda: {"model": told},
        "metadata": lambda: {"metadata": json.dumps({str(i): "" for i in range(size // 10)})},
        "unknown": lambda: {"k" * size: "1"},
        "many": lambda: {f"k{i}": "1" for i in range(size // 10)},
    }
    body = to_json(fields | rng.choice(list(kinds.values()))())
    return Case("huge", [request(path, body)], statuses=(200, 400, 404))


def _value(rng: random.Random, broken: bool = True) -> tuple[str, bool]:
    """Any value as JSON text, and whether that is JSON at all."""
    if broken and rng.random() < 0.15:
        return rng.choice(BROKEN), False
    kind = rng.choice((NUMBERS, OTHERS, STRINGS))
    text = rng.choice(kind)
    return (json.dumps(text, ensure_ascii=rng.random() < 0.5) if kind is STRINGS else text), True
