"""Options from Python keywords: exact types, vLLM's names, errors that name the option."""

from pathlib import Path

import pytest

from jaxserve.aliases import FIXED, MESH, RENAMED, translate
from jaxserve.config import EngineConfig, MeshShape, ServerConfig, parse_mesh
from jaxserve.errors import ConfigError
from jaxserve.options import build, describe


def test_every_option_has_a_description():
    for option in describe(ServerConfig).values():
        assert option.about, option.name


def test_build_checks_types_and_takes_paths_and_single_strings():
    assert build(EngineConfig, {"model": Path("a/b")}).model == "a/b"
    assert build(ServerConfig, {"served_model_name": "a"}).served_model_name == ["a"]
    assert build(EngineConfig, {"memory_fraction": 1}).memory_fraction == 1.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_model_len": "8"}, "max_model_len: expected `int | null`, got `str`"),
        ({"max_num_seqs": True}, "max_num_seqs: expected `int | null`, got `bool`"),
        ({"dtype": "int3"}, "dtype: must be one of auto, bfloat16, float16, float32, not 'int3'"),
        ({"api_key": ["a", 1]}, "api_key[1]: expected `str`, got `int`"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, not 0"),
        ({"num_blocks": 1}, "num_blocks must be at least 2, not 1"),
        ({"memory_fraction": 1.5}, "memory_fraction must be above 0 and at most 1, not 1.5"),
        ({"shutdown_timeout": -1}, "shutdown_timeout must not be negative"),
        ({"stall_timeout": 1}, "stall_timeout must be at least 5, not 1"),
        ({"mesh": "axb"}, "mesh must look like 4x1"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_build_names_what_is_wrong(options, said):
    with pytest.raises(ConfigError) as error:
        build(ServerConfig, options)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("4", (4, 1)),
        ("4x2", (4, 2)),
        ("2X1", (2, 1)),
        ("16 x 2", (16, 2)),
        ("tensor=4,data=2", (4, 2)),
        ("data=2, tensor=4", (4, 2)),
        ("data=2", (1, 2)),
    ],
)
def test_mesh(text, shape):
    assert parse_mesh(text) == MeshShape(*shape)


SIZES = ["", "0x1", "1x0", "4x", "x4", "1x2x3", "4.0x1", "-1"]
NAMES = ["tensor", "tensor=", "tensor=2,", "tensor=4x1", "data=0", "expert=2", "Tensor=2", "data=2,data=2"]


@pytest.mark.parametrize("text", [*SIZES, *NAMES])
def test_bad_mesh(text):
    with pytest.raises(ConfigError, match="mesh must look like"):
        parse_mesh(text)


def test_aliases_point_at_options():
    own = describe(ServerConfig)
    assert set(RENAMED.values()) <= set(own)
    assert not set(own) & {*RENAMED, *MESH, *FIXED}, "an option that exists is no alias any more"


@pytest.mark.parametrize("name", FIXED)
def test_an_option_that_does_not_exist_is_refused_by_name(name):
    only, why = FIXED[name]
    assert translate({name: only}) == {}
    other = (not only) if isinstance(only, bool) else 4 if isinstance(only, int) else "other"
    with pytest.raises(ConfigError, match=f"^{name}={other} is not supported: {why}$"):
        translate({name: other})


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"gpu_memory_utilisation": 0.5}, "unknown option gpu_memory_utilisation; did you mean gpu_mem"),
        ({"port": 1}, "unknown option port"),
        ({"num_blocks": 9, "num_gpu_blocks_override": 9}, "num_blocks and num_gpu_blocks_override are the"),
        ({"tensor_parallel_size": 2, "mesh": "2"}, "mesh and tensor_parallel_size"),
    ],
)
def test_translate_refuses(keywords, said):
    with pytest.raises(ConfigError) as error:
        translate(keywords)
    assert said in str(error.value)
