"""A file that is read is in memory no longer than it is looked at."""

import gc
import io
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tqdm

from jaxserve.config import EngineConfig
from jaxserve.engine.devices import make_mesh
from jaxserve.engine.model import LoadedModel
from jaxserve.loading.checkpoint import open_checkpoint
from jaxserve.loading.mapped import MappedFile

MAPS = Path("/proc/self/smaps")
pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="Linux says which pages of a file are in memory")


def in_memory(path: Path) -> int | None:
    """Bytes of a file that this process has in memory; None where it is not mapped."""
    found = None
    for line in MAPS.read_text().splitlines():
        if str(path) in line:
            found = 0
        elif found is not None and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    return found


def test_pages_go_with_the_last_view(tmp_path):
    path, size = tmp_path / "numbers", 2**22
    np.arange(size // 4, dtype=np.int32).tofile(path)
    file = MappedFile(path)
    half = file.numbers(np.int32, size // 8, 100)
    part = half.reshape(2, -1)[1:, 3::5]
    assert half.sum() > 0 and in_memory(path) >= size // 4  # a system short of memory takes some away
    held = half[0]
    del half
    assert part.any() and in_memory(path) >= size // 8
    del part
    assert in_memory(path) < size // 8
    assert file.numbers(np.int32, 1, 100)[0] == held == 25


def test_a_loaded_model_leaves_its_file(make_llama, tmp_path):
    path = make_llama(tmp_path.name) / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    # jax keeps arrays that begin at a multiple of 64 as they are
    header = whole[8 : 8 + length] + b" " * (-(8 + length) % 64)
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])

    checkpoint = open_checkpoint(path.parent)
    model = LoadedModel(checkpoint.config, make_mesh(EngineConfig(), 0), np.dtype("float32"))
    assert all(checkpoint.tensor(name).ctypes.data % 64 == 0 for name in checkpoint.shapes())
    model.load(checkpoint)
    assert in_memory(path) is not None
    del checkpoint
    jax.block_until_ready(model.weights)
    gc.collect()  # when jax lets go of what it has copied
    assert in_memory(path) is None


def test_a_load_shows_how_far_it_is(model_dir, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = Terminal()
    always = {"file": shown, "delay": 0, "mininterval": 0}
    monkeypatch.setattr(tqdm, "tqdm", lambda bar=tqdm.tqdm, **options: bar(**options | always))
    checkpoint = open_checkpoint(model_dir)
    model = LoadedModel(checkpoint.config, make_mesh(EngineConfig(), 0), np.dtype("float32"))
    model.load(checkpoint)
    steps = re.findall(r"weights: +(\d+)%", shown.getvalue())
    assert steps[-1] == "100" and len(set(steps)) > 5
