"""Random weights need a config.json and nothing else."""

import json
import shutil

import numpy as np
import pytest

from jaxserve import Engine, SamplingParams
from jaxserve.errors import ModelError

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
SMALL = {"dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 16, "num_blocks": 33}


@pytest.fixture
def only_config(model_dir, tmp_path):
    shutil.copy(model_dir / "config.json", tmp_path)
    return tmp_path


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_config_alone_is_served_with_random_weights(only_config, quantization):
    with Engine(str(only_config), load_format="dummy", quantization=quantization, **SMALL) as engine:
        assert engine.tokenizer is None
        outputs = engine.generate([[9, 8, 7], [6] * 20], GREEDY, use_progress=False)
        weights = [np.asarray(w) for core in engine._cores for w in core.model.weights]
    vocab = json.loads((only_config / "config.json").read_text())["vocab_size"]
    for output in outputs:
        ids = output.outputs[0].token_ids
        assert len(ids) == 6 and all(0 <= i < vocab for i in ids)
    assert all(w.std() > 0 and np.isfinite(w).all() for w in weights)


def test_without_dummy_the_missing_weights_are_named(only_config):
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        Engine(str(only_config), **SMALL)
