"""A server that streams as its URL says: `http://host:port/MANNER/v1/…`, or plainly without MANNER.

As a script it listens on the port given. A request is answered with `max_tokens` events of one token each,
PAUSE seconds apart, unless the manner says otherwise.
"""

import asyncio
import json
import sys
import threading
from typing import Any

PAUSE = 0.002
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class FakeServer:
    """In a thread of its own. `seen`: (headers, body) of every POST; `most_at_once`: how many overlapped."""

    def __init__(self, port: int = 0):
        self.seen: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.at_once = self.most_at_once = 0
        self._loop = asyncio.new_event_loop()
        serving = asyncio.start_server(self._connected, "127.0.0.1", port)
        self._server = self._loop.run_until_complete(serving)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        answering = asyncio.all_tasks() - {asyncio.current_task()}
        for task in answering:
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.strip().splitlines()
                method, path, _ = first.split(" ")
                headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                manner, _, rest = path.strip("/").partition("v1/")
                manner, what = manner.strip("/") or "ok", rest.split("/")
                chat = what == ["chat", "completions"]
                if method == "GET":
                    self._get(writer, manner, what)
                    continue
                if manner == "leaves":
                    break
                if manner == "hangs":
                    await reader.read()  # until the client leaves
                    break
                self.seen.append((headers, json.loads(body)))
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
                try:
                    if not await self._post(writer, manner, chat, json.loads(body)):
                        break
                finally:
                    self.at_once -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _get(self, writer: asyncio.StreamWriter, manner: str, what: list[str]) -> None:
        if manner == "locked":
            _json(writer, 401, {"error": {"message": "no key"}})
        elif what == ["models"] and manner != "no-models":
            _json(writer, 200, {"data": [{"id": "first"}, {"id": "second"}]})
        else:
            _json(writer, 404, {"error": {"message": "no such route"}})

    async def _post(self, writer: asyncio.StreamWriter, manner: str, chat: bool, body: Any) -> bool:
        """Whether the connection is kept."""
        count = body["max_tokens"]
        usage = {"prompt_tokens": 11, "completion_tokens": count, "total_tokens": 11 + count}
        if manner in ("400", "503"):
            _json(writer, int(manner), {"error": {"message": f"no: {manner}"}})
            return True
        if manner == "whole":
            choice = {"index": 0, "text": " word" * count, "finish_reason": "length"}
            _json(writer, 200, {"choices": [choice], "usage": usage})
            return True
        writer.write(HEAD)
        events = list(_events(manner, chat, count, usage))
        for i, event in enumerate(events):
            line = b"\r\n" if manner == "crlf" else b"\n"
            data = b"data: " + event + line + line
            if manner == "pieces":  # each event in two parts, the second with the next one's begin
                half = len(data) // 2
                _chunk(writer, data[:half])
                await asyncio.sleep(PAUSE)
                _chunk(writer, data[half:] + b": a comment\n")
            else:
                _chunk(writer, data)
            await asyncio.sleep(PAUSE)
            if i == 2 and manner == "cut":
                return False
            if i == 2 and manner == "ends":
                break
        writer.write(b"0\r\n\r\n")
        return True


def _events(manner: str, chat: bool, count: int, usage: dict[str, int]) -> Any:
    def event(text: str, finish: str | None = None) -> bytes:
        part = {"delta": {"content": text}} if chat else {"text": text}
        return json.dumps({"id": "x", "choices": [{"index": 0, **part, "finish_reason": finish}]}).encode()

    each = 2 if manner == "pairs" else 1
    if manner == "error":
        yield event(" word")
        yield json.dumps({"error": {"message": "it broke", "code": 500}}).encode()
        return
    if manner == "garbage":
        yield b"{"
        return
    if chat:
        yield event("")
    for _ in range(count // each):
        yield event(" word" * each)
    yield event("", "length")
    if manner != "no-usage":
        yield json.dumps({"choices": [], "usage": usage}).encode()
    yield b"[DONE]"


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def _json(writer: asyncio.StreamWriter, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


if __name__ == "__main__":
    FakeServer(int(sys.argv[1])).join()
