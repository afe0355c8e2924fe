"""Names that vLLM gives to options: translated to ours, or refused by name. Nothing is ignored."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.options import describe

RENAMED = {
    "gpu_memory_utilization": "memory_fraction",
    "num_gpu_blocks_override": "num_blocks",
    "async_scheduling": "overlap",
}
MESH = ("tensor_parallel_size", "data_parallel_size")
VALUES = {
    "dtype": {"half": "float16", "float": "float32"},
    "kv_cache_dtype": {"fp8_e4m3": "fp8"},
    "generation_config": {"vllm": "none"},
}


class Fixed(NamedTuple):
    """An option with one possible value here."""

    value: bool | int | str | None
    why: str


FIXED = {
    "enable_chunked_prefill": Fixed(True, "prefill always shares its steps with decoding"),
    "enforce_eager": Fixed(False, "every step is a compiled program"),
    "trust_remote_code": Fixed(False, "code from a checkpoint is never run"),
    "tokenizer_mode": Fixed("auto", "there is one kind of tokenizer"),
    "skip_tokenizer_init": Fixed(False, "the engine loads the tokenizer where the model has one"),
    "pipeline_parallel_size": Fixed(1, "a mesh has the axes tensor and data"),
    "enable_expert_parallel": Fixed(False, "a mesh has the axes tensor and data"),
    "enable_lora": Fixed(False, "adapters are not built yet"),
    "revision": Fixed(None, "models come at their newest revision"),
    "cpu_offload_gb": Fixed(0, "weights stay on the device"),
    "swap_space": Fixed(0, "a preempted request is recomputed, not swapped"),
    "long_prefill_token_threshold": Fixed(0, "max_prompt_share says when a prompt leaves room to others"),
    "enable_auto_tool_choice": Fixed(True, "--tool-call-parser none turns tools off"),
    "exclude_tools_when_tool_choice_none": Fixed(True, "a prompt has no tools that must not be called"),
    "enable_reasoning": Fixed(True, "--reasoning-parser none turns it off"),
    "disable_log_requests": Fixed(True, "requests are not logged"),
    "disable_log_stats": Fixed(True, "statistics are not logged"),
}


def translate(keywords: Mapping[str, Any], config: type[EngineConfig] = EngineConfig) -> dict[str, Any]:
    """Options under our names, from options under ours or vLLM's.

    Raises `ConfigError` naming the keyword that is unknown, has no effect here or repeats another.
    """
    options: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for name, value in keywords.items():
        if name in FIXED:
            _refuse_unless(name, value, FIXED[name])
            continue
        if name in MESH:
            continue
        option = RENAMED.get(name, name)
        if option not in describe(config):
            raise ConfigError(unknown_option(name, config))
        if option in options:
            raise repeated(given_as[option], name)
        options[option] = _value(option, value)
        given_as[option] = name
    if sizes := [name for name in MESH if name in keywords]:
        if "mesh" in options:
            raise repeated("mesh", sizes[0])
        options["mesh"] = "x".join(str(keywords.get(name, 1)) for name in MESH)
    return options


def unknown_option(name: str, config: type[EngineConfig]) -> str:
    """What to say about a name that is no option: the nearest that is one."""
    known = [*describe(config), *RENAMED, *MESH, *FIXED]
    near = get_close_matches(name, known, n=1)
    return f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else "")


def repeated(first: str, second: str) -> ConfigError:
    return ConfigError(f"{first} and {second} are the same option: give one of them")


def _value(option: str, value: Any) -> Any:
    return VALUES.get(option, {}).get(value, value) if isinstance(value, str) else value


def _refuse_unless(name: str, value: Any, fixed: Fixed) -> None:
    if value is not None and value != fixed.value:
        raise ConfigError(f"{name}={value} is not supported: {fixed.why}")
