"""Bad requests: each made from a seed and a number alone, so that any of them can be sent again.

A case is bytes and how they are sent. What a body holds is written as JSON text, because much of what is
tried (NaN, half a surrogate pair, an integer of 5,000 digits, the same key twice) is no Python value.
"""

import json
import random
from collections.abc import Callable
from typing import Literal, NamedTuple

Ending = Literal["read", "read slowly", "close", "reset", "half-close"]
Fields = dict[str, str]
"""Name of a field -> its value as JSON text."""


class Case(NamedTuple):
    """`parts` go out one after another, `pause` seconds apart; then the client does `ending`."""

    name: str
    parts: list[bytes]
    answers: int | None = 1
    """How many answers are owed; None: any number."""
    statuses: tuple[int, ...] = ()
    """What an answer may be; empty: anything but the server's own failure."""
    param: str | None = None
    """A 400 must blame this field or one inside it."""
    pause: float = 0.0
    ending: Ending = "read"
    method: str = "POST"


CHAT: Fields = {
    "messages": '[{"role": "user", "content": "Hello"}]',
    "max_completion_tokens": "3",
    "temperature": "0",
}
COMPLETION: Fields = {"prompt": '"Hello"', "max_tokens": "3", "temperature": "0"}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}
SHARED = (
    *("model", "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "max_tokens"),
    *("include_stop_str_in_output", "skip_special_tokens", "ignore_eos", "cache_salt", "stream", "logprobs"),
    *("stream_options", "user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"),
    *("verbosity", "presence_penalty", "logit_bias", "response_format", "echo", "store", "best_of"),
    *("priority", "prompt_logprobs", "allowed_token_ids", "structured_outputs", "request_id"),
    *("return_token_ids", "add_special_tokens"),
)
OWN = {
    "/v1/chat/completions": (
        *("messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "functions"),
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
METHODS = [
    *("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "CONNECT"),
    *("get", "BREW", "P\x00ST", ""),
]
TARGETS = [
    *("/", "//", "/v1", "/v1/", "/v1/completions/", "/V1/Completions", "/v1//completions"),
    *("/v1/completions?a=b", "/v1/models", "/metrics", "/health", "/reset_prefix_cache"),
    *("/v1/../v1/completions", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/%00", "/v1/models/%ff%fe", "/%zz"),
    *("/v1/models/../../metrics", "/v1/models/" + "a" * 5000, "/" + "a/" * 2000, "*", "http://elsewhere/v1"),
    *("/v1/models/\xe9", "/v1/completions#x", "x", "?", "/v1/models/{{7*7}}"),
]
HEADERS = [
    *("host: a\r\nhost: b", "host:", "x" * 70_000 + ": 1", "a: " + "b" * 70_000, "a: b\r\n" * 2000 + "c: d"),
    *("a : b", ": b", "no colon", " folded: a\r\n b", "a: b\x00c", "a: \xff\xfe", "a: b\n\nc: d", "\x01: b"),
    *("content-type: text/plain", "content-type: application/json; charset=utf-16", "content-encoding: gzip"),
    *("accept: \x7f", "authorization: Bearer \xe9", "authorization: " + "x" * 9000, "x-api-key:"),
    *("x-request-id: \xe9\xe9", "x-request-id: " + "i" * 500, "connection: upgrade\r\nupgrade: websocket"),
    *("connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__",),
    *("x-forwarded-for: a, [::1, \xff", "forwarded: for=_x;proto=ftp", "x-forwarded-proto: gopher"),
    *("expect: 100-continue", "expect: nonsense", "transfer-encoding: gzip", "range: bytes=0-1"),
]
LENGTHS = ["-1", "+5", "abc", "1e3", "0x10", "9" * 20, "18446744073709551617", "5, 5", "", "\xb2"]
GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\r\n" * 5000,
    b"\x00" * 1000,
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost",
    b"POST /v1/completions HTTP/1.1\r\n" + b"a: b\r\n" * 3,
    b"*1\r\n$4\r\nPING\r\n",
    b"SSH-2.0-OpenSSH_9.9\r\n",
    b"GET /" + b"a" * 400_000,
]


def make_case(seed: int, number: int) -> Case:
    """The case with this number: the same for the same seed, whatever was made before."""
    rng = random.Random(f"{seed}/{number}")
    (make,) = rng.choices(list(MAKERS), list(MAKERS.values()))
    return make(rng)


def one_field(rng: random.Random) -> Case:
    """A good body with one field that holds anything."""
    path, fields = _good(rng)
    name = rng.choice(SHARED + OWN[path])
    value, valid = _value(rng)
    body = _json(fields | {name: value})
    return Case("one field", [request(path, body)], statuses=(200, 400, 404), param=name if valid else None)


def several_fields(rng: random.Random) -> Case:
    path, fields = _good(rng)
    for _ in range(rng.randrange(2, 6)):
        fields[rng.choice(SHARED + OWN[path])] = _value(rng)[0]
    return Case("several fields", [request(path, _json(fields))], statuses=(200, 400, 404))


def unknown_field(rng: random.Random) -> Case:
    path, fields = _good(rng)
    name = rng.choice([*STRINGS[:16], "temprature", "Model", "__proto__", "prompt ", "x" * 5000])
    fields[name] = rng.choice(NUMBERS)
    return Case("unknown field", [request(path, _json(fields))], statuses=(400,))


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
            ("messages[0].other", f'[{{"role": "user", "content": "a", "other": {value}}}]'),
        ]
    )
    body = _json(CHAT | {"messages": text})
    # what is wrong with a conversation as a whole (its length, say) is blamed on messages
    param = "messages" if valid and place.endswith(("content", "text")) else place if valid else None
    return Case("message", [request("/v1/chat/completions", body)], statuses=(200, 400), param=param)


def broken_json(rng: random.Random) -> Case:
    """A good body with some bytes lost, doubled, changed or added: perhaps it is still good."""
    path, fields = _good(rng)
    body = bytearray(_json(fields))
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
    path, fields = _good(rng)
    body = _json(fields)
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
    path, fields = _good(rng)
    name = rng.choice(list(fields))
    body = b'{"%b": %b, %b' % (name.encode(), _value(rng, broken=False)[0].encode(), _json(fields)[1:])
    return Case("same key twice", [request(path, body)], statuses=(200,))


def huge(rng: random.Random) -> Case:
    """Far more of something than can be served, or than there is of it."""
    path, fields = _good(rng)
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
    body = _json(fields | rng.choice(list(kinds.values()))())
    return Case("huge", [request(path, body)], statuses=(200, 400, 404))


def method_or_path(rng: random.Random) -> Case:
    """Owed is an answer only where the server can know what was asked."""
    method = rng.choice(METHODS) if rng.random() < 0.5 else rng.choice(["GET", "POST"])
    target = rng.choice(TARGETS) if rng.random() < 0.7 else rng.choice(list(PATHS))
    body = _json(_good(rng)[1])
    # HEAD and CONNECT have answers of their own form; they are read as bytes only
    answers = None if method in ("HEAD", "CONNECT") else 1
    return Case("method or path", [request(target, body, method=method)], answers, method=method)


def header(rng: random.Random) -> Case:
    path, fields = _good(rng)
    head = rng.sample(HEADERS, rng.randrange(1, 3))
    return Case("header", [request(path, _json(fields), *head)], answers=None)


def content_length(rng: random.Random) -> Case:
    """A length that is no number, too small (the rest is read as another request) or too large."""
    path, fields = _good(rng)
    body = _json(fields)
    match rng.randrange(3):
        case 0:
            data = request(path, body, length=rng.choice(LENGTHS))
            return Case("length is no number", [data], answers=None)
        case 1:
            data = request(path, body, length=str(rng.randrange(len(body))))
            return Case("length too small", [data], answers=None)
    data = request(path, body, length=str(len(body) + rng.choice([1, 1000, 10**9, 10**12])))
    return Case("length too large", [data], answers=None, ending=_leave(rng))


def chunked(rng: random.Random) -> Case:
    """`transfer-encoding: chunked`: right, with extensions, or nonsense."""
    path, fields = _good(rng)
    body = _json(fields)
    cut = rng.randrange(1, len(body))
    good = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:cut], body[cut:]))
    head = request(path, b"", "transfer-encoding: chunked", length=None)
    tail, right = rng.choice(
        [
            (good + b"0\r\n\r\n", True),
            (good + b"0\r\na: trailer\r\n\r\n", True),
            (good.replace(b"\r\n", b";x=y\r\n", 1) + b"0\r\n\r\n", True),
            (b"ffffffffffffffff\r\n" + body, False),
            (b"-5\r\nhello\r\n0\r\n\r\n", False),
            (b"5\r\nhelloworld\r\n0\r\n\r\n", False),
            (b"zz\r\n" + rng.randbytes(50), False),
            (rng.randbytes(200), False),
            (b"1;" + b"x" * 100_000 + b"\r\n", False),
        ]
    )
    if right:
        return Case("chunked", [head, tail], statuses=(200,), pause=0.01)
    return Case("chunked nonsense", [head, tail], answers=None, ending=_leave(rng))


def truncated(rng: random.Random) -> Case:
    """A request that ends in the middle."""
    data = request(*_good_body(rng))
    return Case("truncated", [data[: rng.randrange(len(data))]], answers=None, ending=_leave(rng))


def gone(rng: random.Random) -> Case:
    """A whole request whose client does not wait for the answer."""
    path, fields = _good(rng)
    fields |= {"stream": rng.choice(["true", "false"]), _limit(path): "60"}
    pause = rng.choice([0.0, 0.0, 0.02])
    return Case("gone", [request(path, _json(fields)), b""], answers=None, pause=pause, ending=_leave(rng))


def garbage(rng: random.Random) -> Case:
    data = rng.choice([*GARBAGE, rng.randbytes(rng.randrange(1, 2000))])
    return Case("garbage", [data], answers=None, ending=_leave(rng))


def slow_writer(rng: random.Random) -> Case:
    data = request(*_good_body(rng))
    cuts = sorted(rng.randrange(len(data)) for _ in range(rng.randrange(1, 6)))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return Case("slow writer", parts, statuses=(200,), pause=rng.choice([0.0, 0.01, 0.05]))


def slow_reader(rng: random.Random) -> Case:
    path, fields = _good(rng)
    fields |= {"stream": "true", _limit(path): "100", "ignore_eos": "true"}
    return Case("slow reader", [request(path, _json(fields))], statuses=(200,), ending="read slowly")


def pipelined(rng: random.Random) -> Case:
    """Several requests in one piece: as many answers, in their order."""
    bodies = [_good_body(rng) for _ in range(rng.randrange(2, 5))]
    data = [request(*body, close=False) for body in bodies[:-1]] + [request(*bodies[-1])]
    return Case("pipelined", [b"".join(data)], answers=len(bodies), statuses=(200,))


def good(rng: random.Random) -> Case:
    return Case("good", [request(*_good_body(rng))], statuses=(200,))


MAKERS: dict[Callable[[random.Random], Case], float] = {
    one_field: 20,
    several_fields: 8,
    unknown_field: 4,
    message: 10,
    broken_json: 10,
    other_body: 4,
    same_key_twice: 2,
    huge: 1,
    method_or_path: 8,
    header: 8,
    content_length: 4,
    chunked: 4,
    truncated: 4,
    gone: 4,
    garbage: 3,
    slow_writer: 3,
    slow_reader: 1,
    pipelined: 2,
    good: 2,
}
"""Kind of case -> how often, among the others."""


def request(
    path: str,
    body: bytes,
    *headers: str,
    method: str = "POST",
    length: str | None = "right",
    close: bool = True,
) -> bytes:
    """The bytes of a request. `length`: what content-length says, None for no such header."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", "content-type: application/json", *headers]
    if length is not None:
        lines.append(f"content-length: {len(body) if length == 'right' else length}")
    if close:
        lines.append("connection: close")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", errors="replace") + body


def _good(rng: random.Random) -> tuple[str, Fields]:
    path = rng.choice(list(PATHS))
    return path, dict(PATHS[path])


def _limit(path: str) -> str:
    return "max_completion_tokens" if "chat" in path else "max_tokens"


def _good_body(rng: random.Random) -> tuple[str, bytes]:
    path, fields = _good(rng)
    if rng.random() < 0.3:
        fields["stream"] = "true"
    return path, _json(fields)


def _value(rng: random.Random, broken: bool = True) -> tuple[str, bool]:
    """Any value as JSON text, and whether that is JSON at all."""
    if broken and rng.random() < 0.15:
        return rng.choice(BROKEN), False
    kind = rng.choice((NUMBERS, OTHERS, STRINGS))
    text = rng.choice(kind)
    return (json.dumps(text, ensure_ascii=rng.random() < 0.5) if kind is STRINGS else text), True


def _json(fields: Fields) -> bytes:
    return ("{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields.items()) + "}").encode()


def _leave(rng: random.Random) -> Ending:
    return rng.choice(["close", "reset", "half-close"])
