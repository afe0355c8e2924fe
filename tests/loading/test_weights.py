"""From tensors to parameters: complaints come before anything is read; few parameters are held at a time."""

import threading
import weakref

import numpy as np
import pytest

from jaxserve.errors import ModelError
from jaxserve.loading.weights import THREADS, Source, check, parameters
from jaxserve.models.llama import LlamaConfig

CONFIG = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
TABLE = {
    "whole": Source.one("a", (2, 3)),
    "joined": Source({"b": (1, 3), "c": (2, 3)}, lambda b, c: np.concatenate([b, c])),
}


class Tensors:
    """Zeros of the given shapes, and how many of them are alive."""

    def __init__(self, **shapes):
        self._shapes = shapes
        self.read = []
        self.alive = 0
        self.most = 0
        self._lock = threading.RLock()

    def shapes(self):
        return self._shapes

    def source(self, name):
        return f"{name}.safetensors"

    def tensor(self, name, dtype):
        value = np.zeros(self._shapes[name], dtype)
        with self._lock:
            self.read.append(name)
            self.alive += 1
            self.most = max(self.most, self.alive)
        weakref.finalize(value, self._gone)
        return value

    def _gone(self):
        with self._lock:
            self.alive -= 1


GOOD = {"a": (2, 3), "b": (1, 3), "c": (2, 3)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"c": None}, "tensor c [2, 3] is missing from the checkpoint"),
        ({"c": (3, 2)}, "tensor c in c.safetensors has shape [3, 2], the config asks for [2, 3]"),
        ({"d": (1,)}, "tensor d in d.safetensors has no place in this architecture"),
    ],
)
def test_the_first_wrong_tensor_is_named_before_any_is_read(change, said):
    shapes = {name: shape for name, shape in (GOOD | change).items() if shape}
    tensors = Tensors(**shapes)
    with pytest.raises(ModelError) as caught:
        list(parameters(tensors, TABLE, lambda path, value: value))
    assert str(caught.value) == said
    assert tensors.read == []


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"])
def test_tensors_that_models_derive_or_tie_are_passed_over(name):
    check(Tensors(**GOOD, **{name: (4,)}), TABLE)


def test_names_may_lack_the_part_that_a_model_without_a_head_has_not():
    table = {"whole": Source.one("model.a", (2, 3)), "head": Source.one("head.b", (1, 3))}
    tensors = Tensors(**{"a": (2, 3), "head.b": (1, 3)})
    assert [path for path, _ in parameters(tensors, table, lambda path, value: value)] == ["whole", "head"]
    with pytest.raises(ModelError, match=r"tensor model\.a \[2, 3\] is missing"):
        list(parameters(Tensors(**{"head.b": (1, 3)}), table, lambda path, value: value))


def test_few_parameters_are_on_the_host_at_a_time_and_come_in_order():
    names = [f"t{i}" for i in range(50)]
    tensors = Tensors(**{name: (2, 3) for name in names})
    table = {f"our.{name}": Source.one(name, (2, 3)) for name in names}
    placed = list(parameters(tensors, table, lambda path, value: (path, value.shape)))
    assert placed == [(path, (path, (2, 3))) for path in table]
    assert sorted(tensors.read) == sorted(names)
    assert tensors.alive == 0 and tensors.most <= THREADS


def test_what_cannot_be_placed_ends_it():
    with pytest.raises(ModelError, match="no room for joined"):
        list(parameters(Tensors(**GOOD), TABLE, no_room))


def no_room(path, value):
    if path == "joined":
        raise ModelError("no room for joined")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(({key: None}, f"`{key}`") for key in CONFIG if key != "num_key_value_heads"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "2 key-value heads"),
        ({"hidden_act": "tanh"}, "'tanh'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ],
)
def test_a_config_that_is_refused(change, said):
    assert LlamaConfig.from_config(CONFIG).head_dim == 8
    config = {key: value for key, value in (CONFIG | change).items() if value is not None}
    with pytest.raises(ModelError) as caught:
        LlamaConfig.from_config(config)
    assert said in str(caught.value) and "\n" not in str(caught.value)
