"""Which class serves which architecture."""

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
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


def model_class(config: Mapping[str, Any]) -> type:
    """The class for a checkpoint's config (`architectures`). Raises ModelError naming what is supported."""
    names = config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            module, attribute = ARCHITECTURES[name].split(":")
            return getattr(importlib.import_module(module), attribute)
    wanted = ", ".join(names) or f"model type {config.get('model_type')!r}"
    near = get_close_matches(names[0], ARCHITECTURES, 1, 0.0) if names else []
    hint = f" (nearest: {near[0]})" if near else ""
    raise ModelError(f"architecture {wanted} is not supported; supported: {', '.join(ARCHITECTURES)}{hint}")
