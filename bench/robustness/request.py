"""A case: bytes and how they are sent. And what all of them are made from: a good request."""

import json
import random
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


def good_fields(rng: random.Random) -> tuple[str, Fields]:
    path = rng.choice(list(PATHS))
    return path, dict(PATHS[path])


def limit(path: str) -> str:
    return "max_completion_tokens" if "chat" in path else "max_tokens"


def good_body(rng: random.Random) -> tuple[str, bytes]:
    path, fields = good_fields(rng)
    if rng.random() < 0.3:
        fields["stream"] = "true"
    return path, to_json(fields)


def to_json(fields: Fields) -> bytes:
    return ("{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields.items()) + "}").encode()


def leave(rng: random.Random) -> Ending:
    return rng.choice(["close", "reset", "half-close"])
