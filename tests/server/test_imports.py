"""What the HTTP process imports: its engine's process begins before the HTTP side, and jax is not its own."""

import json
import subprocess
import sys

import pytest

BEFORE_THE_ENGINE = "import jaxserve.server.main"
ALL = """
import asyncio
from jaxserve.config import ServerConfig
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.messages import Hello
from jaxserve.server import main
config = ServerConfig(model={model!r})
engine = AsyncEngine(config, replicas=[])
main._make_web(config, engine)
engine._path, engine._text.tokenizer.encode("text")
engine._make_processor(Hello(max_model_len=8, max_request_tokens=8, vocab_size=8))
"""


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        (BEFORE_THE_ENGINE, ("uvicorn", "starlette", "numpy", "tokenizers", "prometheus_client")),
        (ALL, ("jax", "jaxlib", "flax", "transformers", "torch", "huggingface_hub", "gguf")),
    ],
    ids=["before the engine's process begins", "in all"],
)
def test_what_is_not_needed_is_not_imported(default_model, code, unwanted):
    code = code.replace("{model!r}", repr(str(default_model)))
    code += f"\nimport json, sys\nprint(json.dumps([m for m in {unwanted!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
