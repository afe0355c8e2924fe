"""One case over one real socket, and whether the server's answer to it is right."""

import asyncio
import json
import socket
import struct
from typing import NamedTuple

import h11

from bench.robustness.request import Case

PATIENCE = 120.0
"""Seconds until an answer that does not come counts as missing."""


class Answer(NamedTuple):
    status: int
    body: bytes


async def play(case: Case, host: str, port: int) -> str | None:
    """Send the case; None, or what is wrong with what came back."""
    try:
        received = await asyncio.wait_for(_exchange(case, host, port), PATIENCE)
    except TimeoutError:
        return f"no end after {PATIENCE:.0f} s"
    if case.answers is None and case.method in ("HEAD", "CONNECT"):
        return "a 5xx" if received.startswith(b"HTTP/1.1 5") else None
    try:
        answers = parse(received)
    except h11.RemoteProtocolError as error:
        return None if case.ending in ("close", "reset", "half-close") else f"a broken answer: {error}"
    if case.answers is not None and len(answers) != case.answers:
        return f"{len(answers)} answers, not {case.answers}"
    return next((wrong for answer in answers if (wrong := _wrong(case, answer))), None)


def parse(received: bytes) -> list[Answer]:
    """The answers in a connection's bytes, as a second HTTP implementation reads them."""
    answers = []
    while received:
        connection = expect_answer()
        connection.receive_data(received)
        connection.receive_data(b"")
        status, body = 0, bytearray()
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif not isinstance(event, h11.InformationalResponse):
                raise h11.RemoteProtocolError(f"it ends early ({event})")
        answers.append(Answer(status, bytes(body)))
        received = connection.trailing_data[0]
    return answers


def expect_answer() -> h11.Connection:
    """A client that has sent a request."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
    connection.send(h11.EndOfMessage())
    return connection


async def _exchange(case: Case, host: str, port: int) -> bytes:
    """All that the server sends until it closes the connection, or the client goes away."""
    sock = socket.socket()
    sock.setblocking(False)
    if case.ending == "read slowly":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await asyncio.get_running_loop().sock_connect(sock, (host, port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
    received = bytearray()
    try:
        for part in case.parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(case.pause)
        if case.ending == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif case.ending == "half-close":
            writer.write_eof()
        if case.ending in ("close", "reset"):
            return b""
        while data := await reader.read(512 if case.ending == "read slowly" else 2**16):
            received += data
            if case.ending == "read slowly":
                await asyncio.sleep(0.005)
    except OSError:  # the server would have no more of it
        pass
    finally:
        writer.transport.abort() if case.ending == "reset" else writer.close()
    return bytes(received)


def _wrong(case: Case, answer: Answer) -> str | None:
    told = f"{answer.status} {answer.body[:300]!r}"
    if answer.status >= 500:
        return told
    if case.statuses and answer.status not in case.statuses:
        return f"not one of {case.statuses}: {told}"
    if answer.status >= 400:
        return _wrong_error(case, answer)
    if answer.body.startswith(b"data: "):
        *events, done, end = answer.body.split(b"\n\n")
        if (done, end) != (b"data: [DONE]", b"") or any(b'"error"' in event for event in events):
            return f"a broken stream: {answer.body[-300:]!r}"
    return None


def _wrong_error(case: Case, answer: Answer) -> str | None:
    """An error has OpenAI's shape, says something, blames the right field, and is no page long."""
    told = f"{answer.status} {answer.body[:300]!r}"
    try:
        error = json.loads(answer.body)["error"]
    except (ValueError, LookupError, TypeError):
        return f"not OpenAI's shape: {told}"
    if set(error) != {"message", "type", "param", "code"}:
        return f"not OpenAI's fields: {told}"
    if not isinstance(error["message"], str) or not error["message"] or "Traceback" in error["message"]:
        return f"no message for a person: {told}"
    if answer.status == 400 and case.param and not (error["param"] or "").startswith(case.param):
        return f"blames {error['param']!r}, not {case.param!r}: {told}"
    if len(answer.body) > 5000:
        return f"an error of {len(answer.body)} bytes: {told}"
    return None
