"""Open a model: its config, its end-of-sequence tokens, and its tensors under Hugging Face's names."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import DTypeLike

from jaxserve.errors import ModelError
from jaxserve.loading import sampling_defaults
from jaxserve.loading.sampling_defaults import GENERATION_CONFIG, SamplingDefaults

if TYPE_CHECKING:
    from jaxserve.loading.orbax_directory import OrbaxDirectory
    from jaxserve.loading.safetensors_file import SafetensorsFile
    from jaxserve.loading.torch_file import TorchFile

NO_NUMBER = re.compile(rb'"([^"]+)"\s*:\s*(-?(?:NaN|Infinity))')
"""Python writes these, and JSON has none of them."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "num_kv_heads")
FLOATS = ("F64", "F32", "F16", "BF16")
GGUF_ENDS = ("eos", "eot", "eom")

T = TypeVar("T")


class Format(NamedTuple):
    """How transformers names the files of a model's tensors."""

    whole: str
    """The one that holds all."""
    parts: str
    """A pattern for all of them."""

    @property
    def index(self) -> str:
        """The file that says which part holds which tensor."""
        return f"{self.whole}.index.json"


SAFETENSORS = Format("model.safetensors", "*.safetensors")
TORCH = Format("pytorch_model.bin", "pytorch_model*.bin")
ORBAX = Format("orbax", "orbax")
INDEX = SAFETENSORS.index


class Checkpoint(ABC):
    """A model on disk. Nothing but headers is read before a tensor is asked for."""

    path: Path
    config: dict[str, Any]
    """The keys of a `config.json`."""
    eos_token_ids: list[int]
    """Every token that ends a generation."""

    @abstractmethod
    def sampling_defaults(self) -> SamplingDefaults:
        """What the model's makers recommend. Logs what of it is not used."""

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all tensors by name, from headers alone."""

    @abstractmethod
    def tensor(self, name: str, dtype: DTypeLike = np.float32) -> np.ndarray:
        """One tensor in the type it is stored in; a quantised one as `dtype`."""

    @abstractmethod
    def source(self, name: str) -> str:
        """The file that holds the tensor."""

    def check_counts(self) -> None:
        """Refuse counts of layers and heads that cannot be, before a model is built as large as they say."""
        shapes = self.shapes()
        largest = max((size for shape in shapes.values() for size in shape), default=0)
        for keys, most, what in (LAYERS, len(shapes), "tensors"), (HEADS, largest, "numbers in a row"):
            for key in keys:
                if isinstance(count := self.config.get(key), int) and count > most:
                    raise ModelError(f"{self.path} says {key} {count}, and has {most} {what}")


def open_checkpoint(path: Path | str, tensors: bool = True) -> Checkpoint:
    """A .gguf file, a directory with one, or one with safetensors, .bin files or Orbax. Raises ModelError.

    Without `tensors` a directory needs no more than its config.json, and the checkpoint has no tensors.
    """
    checkpoint = _open(Path(path), tensors)
    if tensors:
        checkpoint.check_counts()
    return checkpoint


def _open(path: Path, tensors: bool) -> Checkpoint:
    if path.is_file() and path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if not path.is_dir():
        raise ModelError(f"{path} is neither a model directory nor a .gguf file")
    files = sorted(path.glob("*.gguf"))
    if (path / "config.json").exists() and (format_in(path) or not files):
        return DirectoryCheckpoint(path, tensors)
    if len(files) != 1:
        hint = ": give the path of one" if files else ""
        raise ModelError(
            f"{path} has no .safetensors or {TORCH.whole} with a config.json, "
            f"and {len(files)} .gguf files{hint}"
        )
    return GGUFCheckpoint(files[0])


def format_in(path: Path) -> Format | None:
    """Of a directory's tensors: safetensors where there are several."""
    return next((form for form in (SAFETENSORS, TORCH, ORBAX) if any(path.glob(form.parts))), None)


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a model's config, or of a .json file that stands for one. Raises ModelError."""
    if path.suffix == ".json":
        return _read_json(path, dict[str, Any])
    return open_checkpoint(path, tensors=False).config


class GGUFCheckpoint(Checkpoint):
    """Tensors that the file does not quantise are views of it; `tensor` makes the others anew."""

    def __init__(self, path: Path):
        from jaxserve.loading.gguf_file import GGUFFile
        from jaxserve.loading.gguf_model import describe

        self.path = path
        self._file = GGUFFile(path)
        meta = self._file.metadata
        if (parts := meta.get("split.count", 1)) not in (0, 1):
            raise ModelError(f"{path} is one of {parts} parts: join them with llama-gguf-split --merge")
        self._model = describe(self._file)
        self.config = self._model.config
        self.eos_token_ids = _ids(meta.get(f"tokenizer.ggml.{kind}_token_id") for kind in GGUF_ENDS)

    def sampling_defaults(self) -> SamplingDefaults:
        return sampling_defaults.from_gguf(self._file.metadata, self.path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._file.tensors[theirs].shape for name, theirs in self._model.names.items()}

    def tensor(self, name: str, dtype: DTypeLike = np.float32) -> np.ndarray:
        return self._model.as_saved(name, self._file.dequantised(self._model.names[name], dtype))

    def source(self, name: str) -> str:
        return f"{self.path.name} ({self._model.names[name]})"


class DirectoryCheckpoint(Checkpoint):
    """Tensors are views of the memory-mapped files."""

    def __init__(self, path: Path, tensors: bool = True):
        self.path = path
        self.config = _read_json(path / "config.json", dict[str, Any])
        optional = path / GENERATION_CONFIG
        self._generation = _read_json(optional, dict[str, Any]) if optional.exists() else {}
        self.eos_token_ids = _ids([self._generation.get("eos_token_id"), self.config.get("eos_token_id")])
        self._files = _open_files(path) if tensors else {}
        self._file_of = {name: file for file, opened in self._files.items() for name in opened.entries}

    def sampling_defaults(self) -> SamplingDefaults:
        return sampling_defaults.from_generation_config(self._generation, self.path / GENERATION_CONFIG)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._files[file].entries[name].shape for name, file in self._file_of.items()}

    def tensor(self, name: str, dtype: DTypeLike = np.float32) -> np.ndarray:
        file = self._files[self._file_of[name]]
        if (kind := file.entries[name].dtype) not in FLOATS:
            known = ", ".join(FLOATS)
            raise ModelError(f"tensor {name} in {file.path} has type {kind}; supported: {known}")
        return file.tensor(name)

    def source(self, name: str) -> str:
        return self._file_of[name]


class Index(msgspec.Struct):
    """Which file of a sharded checkpoint holds which tensor."""

    weight_map: dict[str, str]


def _open_files(path: Path) -> "Mapping[str, SafetensorsFile | TorchFile | OrbaxDirectory]":
    """The files of a directory's tensors, by their names."""
    from jaxserve.loading.orbax_directory import OrbaxDirectory
    from jaxserve.loading.safetensors_file import SafetensorsFile
    from jaxserve.loading.torch_file import TorchFile

    form = format_in(path) or SAFETENSORS
    if form is ORBAX:
        return {form.whole: OrbaxDirectory(path / form.whole)}
    index = _index(path / form.index)
    names = dict.fromkeys(index.values()) or _files(path, form)
    opened = {file: (SafetensorsFile if form is SAFETENSORS else TorchFile)(path / file) for file in names}
    for name, file in index.items():
        if name not in opened[file].entries:
            raise ModelError(f"{path / form.index} says that tensor {name} is in {file}, and it is not")
    return opened


def _files(path: Path, form: Format) -> list[str]:
    """The files of a directory without an index."""
    if (path / form.whole).exists():
        return [form.whole]
    if not (names := sorted(file.name for file in path.glob(form.parts))):
        torch = any(any(path.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth"))
        hint = f"; of PyTorch's files, {TORCH.whole} and its parts are read" if torch else ""
        raise ModelError(f"{path} has no .safetensors files{hint}")
    return names


def _index(path: Path) -> dict[str, str]:
    """File of each tensor; empty without an index."""
    if not path.exists():
        return {}
    found = _read_json(path, Index).weight_map
    for file in found.values():
        if Path(file).name != file:
            raise ModelError(f"{path} leads out of its directory: {file}")
    if not found:
        raise ModelError(f"{path} names no tensor")
    return found


def _read_json(path: Path, kind: type[T]) -> T:
    text = b""
    try:
        text = path.read_bytes()
        return msgspec.json.decode(text, type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        if found := NO_NUMBER.search(text):
            key, value = (part.decode(errors="replace") for part in found.groups())
            raise ModelError(f"{path}: {key} is {value}, which is no number") from None
        raise ModelError(f"{path} cannot be read: {error}") from None


def _ids(values: Iterable[Any]) -> list[int]:
    """Token ids, from single ones, lists and nothing, each once."""
    found: list[int] = []
    for value in values:
        found += value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(found))
