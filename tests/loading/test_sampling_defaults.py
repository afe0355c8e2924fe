"""What a model's makers recommend: in generation_config.json, in a GGUF's metadata, or ours."""

import json

import pytest

from jaxserve.errors import ModelError
from jaxserve.loading.checkpoint import open_checkpoint
from jaxserve.loading.sampling_defaults import from_file

KNOWN = {
    "general.organization": "HuggingFaceTB",
    "general.basename": "smollm2",
    "general.finetune": "8k-lc100k-mix1-ep2",
}


@pytest.fixture
def recommend(tmp_path):
    """A model directory whose generation_config.json has these keys."""

    def recommend(**content):
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        return tmp_path

    return recommend


def defaults(place):
    return open_checkpoint(place, tensors=False).sampling_defaults()


def test_generation_config_gives_what_we_know(recommend, caplog):
    neutral = {"do_sample": True, "repetition_penalty": 1.0, "typical_p": None, "eos_token_id": [2]}
    neutral |= {"max_length": 20, "num_beams": 1, "length_penalty": 1, "penalty_alpha": 0.0}
    neutral |= {"stop_strings": [], "early_stopping": False, "forced_eos_token_id": None}
    neutral |= {"_from_model_config": True, "transformers_version": "4.51.0", "use_cache": True}
    neutral |= {"cache_implementation": "hybrid", "output_scores": True, "num_assistant_tokens": 20}
    given = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None}
    assert defaults(recommend(**given, **neutral)) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert not caplog.records


def test_without_generation_config_nothing_is_recommended(recommend):
    place = recommend()
    (place / "generation_config.json").unlink()
    assert defaults(place) == {}


def test_what_transformers_writes_by_itself_asks_for_nothing(recommend, caplog):
    transformers = pytest.importorskip("transformers")
    written = transformers.GenerationConfig._get_default_generation_params()
    defaults(recommend(**written | {"do_sample": True}))
    assert not caplog.records


def test_what_is_recommended_and_not_used_is_said_once(recommend, caplog):
    unused = {
        "repetition_penalty": 1.05,
        "max_new_tokens": 2048,
        "max_length": 4096,
        "do_sample": False,
        "stop_strings": ["User:"],
        "length_penalty": 0.5,
        "guidance_scale": 1.5,
        "forced_eos_token_id": 2,
        "begin_suppress_tokens": [220],
        "presence_penalty": 1.5,
        "what_comes_next_year": {"strength": 1},
    }
    place = recommend(temperature=0.5, **unused)
    assert defaults(place) == {"temperature": 0.5}
    path = place / "generation_config.json"
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} recommends {key} {value}, which is not used" for key, value in unused.items()
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", "hot"), ("temperature", -1), ("top_p", 0), ("top_k", True), ("min_p", [0.1])],
)
def test_a_wrong_value_is_left_out_or_an_error_where_the_user_named_the_file(recommend, caplog, key, value):
    place = recommend(**{"temperature": 0.5, "top_p": 0.5} | {key: value})
    assert defaults(place) == {name: 0.5 for name in ("temperature", "top_p") if name != key}
    (record,) = caplog.records
    wrong = f"{key} in {place / 'generation_config.json'}: {key} must be "
    assert record.getMessage().startswith(wrong) and record.getMessage().endswith("; it is left out")
    with pytest.raises(ModelError) as caught:
        from_file(place)
    assert str(caught.value).startswith(wrong)


def test_a_whole_number_may_be_written_as_a_float(recommend, caplog):
    found = defaults(recommend(top_k=50.0))
    assert found == {"top_k": 50} and isinstance(found["top_k"], int)
    assert not caplog.records


def test_gguf_metadata(write, caplog):
    own = {"temp": 0.5, "top_k": 20, "top_p": 0.75, "min_p": 0.125, "penalty_repeat": 1.5, "mirostat": 0}
    path = write({f"general.sampling.{key}": value for key, value in own.items()})
    assert defaults(path) == {"temperature": 0.5, "top_p": 0.75, "top_k": 20, "min_p": 0.125}
    (record,) = caplog.records
    assert record.getMessage() == f"{path} recommends general.sampling.penalty_repeat 1.5, which is not used"


def test_a_wrong_value_in_gguf_metadata_is_named_by_its_key(write, caplog):
    assert defaults(write({"general.sampling.temp": -0.5, "general.sampling.top_k": 9})) == {"top_k": 9}
    assert "general.sampling.temp in " in caplog.text and "model.gguf: temperature must be" in caplog.text


def test_a_files_own_values_go_before_ours(write):
    assert defaults(write(KNOWN)) == {"temperature": 0.0}
    assert defaults(write(KNOWN | {"general.sampling.top_k": 7})) == {"top_k": 7}
    assert defaults(write(KNOWN | {"general.basename": "other"})) == {}


def test_the_default_model_is_greedy(default_model):
    assert defaults(default_model) == {"temperature": 0.0}


def test_a_file_or_its_directory_may_be_named(recommend):
    place = recommend(top_k=9, eos_token_id=2)
    assert from_file(place) == from_file(place / "generation_config.json") == ({"top_k": 9}, [2])
    assert from_file(recommend(eos_token_id=[2, 7])) == ({}, [2, 7])
    assert from_file(recommend()) == ({}, [])


@pytest.mark.parametrize("text", [None, "{", "[]", '{"eos_token_id": "</s>"}'])
def test_a_file_that_cannot_be_read_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"generation_config must be auto, none, .*generation_config\.json"):
        from_file(tmp_path)
