"""What a section is told, and how it says what it measured."""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ROWS = "rows.jsonl"
LLAMA_8B = ROOT / "tests/configs/llama-3.1-8b.json"
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


class Job(NamedTuple):
    """One section's, in a process of its own."""

    section: str
    out: str
    """Where results go."""
    home: str
    """$JAXSERVE_HOME of all sections: empty at first."""
    began: float
    """When its process was started, in seconds since the epoch."""
    seconds: float
    """Then it is stopped."""
    dry: bool
    attention: str
    """The engine's implementation."""

    @property
    def left(self) -> float:
        return self.began + self.seconds - time.time()

    def emit(self, **row: Any) -> None:
        """A row of the results: kept at once, whatever comes after."""
        append(Path(self.out), {"section": self.section, **row})

    def try_emit(self, row: dict[str, Any], measure: Any) -> None:
        """The row with what `measure` gives, or with why it gives nothing."""
        try:
            row = row | measure()
        except Exception as error:
            row = row | {"absent": reason(error)}
        self.emit(**row)


def append(out: Path, row: dict[str, Any]) -> None:
    with (out / ROWS).open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def reason(error: BaseException) -> str:
    """The first line of what went wrong."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def shape(dry: bool) -> dict[str, Any]:
    """The config of Llama 3.1 8B, or of a toy like it."""
    return json.loads(LLAMA_8B.read_text()) | (TINY if dry else {})


class Model:
    """What a step of the model has to read and to multiply, in 16-bit numbers."""

    def __init__(self, config: dict[str, Any]):
        layers, hidden, wide = (config[f] for f in ("num_hidden_layers", "hidden_size", "intermediate_size"))
        dim = config.get("head_dim") or hidden // config["num_attention_heads"]
        self._q, self._kv = dim * config["num_attention_heads"], dim * config["num_key_value_heads"]
        self._layers, self._head = layers, hidden * config["vocab_size"]
        self._body = layers * hidden * (2 * self._q + 2 * self._kv + 3 * wide)

    def decode(self, sequences: int, context: float) -> dict[str, float]:
        """A token for each: weights and keys and values read once."""
        numbers = self._body + self._head + 2 * sequences * context * self._layers * self._kv
        products = self._body + self._head + 2 * self._layers * self._q * context
        return {"GB": 2e-9 * numbers, "TFLOP": 2e-12 * sequences * products}

    def prefill(self, sequences: int, rows: int) -> dict[str, float]:
        """Prompts of `rows` tokens and a token after each."""
        products = rows * (self._body + self._layers * self._q * (rows + 1)) + self._head
        numbers = self._body + self._head + 2 * sequences * rows * self._layers * self._kv
        return {"GB": 2e-9 * numbers, "TFLOP": 2e-12 * sequences * products}
