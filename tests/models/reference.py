"""The models that ours are compared with: transformers' own, tiny, with every parameter drawn at random."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

CONFIGS = Path(__file__).with_name("configs")
CASES = sorted(path.stem for path in CONFIGS.glob("*.json"))
"""Families, and kinds of them where a config chooses between architectures."""


Model = torch.nn.Module


def config(case: str) -> Any:
    keys = json.loads((CONFIGS / f"{case}.json").read_text())
    return AutoConfig.for_model(keys.pop("model_type"), **keys)


def architecture(case: str) -> str:
    return AutoModelForCausalLM._model_mapping[type(config(case))].__name__


def make(case: str) -> Model:
    """transformers' model of a case, in float32."""
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_config(config(case), **options).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            value = torch.randn(parameter.shape, generator=random)
            if parameter.ndim == 1:
                # around what it is at first: norms' weights are around one, or around zero where one is added
                parameter += 0.3 * value
            else:
                parameter.copy_(value * 1.5 * parameter.shape[-1] ** -0.5)
    return model


def logits(model: Model, tokens: list[int]) -> np.ndarray:
    """float32 [len(tokens), vocab]."""
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def logits_without(model: Model, name: str, other: str, tokens: list[int]) -> np.ndarray:
    """The logits with a tensor zeroed, or with another one in its place."""
    tensors = model.state_dict()
    tensor, held = tensors[name], tensors[name].clone()
    with torch.no_grad():
        tensor.copy_(tensors[other] if other else torch.zeros(()))
        found = logits(model, tokens)
        tensor.copy_(held)
    return found
