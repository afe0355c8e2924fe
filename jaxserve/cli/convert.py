"""`jaxserve convert SOURCE DEST`: a model as a directory with an Orbax checkpoint."""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from jaxserve.cli.flags import Parser
from jaxserve.errors import ConfigError


def parser() -> Parser:
    parser = Parser(
        prog="jaxserve convert",
        description="Write a model with its tensors in Orbax, JAX's own format: under the names and with\n"
        "the shapes that they have in SOURCE, so that it can be served on any mesh.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a model as --model takes it")
    parser.add_argument("dest", metavar="DEST", type=Path, help="a directory that does not exist yet")
    return parser


def run(args: argparse.Namespace) -> int:
    dest: Path = args.dest
    if dest.exists():
        raise ConfigError(f"{dest} is there already: give a directory that is not")
    from jaxserve.loading.hub import resolve

    source = resolve(args.source)
    dest.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{dest.name}.part-", dir=dest.parent))
    try:
        _write(source, work)
        work.chmod(0o755)
        work.rename(dest)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(dest)
    return 0


def _write(source: Path, place: Path) -> None:
    from jaxserve.loading.checkpoint import GENERATION_CONFIG, ORBAX, GGUFCheckpoint, open_checkpoint
    from jaxserve.loading.orbax_directory import save

    checkpoint = open_checkpoint(source)
    if isinstance(checkpoint, GGUFCheckpoint):
        _write_tokenizer(checkpoint.path, place)
        ends = {"eos_token_id": checkpoint.eos_token_ids}
        (place / GENERATION_CONFIG).write_text(json.dumps(ends | checkpoint.sampling_defaults()))
        (place / "config.json").write_text(json.dumps(checkpoint.config))
    else:
        from jaxserve.loading.huggingface import BESIDE_WEIGHTS

        for file in source.iterdir():
            if file.name.endswith(BESIDE_WEIGHTS) and not file.name.endswith(".index.json"):
                shutil.copy(file, place)
    save(place / ORBAX.whole, {name: checkpoint.tensor(name) for name in checkpoint.shapes()})


def _write_tokenizer(path: Path, place: Path) -> None:
    from jaxserve.text.tokenizer import load_tokenizer

    if tokenizer := load_tokenizer(path):
        tokenizer.backend.save(str(place / "tokenizer.json"))
        (place / "tokenizer_config.json").write_text(json.dumps(tokenizer.info()))
