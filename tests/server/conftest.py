import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

HERE = Path(__file__).parent
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|fails|>"]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A tiny random Llama with a byte-level tokenizer: six special tokens, then one per byte."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("model") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": SPECIAL[0], "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


class Server:
    """A server in a process of its own, on a free port."""

    def __init__(self, command: list[str], config: dict, env: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"} | env,
        )
        self.key = (config.get("api_key") or ["none"])[0]

    def wait_ready(self) -> "Server":
        line = self.process.stdout.readline()
        assert "listens on" in line, self.process.communicate()
        self.line = line
        self.url = next(word for word in line.split() if word.startswith("http://"))
        headers = {"authorization": f"Bearer {self.key}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60)
        return self

    def engine_pids(self) -> list[int]:
        pid = self.process.pid
        return [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.out, self.err = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return self.process.returncode


@pytest.fixture(scope="session")
def launch(model_dir):
    """Starts servers with the fake core; ends them with the session."""
    servers: list[Server] = []

    def start(config: dict | None = None, **env: str) -> Server:
        config = {"model": str(model_dir), "port": 0} | (config or {})
        servers.append(Server([str(HERE / "fake_server.py"), json.dumps(config)], config, env))
        return servers[-1]

    yield start
    for server in servers:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def real_server(model_dir):
    """`jaxserve serve` with the tiny Llama and nothing faked."""
    command = ["-m", "jaxserve", "serve", str(model_dir), "--port", "0", "--dtype", "float32"]
    server = Server([*command, "--max-num-seqs", "8"], {}, {})
    yield server.wait_ready()
    server.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def journal(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("journal") / "journal"
    path.touch()
    return path


@pytest.fixture(scope="session")
def server(launch, journal) -> Server:
    """The server that most tests share."""
    config = {"served_model_name": ["tiny", "also-tiny"], "max_body_size": 200_000}
    return launch(config, FAKE_STEP_SECONDS="0.002", FAKE_JOURNAL=str(journal)).wait_ready()


@pytest.fixture
def http(server) -> httpx.Client:
    return server.http


@pytest.fixture(scope="session")
def eventually():
    def wait(condition, seconds: float = 30.0):
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(0.02)
        return value

    return wait
