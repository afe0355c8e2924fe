"""Open a model: its config, its end-of-sequence tokens, and its tensors under Hugging Face's names."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from jaxserve.errors import ModelError

INDEX = "model.safetensors.index.json"
GGUF_ENDS = ("eos", "eot", "eom")


class Checkpoint(ABC):
    """A model on disk. Tensors are memory-mapped where the format allows it."""

    path: Path
    config: dict[str, Any]
    """The keys of a `config.json`."""
    eos_token_ids: list[int]
    """Every token that ends a generation."""

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all tensors by name, from headers alone."""

    @abstractmethod
    def tensor(self, name: str) -> np.ndarray:
        """One tensor; quantised ones as float32."""

    @abstractmethod
    def source(self, name: str) -> str:
        """The file that holds the tensor."""


def open_checkpoint(path: Path | str) -> Checkpoint:
    """A .gguf file, a directory with one, or a directory with safetensors. Raises ModelError."""
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if not path.is_dir():
        raise ModelError(f"{path} is neither a model directory nor a .gguf file")
    if (path / "config.json").exists():
        return SafetensorsCheckpoint(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"{path} has no config.json and {len(files)} .gguf files; one of them is needed")
    return GGUFCheckpoint(files[0])


class GGUFCheckpoint(Checkpoint):
    def __init__(self, path: Path):
        from jaxserve.loading import gguf_llama
        from jaxserve.loading.gguf_file import GGUFFile

        self.path = path
        self._file = GGUFFile(path)
        meta = self._file.metadata
        if (architecture := meta.get("general.architecture")) != "llama":
            raise ModelError(f"{path} is of architecture {architecture!r}; supported in GGUF: llama")
        self._family = gguf_llama
        self._names = gguf_llama.names(self._file)
        self.config = gguf_llama.config(self._file)
        ids = (meta.get(f"tokenizer.ggml.{kind}_token_id") for kind in GGUF_ENDS)
        self.eos_token_ids = _ids(ids)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._file.tensors[theirs].shape for name, theirs in self._names.items()}

    def tensor(self, name: str) -> np.ndarray:
        value = self._file.dequantised(self._names[name])
        return self._family.to_half_split(name, value, self.config)

    def source(self, name: str) -> str:
        return self.path.name


class SafetensorsCheckpoint(Checkpoint):
    def __init__(self, path: Path):
        self.path = path
        self.config = _read_json(path / "config.json")
        optional = path / "generation_config.json"
        generation = _read_json(optional) if optional.exists() else {}
        self.eos_token_ids = _ids([generation.get("eos_token_id"), self.config.get("eos_token_id")])
        self._files = {file: _open(path / file) for file in self._file_names()}
        self._file_of = {name: file for file, opened in self._files.items() for name in opened.keys()}
        self._check_index()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(self._files[file].get_slice(name).get_shape()) for name, file in self._file_of.items()
        }

    def tensor(self, name: str) -> np.ndarray:
        import ml_dtypes  # noqa: F401  numpy needs to know bfloat16

        value: np.ndarray = self._files[self._file_of[name]].get_tensor(name)
        return value

    def source(self, name: str) -> str:
        return self._file_of[name]

    def _file_names(self) -> list[str]:
        if (self.path / INDEX).exists():
            names = sorted(set(_read_json(self.path / INDEX).get("weight_map", {}).values()))
        else:
            names = sorted(file.name for file in self.path.glob("*.safetensors"))
        if not names:
            raise ModelError(f"{self.path} has no .safetensors files")
        return names

    def _check_index(self) -> None:
        if not (self.path / INDEX).exists():
            return
        for name, file in _read_json(self.path / INDEX)["weight_map"].items():
            if self._file_of.get(name) != file:
                raise ModelError(f"{INDEX} says that tensor {name} is in {file}, and it is not")


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None


def _ids(values: Iterable[int | list[int] | None]) -> list[int]:
    """Token ids, from single ones, lists and nothing, each once."""
    found: list[int] = []
    for value in values:
        found += value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(found))
