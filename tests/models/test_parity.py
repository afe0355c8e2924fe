"""Every family computes what transformers' own class does, with every parameter drawn at random."""

import pytest

pytest.importorskip("torch")

from jaxserve.models.registry import ARCHITECTURES
from tests.models.comparison import Comparison, compare, our_side
from tests.models.reference import CASES, architecture
from tests.models.scenario import GREEDY


@pytest.fixture(scope="module")
def ask():
    with our_side() as ask:
        yield ask


@pytest.fixture(scope="module", params=CASES)
def compared(request, ask, tmp_path_factory) -> Comparison:
    return compare(request.param, ask, tmp_path_factory.mktemp(request.param))


def test_every_family_is_compared():
    assert {architecture(case) for case in CASES} == set(ARCHITECTURES)


def test_logits_are_those_of_transformers_however_they_are_computed(compared):
    """In one step, token by token, in chunks, after a prefix that is there, beside others, and on meshes."""
    assert compared.std > 1
    assert list(compared.errors) == ["1x1", "2x1", "4x1"]
    for mesh, errors in compared.errors.items():
        assert set(errors) == {"alone", "greedy", "chunks", "shared", "mixed"}
        assert max(errors.values()) < 1e-4, mesh


def test_tokens_are_those_of_transformers(compared):
    assert set(compared.agreed.values()) == {GREEDY + 1}


def test_no_tensor_can_be_lost_or_taken_for_another(compared):
    assert compared.tensors > 10 and not compared.idle
