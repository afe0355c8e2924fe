"""What a connection may do: heads without end, requests that never arrive, garbage, pipelining."""

import asyncio
import json
import socket
import threading
import time

import pytest
import uvicorn

from jaxserve.server import protocol

HEAD = b"POST / HTTP/1.1\r\nhost: x\r\n"
BODY = HEAD + b"content-length: 9\r\n\r\nab"


class Web:
    """Uvicorn with our protocol around a small application, in a thread."""

    def __init__(self, app=None):
        self.events: list[str] = []
        self.gate = threading.Event()
        config = uvicorn.Config(
            app or self._app, interface="asgi3", http=protocol.HttpProtocol, lifespan="off", log_config=None
        )
        self._server = uvicorn.Server(config)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],))
        self._thread.start()

    def connect(self) -> socket.socket:
        return socket.create_connection(self._listener.getsockname(), timeout=30)

    def close(self):
        self.gate.set()
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    async def _app(self, scope, receive, send):
        """Says `early` without reading the body, `whole` when it is there, `late` when the gate opens."""
        path = scope["path"]
        while path != "/early":
            message = await receive()
            if message["type"] == "http.disconnect":
                self.events.append(f"gone {path}")
                return
            if not message["more_body"]:
                break
        if path == "/late":
            waiting = asyncio.create_task(asyncio.to_thread(self.gate.wait, 30))
            gone = asyncio.create_task(receive())
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                self.events.append(f"gone {path}")
                self.gate.set()
                return
        body = path.removeprefix("/").encode()
        length = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": body})
        self.events.append(f"done {path}")


@pytest.fixture
def web():
    server = Web()
    yield server
    server.close()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(protocol, "PATIENCE", 0.3)


def read(sock: socket.socket) -> bytes:
    """All until the server closes the connection."""
    received = b""
    try:
        while data := sock.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def error(received: bytes, status: int) -> dict:
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), received[:500]
    assert b"connection: close" in head
    return json.loads(body)["error"]


def test_garbage_gets_an_error_in_openais_shape(web):
    with web.connect() as sock:
        sock.sendall(b"\x16\x03\x01 not HTTP\r\n\r\n")
        assert set(error(read(sock), 400)) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("endless", [b"a: b\r\n", b"b" * 8192], ids=["headers", "one header"])
def test_a_head_without_end_is_refused(web, endless):
    with web.connect() as sock:
        sock.sendall(HEAD + b"a: b")
        with pytest.raises(OSError):  # it closes, long before all of this has been taken
            for _ in range(2**30 // len(endless)):
                sock.sendall(endless)


@pytest.mark.parametrize("path", ["/whole", "/early"])  # not answered, and answered before it had come
def test_headers_after_a_body_have_the_same_limit(web, path):
    head = HEAD.replace(b"/", path.encode(), 1) + b"transfer-encoding: chunked\r\n\r\n"
    with web.connect() as sock:
        sock.sendall(head + b"3\r\n")
        time.sleep(0.05)
        sock.sendall(b"abc\r\n40000\r\n" + b"d" * 0x40000)  # a body may be longer
        time.sleep(0.05)
        sock.sendall(b"\r\n0\r\na: b\r\n\r\n" + head + b"0\r\n")
        with pytest.raises(OSError):
            for _ in range(2**15):
                sock.sendall(b"a: " + b"b" * 8192 + b"\r\n")
    assert web.events[0] == f"done {path}"


def test_a_long_head_in_pieces_says_why(web):
    with web.connect() as sock:
        sock.sendall(HEAD)
        time.sleep(0.05)
        sock.sendall(b"a: " + b"b" * (protocol.MAX_HEAD + 1))
        assert error(read(sock), 431)["code"] == "headers_too_large"


@pytest.mark.parametrize("sent", [b"P", HEAD, BODY], ids=["line", "head", "body"])
def test_a_request_that_never_arrives_is_ended(web, impatient, sent):
    with web.connect() as sock:
        sock.sendall(sent)
        assert error(read(sock), 408)["code"] == "request_timeout"


def test_a_connection_that_says_nothing_is_closed(web, impatient):
    with web.connect() as sock:
        assert read(sock) == b""


def test_bytes_between_requests_keep_no_connection_open(web, impatient):
    with web.connect() as sock:
        sock.sendall(HEAD + b"content-length: 0\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        sock.sendall(b"\r\n")
        assert error(read(sock), 408)


def test_a_slow_request_that_gets_on_is_waited_for(web, impatient, monkeypatch):
    monkeypatch.setattr(protocol, "SLOWEST", 10)
    with web.connect() as sock:
        for byte in HEAD + b"content-length: 5\r\nconnection: close\r\n\r\n12345":
            sock.sendall(bytes([byte]))
            time.sleep(0.01)
        assert read(sock).startswith(b"HTTP/1.1 200 ")


def test_a_long_answer_is_no_slow_request(web, impatient):
    with web.connect() as sock:
        sock.sendall(b"POST /late HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        time.sleep(1.0)
        web.gate.set()
        assert read(sock).endswith(b"\r\n\r\nlate")


def test_a_body_that_is_not_read_is_taken_and_the_next_request_answered(web):
    with web.connect() as sock:
        for _ in range(2):
            sock.sendall(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n")
            assert sock.recv(65536).endswith(b"early")
            sock.sendall(b"x" * 100_000)


def test_one_answer_for_a_request_that_was_answered_before_it_had_come(web, impatient):
    with web.connect() as sock:
        sock.sendall(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n")
        received = read(sock)
        assert received.count(b"HTTP/1.1") == 1 and received.endswith(b"early")


def test_garbage_after_a_request_does_not_take_its_answer(web):
    with web.connect() as sock:
        sock.sendall(b"POST /late HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n\x00garbage\r\n\r\n")
        time.sleep(0.1)
        web.gate.set()
        received = read(sock)
        assert received.count(b"HTTP/1.1") == 1 and received.endswith(b"late")


def test_a_client_that_goes_ends_the_request_that_is_answered_not_only_the_last_one(web, eventually):
    with web.connect() as sock:
        request = b"POST /late HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
        sock.sendall(request + request.replace(b"late", b"next"))
        time.sleep(0.1)
    eventually(lambda: web.events == ["gone /late"])


def test_a_client_that_sends_garbage_and_goes_is_seen_to_go(web, eventually):
    with web.connect() as sock:
        sock.sendall(HEAD.replace(b"/", b"/late", 1) + b"content-length: 0\r\n\r\n")
        time.sleep(0.05)
        for _ in range(2):
            sock.sendall(b"\x16 not HTTP\r\n\r\n")
            time.sleep(0.05)
    eventually(lambda: web.events == ["gone /late"])


def test_the_end_does_not_wait_for_a_request_that_has_not_arrived(web):
    with web.connect() as sock:
        sock.sendall(BODY)
        time.sleep(0.2)
        threading.Thread(target=web.close).start()
        assert error(read(sock), 503)["code"] == "shutting_down"


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no such limit")
def test_a_client_that_takes_nothing_of_its_answer_is_gone(monkeypatch, eventually):
    monkeypatch.setattr(protocol, "STUCK", 0.5)
    ended = threading.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await asyncio.wait_for(_either(receive, send), 60)) != "gone":
            pass
        ended.set()

    async def _either(receive, send):
        gone = asyncio.create_task(receive())
        sent = asyncio.create_task(
            send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        )
        done, _ = await asyncio.wait({gone, sent}, return_when=asyncio.FIRST_COMPLETED)
        if gone in done and gone.result()["type"] == "http.disconnect":
            return "gone"
        gone.cancel()
        return "on"

    web = Web(app)
    try:
        with web.connect() as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert ended.wait(30)
    finally:
        web.close()


def test_parts_of_a_body_go_out_at_once_until_the_client_does_not_keep_up():
    ended = threading.Event()
    taken = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        write = scope["extensions"][protocol.WRITE]
        while write(b"x" * 50_000):
            taken.append(50_000)
        ended.set()
        await send({"type": "http.response.body", "body": b"end", "more_body": False})
        assert not write(b"more")

    web = Web(app)
    try:
        with web.connect() as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert ended.wait(30)
            received = read(sock)
    finally:
        web.close()
    assert taken
    assert received.partition(b"\r\n\r\n")[2] == chunked([b"x" * n for n in taken] + [b"end", b""])


def chunked(parts: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
