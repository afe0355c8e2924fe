import msgspec
import pytest

from jaxserve import GuidedDecodingParams, SamplingParams
from jaxserve.errors import InvalidRequest


@pytest.mark.parametrize(
    "field, value",
    [
        ("n", 0),
        ("n", True),
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_k", -2),
        ("min_p", 1.5),
        ("max_tokens", 0),
        ("logprobs", 21),
        ("seed", 2**64),
        ("seed", 1.0),
        ("ignore_eos", "no"),
        ("detokenize", None),
        ("skip_special_tokens", 1),
        ("include_stop_str_in_output", 0),
        ("output_kind", "all"),
        ("stop", ("a", "b")),
        ("best_of", 0),
        ("typical_p", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("logit_bias", [1]),
        ("allowed_token_ids", []),
        ("bad_words", "no"),
        ("min_tokens", 17),
        ("prompt_logprobs", -1),
        ("thinking_token_budget", -1),
        ("thinking_token_budget", True),
        ("truncate_prompt_tokens", 0),
        ("spaces_between_special_tokens", 1),
        ("structured_outputs", {}),
        ("logits_processors", [1]),
    ],
)
def test_a_wrong_value_is_refused_by_its_field(field, value):
    with pytest.raises(InvalidRequest, match=field) as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field


def test_an_item_of_a_list_is_named():
    lists = (
        ("stop", ["a", ""]),
        ("stop_token_ids", [1, -1]),
        ("allowed_token_ids", [1, "2"]),
        ("bad_words", ["a", " "]),
        ("logit_bias", {0: 1.0, 1: 101.0}),
    )
    for field, value in lists:
        with pytest.raises(InvalidRequest) as refused:
            SamplingParams(**{field: value})
        assert refused.value.param == f"{field}[1]"


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="presense_penalty"):
        SamplingParams(presense_penalty=1.0)


def test_the_older_name_of_structured_outputs():
    older = SamplingParams(guided_decoding=GuidedDecodingParams(regex="[ab]"))
    assert older.structured_outputs.kind == "regex" and older.structured_outputs.value == "[ab]"
    assert msgspec.structs.replace(older, n=2).structured_outputs is older.structured_outputs
    for wrong in (
        {"guided_decoding": {}},
        {"guided_decoding": {"regex": "a"}, "structured_outputs": {"regex": "a"}},
    ):
        with pytest.raises(InvalidRequest) as refused:
            SamplingParams(**wrong)
        assert refused.value.param.startswith("guided_decoding")
