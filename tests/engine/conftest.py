from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve import Engine


@pytest.fixture(scope="session")
def make_engine(model_dir: Path) -> Iterator[Callable[..., Engine]]:
    """make_engine(**options): an engine on the tiny Llama in float32, kept for the session."""
    engines: dict[str, Engine] = {}

    def make(**options: Any) -> Engine:
        small = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "num_blocks": 256}
        options = {"model": str(model_dir), "dtype": "float32"} | small | options
        key = repr(sorted(options.items()))
        if key not in engines:
            engines[key] = Engine(**options)
        return engines[key]

    yield make
    for engine in engines.values():
        engine.close()
