"""Requests that are wrong around their body: methods, paths, headers, framing, timing, clients that leave."""

import random

from bench.robustness.request import PATHS, Case, good_body, good_fields, leave, limit, request, to_json

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


def method_or_path(rng: random.Random) -> Case:
    """Owed is an answer only where the server can know what was asked."""
    method = rng.choice(METHODS) if rng.random() < 0.5 else rng.choice(["GET", "POST"])
    target = rng.choice(TARGETS) if rng.random() < 0.7 else rng.choice(list(PATHS))
    body = to_json(good_fields(rng)[1])
    # HEAD and CONNECT have answers of their own form; they are read as bytes only
    answers = None if method in ("HEAD", "CONNECT") else 1
    return Case("method or path", [request(target, body, method=method)], answers, method=method)


def header(rng: random.Random) -> Case:
    path, fields = good_fields(rng)
    head = rng.sample(HEADERS, rng.randrange(1, 3))
    return Case("header", [request(path, to_json(fields), *head)], answers=None)


def content_length(rng: random.Random) -> Case:
    """A length that is no number, too small (the rest is read as another request) or too large."""
    path, fields = good_fields(rng)
    body = to_json(fields)
    match rng.randrange(3):
        case 0:
            data = request(path, body, length=rng.choice(LENGTHS))
            return Case("length is no number", [data], answers=None)
        case 1:
            data = request(path, body, length=str(rng.randrange(len(body))))
            return Case("length too small", [data], answers=None)
    data = request(path, body, length=str(len(body) + rng.choice([1, 1000, 10**9, 10**12])))
    return Case("length too large", [data], answers=None, ending=leave(rng))


def chunked(rng: random.Random) -> Case:
    """`transfer-encoding: chunked`: right, with extensions, or nonsense."""
    path, fields = good_fields(rng)
    body = to_json(fields)
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
    return Case("chunked nonsense", [head, tail], answers=None, ending=leave(rng))


def truncated(rng: random.Random) -> Case:
    """A request that ends in the middle."""
    data = request(*good_body(rng))
    return Case("truncated", [data[: rng.randrange(len(data))]], answers=None, ending=leave(rng))


def gone(rng: random.Random) -> Case:
    """A whole request whose client does not wait for the answer."""
    path, fields = good_fields(rng)
    fields |= {"stream": rng.choice(["true", "false"]), limit(path): "60"}
    pause = rng.choice([0.0, 0.0, 0.02])
    return Case("gone", [request(path, to_json(fields)), b""], answers=None, pause=pause, ending=leave(rng))


def garbage(rng: random.Random) -> Case:
    data = rng.choice([*GARBAGE, rng.randbytes(rng.randrange(1, 2000))])
    return Case("garbage", [data], answers=None, ending=leave(rng))


def slow_writer(rng: random.Random) -> Case:
    data = request(*good_body(rng))
    cuts = sorted(rng.randrange(len(data)) for _ in range(rng.randrange(1, 6)))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return Case("slow writer", parts, statuses=(200,), pause=rng.choice([0.0, 0.01, 0.05]))


def slow_reader(rng: random.Random) -> Case:
    path, fields = good_fields(rng)
    fields |= {"stream": "true", limit(path): "100", "ignore_eos": "true"}
    return Case("slow reader", [request(path, to_json(fields))], statuses=(200,), ending="read slowly")


def pipelined(rng: random.Random) -> Case:
    """Several requests in one piece: as many answers, in their order."""
    bodies = [good_body(rng) for _ in range(rng.randrange(2, 5))]
    data = [request(*body, close=False) for body in bodies[:-1]] + [request(*bodies[-1])]
    return Case("pipelined", [b"".join(data)], answers=len(bodies), statuses=(200,))


def good(rng: random.Random) -> Case:
    return Case("good", [request(*good_body(rng))], statuses=(200,))
