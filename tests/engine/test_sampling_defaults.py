"""Where no parameters are given the engine samples as the model's makers recommend, or as it is told."""

import json
import logging

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.engine.text_side import load_text_side
from jaxserve.errors import ModelError

PROMPT = [20, 30, 40]


@pytest.fixture
def recommending(make_llama):
    path = make_llama("recommending")
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0, "top_p": 0.9}))
    return path


def load(path, **options):
    return load_text_side(EngineConfig(model=str(path), **options), path, None).sampling_defaults


def test_whose_defaults_hold(recommending, tmp_path, caplog):
    caplog.set_level(logging.INFO, "jaxserve")
    assert load(recommending) == {"temperature": 0, "top_p": 0.9}
    assert "sampling defaults: temperature 0, top_p 0.9 " in caplog.text
    assert load(recommending, generation_config="none") == {}
    with pytest.raises(ModelError, match="generation_config must be"):
        load(recommending, generation_config=str(tmp_path))
    (tmp_path / "generation_config.json").write_text('{"top_k": 3}')
    assert load(recommending, generation_config=str(tmp_path)) == {"top_k": 3}


def test_another_file_adds_its_ends_of_sequence(recommending, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [77]}')
    own, both = (
        load_text_side(EngineConfig(model=str(recommending), generation_config=wanted), recommending, None)
        for wanted in ("auto", str(tmp_path))
    )
    assert both.eos_token_ids == [*own.eos_token_ids, 77]


def test_they_hold_where_no_parameters_are_given(recommending):
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "num_blocks": 33}
    with LLM(str(recommending), dtype="float32", **small) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0, top_p=0.9)
        assert llm.default_params(top_p=1.0, n=2) == SamplingParams(temperature=0, n=2)
        (greedy,) = llm.generate([PROMPT], SamplingParams(temperature=0))
        (default,) = llm.generate([PROMPT])
        streamed = [token for output in llm.stream(PROMPT) for token in output.outputs[0].token_ids]
        added = llm.add_request(PROMPT)
        outputs = []
        while llm.has_unfinished():
            outputs += llm.step()
        (plain,) = llm.generate([PROMPT], SamplingParams(seed=1))
    assert outputs[-1].request_id == added
    assert default.outputs[0].token_ids == greedy.outputs[0].token_ids == streamed
    assert outputs[-1].outputs[0].token_ids == streamed
    assert plain.outputs[0].token_ids != streamed, "SamplingParams() is taken as it is"
