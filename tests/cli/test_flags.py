"""Flags come from the definition in config.py; the config file and vLLM's names mean the same options."""

import argparse

import msgspec
import pytest

from jaxserve.cli import serve
from jaxserve.cli.flags import read_options
from jaxserve.config import DEFAULT_MODEL, EngineConfig, ServerConfig
from jaxserve.errors import ConfigError
from jaxserve.options import describe

OTHER = {int: 7, float: 0.25, str: "text"}


def config(*argv: str) -> ServerConfig:
    return read_options(serve.parser().parse_args(argv), ServerConfig)


@pytest.mark.parametrize("option", describe(ServerConfig).values(), ids=lambda option: option.name)
def test_every_option_is_a_flag(option):
    flag = option.name.replace("_", "-")
    if option.type is bool:
        assert getattr(config(f"--no-{flag}"), option.name) is False
        assert getattr(config(f"--{flag}"), option.name) is True
        return
    value = option.choices[-1] if option.choices else "2x2" if option.name == "mesh" else OTHER[option.type]
    got = getattr(config(f"--{flag}", str(value)), option.name)
    assert got == ([value] if option.many else value)
    assert got != option.default


def test_no_flags_are_the_defaults():
    assert config() == ServerConfig()
    assert config().model == DEFAULT_MODEL


def test_help_describes_every_option():
    text = " ".join(serve.parser().format_help().split())
    for option in describe(ServerConfig).values():
        assert "--" + option.name.replace("_", "-") in text
    assert "port to listen on; 0: any free one (default: 8000)" in text


def test_model_is_positional_or_a_flag():
    assert config("some/model").model == config("--model", "some/model").model == "some/model"


@pytest.mark.parametrize(
    "argv",
    [
        ["--api-key", "a", "b"],
        ["--api-key", "a,b"],
        ["--api-key", "a", "--api-key", "b"],
        ["--api-key", '["a", "b"]'],
        ["--api_key=a,b"],
    ],
)
def test_lists_in_every_spelling(argv):
    assert config(*argv).api_key == ["a", "b"]


def test_a_list_of_other_things_is_refused(capsys):
    with pytest.raises(SystemExit):
        config("--api-key", "[1]")
    assert "must hold strings only" in capsys.readouterr().err


def test_a_list_of_numbers_may_hold_whole_ones(capsys):
    from jaxserve.bench import serve

    assert serve.parser().parse_args(["--request-rate", "[1, 2.5]"]).request_rate == [1.0, 2.5]
    for wrong in ('["a"]', "[true]", "[null]"):
        with pytest.raises(SystemExit):
            serve.parser().parse_args(["--request-rate", wrong])
        assert "must hold numbers only" in capsys.readouterr().err


def test_bool_options_have_a_no():
    """No option is a bool yet but aliases are: both spellings reach the table."""
    assert config("--enable-chunked-prefill") == ServerConfig()
    with pytest.raises(ConfigError, match="enable_chunked_prefill=False is not supported"):
        config("--no-enable-chunked-prefill")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--tensor-parallel-size", "4"], {"mesh": "4x1"}),
        (["-tp", "4", "--data-parallel-size", "2"], {"mesh": "4x2"}),
        (["--data-parallel-size", "2"], {"mesh": "1x2"}),
        (["--gpu-memory-utilization", "0.5"], {"memory_fraction": 0.5}),
        (["--num-gpu-blocks-override", "40"], {"num_blocks": 40}),
        (["--dtype", "half"], {"dtype": "float16"}),
        (["--generation-config", "vllm"], {"generation_config": "none"}),
        (["--max-num-seqs", "8", "--block_size", "32"], {"max_num_seqs": 8, "block_size": 32}),
        (["--served-model-name", "a", "b"], {"served_model_name": ["a", "b"]}),
        (["--tokenizer-mode", "auto", "--pipeline-parallel-size", "1"], {}),
    ],
)
def test_names_known_from_vllm(argv, expected):
    assert config(*argv) == ServerConfig(**expected)


YAML = """
model: some/model
tensor-parallel-size: 2
max_num_seqs: 8
served-model-name: [a, b]
api-key: k
shutdown-timeout: 5
"""
TOML = """
model = "some/model"
tensor-parallel-size = 2
max_num_seqs = 8
served-model-name = ["a", "b"]
api-key = "k"
shutdown-timeout = 5
"""


@pytest.mark.parametrize(("name", "text"), [("c.yaml", YAML), ("c.yml", YAML), ("c.toml", TOML)])
def test_config_file(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text)
    expected = ServerConfig(
        model="some/model",
        mesh="2x1",
        max_num_seqs=8,
        served_model_name=["a", "b"],
        api_key=["k"],
        shutdown_timeout=5.0,
    )
    assert config("--config", str(file)) == expected
    flags = config("--config", str(file), "other", "--mesh", "1x4", "--served-model-name", "c")
    changed = {"model": "other", "mesh": "1x4", "served_model_name": ["c"]}
    assert flags == msgspec.structs.replace(expected, **changed)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.toml", "max_modellen = 3", "unknown option max_modellen; did you mean max_model_len?"),
        ("c.toml", "port = '80'", "port: expected `int`, got `str`"),
        ("c.toml", "port = ", "is not TOML"),
        ("c.toml", "max-num-seqs = 1\nmax_num_seqs = 2", "max_num_seqs stands twice"),
        ("c.yaml", "a: [", "is not YAML"),
        ("c.yaml", "- a", "option: value"),
        ("c.yaml", "mesh: 2x1\ntensor_parallel_size: 2", "mesh and tensor_parallel_size are the same option"),
        ("c.json", "{}", "must end in .toml, .yaml or .yml"),
    ],
)
def test_config_file_errors(tmp_path, name, text, said):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        config("--config", str(file))
    assert said in str(error.value)


def test_an_empty_yaml_file_is_no_options(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("# nothing\n")
    assert config("--config", str(file)) == ServerConfig()


def test_chat_takes_the_engine_options_only():
    from jaxserve.cli import chat

    args = chat.parser().parse_args(["--mesh", "2", "--dtype", "float32"])
    assert isinstance(args, argparse.Namespace)
    assert read_options(args, EngineConfig) == EngineConfig(mesh="2", dtype="float32")
    assert "--port" not in chat.parser().format_help()


def test_the_two_parallel_sizes_may_come_from_file_and_command_line(tmp_path):
    file = tmp_path / "options.toml"
    file.write_text("tensor-parallel-size = 4\n")
    both = config("--config", str(file), "--data-parallel-size", "2")
    assert both.mesh == "4x2"
    assert config("--config", str(file), "--mesh", "2x1").mesh == "2x1"
