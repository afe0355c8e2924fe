import pytest

from jaxserve import SamplingParams
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
    ],
)
def test_a_wrong_value_is_refused_by_its_field(field, value):
    with pytest.raises(InvalidRequest, match=field) as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field


def test_an_item_of_a_list_is_named():
    for field, value in (("stop", ["a", ""]), ("stop_token_ids", [1, -1])):
        with pytest.raises(InvalidRequest) as refused:
            SamplingParams(**{field: value})
        assert refused.value.param == f"{field}[1]"


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="presence_penalty"):
        SamplingParams(presence_penalty=1.0)
