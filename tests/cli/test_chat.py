"""`jaxserve chat` against a server of its own kind, and with the real model in its process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxserve.cli import main
from jaxserve.cli.talk import LocalModel, Meter
from jaxserve.config import EngineConfig
from jaxserve.errors import InvalidRequest


class Echo(BaseHTTPRequestHandler):
    """Streams the last message back word by word; some words mean trouble."""

    def do_GET(self):
        self.reply(200, {"data": [{"id": "echo"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.headers["Authorization"], body))
        text = body["messages"][-1]["content"]
        if text == "!":
            self.reply(400, {"error": {"message": "no shouting", "type": "invalid_request_error"}})
            return
        self.send_response(200)
        self.end_headers()
        self.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for word in text.split():
            self.event({"choices": [{"delta": {"content": word + " "}}]})
            if word == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
                self.chatter()
                return
            if word == "broken":
                self.event({"error": {"message": "the engine died"}})
                return
        self.event({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 22}})
        self.wfile.write(b": keep-alive\n\ndata: [DONE]\n\n")

    def chatter(self):
        """Talk on until the client hangs up."""
        try:
            for _ in range(2000):
                self.event({"choices": [{"delta": {"content": "la "}}]})
                time.sleep(0.005)
        except OSError:
            self.server.hung_up.set()

    def event(self, event):
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def reply(self, status, content):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        server.seen, server.hung_up = [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def chat(server, monkeypatch, capsys, tmp_path):
    """Say these lines to the server; exit code, stdout, stderr and the requests it saw."""

    def chat(*lines, flags=(), url=""):
        script = tmp_path / "lines"
        script.write_text("\n".join(lines))
        with script.open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            code = main(["chat", "--url", server.url + url, *flags])
        return code, *capsys.readouterr(), server.seen

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return chat


def roles(body):
    return [(message["role"], message["content"].strip()) for message in body["messages"]]


def test_answers_stream_and_the_history_goes_along(chat):
    code, out, _, seen = chat("one two", "", "three", flags=["--system", "be brief"], url="/v1/")
    assert (code, out) == (0, "one two \nthree \n")
    assert [key for key, _ in seen] == [None, None]
    assert seen[0][1]["model"] == "echo"
    assert not {"temperature", "max_tokens"} & seen[0][1].keys(), "the server knows its model's defaults"
    assert roles(seen[1][1]) == [
        ("system", "be brief"),
        ("user", "one two"),
        ("assistant", "one two"),
        ("user", "three"),
    ]


def test_commands(chat):
    lines = ["one", "/reset", "two", "/system be kind", "three", "/stats", "/what", "/exit", "four"]
    code, out, err, seen = chat(*lines)
    assert (code, out) == (0, "one \ntwo \nthree \n")
    assert roles(seen[1][1]) == [("user", "two")]
    assert roles(seen[2][1]) == [("system", "be kind"), ("user", "three")]
    assert "prompt: 11 tokens" in err
    assert "answer: 22 tokens" in err
    assert "unknown command /what" in err


def test_key_and_options_reach_the_server(chat, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    flags = ["named", "--temperature", "0", "--max-tokens", "9"]
    chat("hi", flags=flags)
    _, _, _, seen = chat("hi", flags=[*flags, "--api-key", "from-flag"])
    assert [key for key, _ in seen] == ["Bearer from-environment", "Bearer from-flag"]
    body = seen[0][1]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("named", 0.0, 9)


@pytest.mark.parametrize(
    ("line", "said"),
    [("!", "answered 400: no shouting"), ("so broken", "the engine died")],
)
def test_an_error_ends_a_piped_chat_in_one_line(chat, server, line, said):
    code, _, err, _ = chat(line, "never asked")
    assert code == 1
    assert err == f"jaxserve: {server.url}{': ' if 'engine' in said else ' '}{said}\n"


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(chat, server):
    before = signal.getsignal(signal.SIGINT)
    code, out, _, seen = chat("one interrupt two", "next")
    assert code == 0
    assert server.hung_up.wait(20)
    assert out.startswith("one ")
    assert "two" not in out
    assert out.endswith("\nnext \n")
    assert roles(seen[1][1])[1] == ("assistant", out.splitlines()[0].strip())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_meter_counts_from_the_first_token():
    meter = Meter(3)
    assert meter.report() == {"answer": "none yet"}
    meter.count(1)
    meter.count(4)
    assert meter.report()["answer"] == "5 tokens"
    assert meter.report()["prompt"] == "3 tokens"


def test_a_model_here_samples_as_its_makers_recommend_and_as_the_flags_say(model_dir, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.25, "top_p": 0.75}')
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "num_blocks": 33, "dtype": "float32"}
    config = EngineConfig(model=str(model_dir), generation_config=str(tmp_path), **small)
    with closing(LocalModel(config, {"temperature": 1.0})) as talk:
        assert (talk.params.temperature, talk.params.top_p, talk.params.max_tokens) == (1.0, 0.75, None)


def test_a_wrong_flag_is_said_before_the_model_is_loaded():
    with pytest.raises(InvalidRequest, match="temperature must be between"):
        LocalModel(EngineConfig(model="/there/is/none"), {"temperature": -1.0})


def test_the_real_model_in_this_process(default_model):
    lines = "What is the capital of France?\n/stats\n/exit\n"
    command = [sys.executable, "-m", "jaxserve", "chat", str(default_model), "--temperature", "0"]
    flags = ["--max-tokens", "24", "--max-model-len", "512", "--max-num-seqs", "4"]
    done = subprocess.run([*command, *flags], input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "answer: " in done.stderr
