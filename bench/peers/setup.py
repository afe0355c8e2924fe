"""What the comparison needs, made once: each peer's environment, and the default model as it reads it."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from bench.peers.catalogue import Peer, Shelf
from bench.peers.process import InPython, PeerFailed


def export(shelf: Shelf) -> None:
    """The default model, as its GGUF and as bf16 safetensors of the same, dequantised weights."""
    if shelf.weights.exists():
        return
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from jaxserve.config import DEFAULT_MODEL
    from jaxserve.loading.checkpoint import open_checkpoint
    from jaxserve.loading.hub import resolve
    from jaxserve.text.tokenizer import load_tokenizer

    source = resolve(DEFAULT_MODEL).resolve()
    checkpoint, tokenizer = open_checkpoint(source), load_tokenizer(source)
    shelf.root.mkdir(parents=True, exist_ok=True)
    shelf.gguf.unlink(missing_ok=True)
    shelf.gguf.symlink_to(source)
    made = shelf.weights.with_suffix(".part")
    made.mkdir(exist_ok=True)
    tensors = {n: np.asarray(checkpoint.tensor(n)).astype(ml_dtypes.bfloat16) for n in checkpoint.shapes()}
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template}
    (made / "config.json").write_text(json.dumps(checkpoint.config | {"dtype": "bfloat16"}))
    (made / "tokenizer_config.json").write_text(json.dumps(names | tokenizer.named))
    tokenizer.backend.save(str(made / "tokenizer.json"))
    made.rename(shelf.weights)


def make(peer: Peer) -> None:
    """Install a peer and generate a token with it, unless that was done. Raises PeerFailed."""
    mark, recipe = peer.folder / "made", repr((peer.packages, peer.unwanted, peer.source))
    if peer.packages and mark.exists() and mark.read_text() == recipe:
        return
    shutil.rmtree(peer.folder, ignore_errors=True)
    peer.folder.mkdir(parents=True)
    log = peer.folder / "setup.log"
    print(f"{peer.name}: setting it up", flush=True)
    if peer.packages:
        _install(peer, log)
    peer.finish(partial(_run, log))
    running = InPython(peer, 1, {}, log)  # proves that it works, and leaves in its caches what it compiles
    try:
        running.first_token()
        running.settle()
    finally:
        running.stop()
    mark.write_text(recipe)


def _install(peer: Peer, log: Path) -> None:
    run = partial(_run, log)
    run(sys.executable, "-m", "venv", peer.folder / "env")
    run(peer.python, "-m", "pip", "install", *peer.packages)
    if peer.unwanted:
        run(peer.python, "-m", "pip", "uninstall", "--yes", *peer.unwanted)


def _run(log: Path, *command: str | Path, path: Path | None = None) -> None:
    """Raises PeerFailed."""
    where = {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"} if path else {}
    with log.open("ab") as file:
        done = subprocess.run(list(map(str, command)), stdout=file, stderr=file, env=os.environ | where)
    if done.returncode:
        raise PeerFailed(f"{Path(command[0]).name} exited with {done.returncode} (see {log})")
