"""Which class serves which architecture."""

import hashlib
import sys
import uuid
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from jaxserve.errors import ModelError

ARCHITECTURES = {
    "LlamaForCausalLM": "jaxserve.models.llama:Llama",
    "MistralForCausalLM": "jaxserve.models.mistral:Mistral",
    "Qwen2ForCausalLM": "jaxserve.models.qwen:Qwen2",
    "Qwen3ForCausalLM": "jaxserve.models.qwen:Qwen3",
    "GemmaForCausalLM": "jaxserve.models.gemma:Gemma",
    "Gemma2ForCausalLM": "jaxserve.models.gemma2:Gemma2",
    "Gemma3ForCausalLM": "jaxserve.models.gemma2:Gemma3",
    "Phi3ForCausalLM": "jaxserve.models.phi3:Phi3",
    "Olmo2ForCausalLM": "jaxserve.models.olmo2:Olmo2",
    "SmolLM3ForCausalLM": "jaxserve.models.smollm3:SmolLM3",
    "Starcoder2ForCausalLM": "jaxserve.models.starcoder2:StarCoder2",
    "GPTNeoXForCausalLM": "jaxserve.models.gpt_neox:GPTNeoX",
    "PhiForCausalLM": "jaxserve.models.phi:Phi",
    "GPT2LMHeadModel": "jaxserve.models.gpt2:GPT2",
    "GPTBigCodeForCausalLM": "jaxserve.models.starcoder:StarCoder",
    "OPTForCausalLM": "jaxserve.models.opt:OPT",
    "FalconForCausalLM": "jaxserve.models.falcon:Falcon",
    "BloomForCausalLM": "jaxserve.models.bloom:Bloom",
    "MptForCausalLM": "jaxserve.models.mpt:MPT",
}


REGISTERED: dict[str, type | str] = {}
"""By `register_model`."""
GROUP = "jaxserve.models"
"""Entry points of installed packages: an architecture = a class."""


def register_model(architecture: str, model: type | str) -> None:
    """Serve checkpoints whose config names that architecture with a class of your own, or `module:Class`.

    It counts for this process, before those of ours: what is served by other processes (`jaxserve serve`) is
    named in an installed package's entry points instead, in the group `jaxserve.models`.
    """
    REGISTERED[architecture] = model


def model_class(config: Mapping[str, Any]) -> type:
    """The class for a checkpoint's config (`architectures`). Raises ModelError naming what is supported."""
    names = config.get("architectures") or []
    known: dict[str, type | str | EntryPoint] = ARCHITECTURES | REGISTERED
    if not any(name in known for name in names):
        known = {point.name: point for point in entry_points(group=GROUP)} | known
    for name in names:
        if name in known:
            return _load(name, known[name])
    wanted = ", ".join(names) or f"model type {config.get('model_type')!r}"
    near = get_close_matches(names[0], known, 1, 0.0) if names else []
    hint = f" (nearest: {near[0]})" if near else ""
    raise ModelError(f"architecture {wanted} is not supported; supported: {', '.join(known)}{hint}")


def code_of(model: type) -> str:
    """A digest of the package that a class is from; empty for ours, whose code is known."""
    package = model.__module__.partition(".")[0]
    if package == "jaxserve":
        return ""
    file = getattr(sys.modules[package], "__file__", None)
    if file is None:  # typed in, so that nobody knows
        return uuid.uuid4().hex
    path = Path(file)
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _load(name: str, model: type | str | EntryPoint) -> type:
    point = EntryPoint(name, model, GROUP) if isinstance(model, str) else model
    try:
        found: type = point.load() if isinstance(point, EntryPoint) else point
    except Exception as error:  # whatever a module does when it is imported
        raise ModelError(f"architecture {name}: {point.value} cannot be imported: {error}") from error
    if not hasattr(found, "Config"):
        raise ModelError(f"architecture {name}: {found!r} has no Config")
    return found
