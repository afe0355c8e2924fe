"""The default model as transformers runs it: what ours is compared with."""

from typing import Any

import numpy as np

from jaxserve.loading.checkpoint import Checkpoint


def transformers_llama(checkpoint: Checkpoint) -> Any:
    """transformers' Llama in float32, with a checkpoint's weights as we dequantise them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**checkpoint.config))
    state = {name: torch.tensor(np.array(checkpoint.tensor(name))) for name in checkpoint.shapes()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.eval()
