"""Experts on devices that need not be here: nothing spills, all fits, weights stay where they are."""

from typing import Any

import pytest

from tests.aot import H200_SHARED_MEMORY, run

from .aot_report import SHAPES


@pytest.fixture(scope="module")
def on_gpu() -> list[dict[str, Any]]:
    return run("experts", *(name for name, shape in SHAPES.items() if shape.device == "h200"))


@pytest.fixture(scope="module")
def on_tpu() -> list[dict[str, Any]]:
    return run("experts", *(name for name, shape in SHAPES.items() if shape.device != "h200"))


@pytest.mark.aot("gpu")
def test_kernels_fit_the_device(on_gpu):
    assert len(on_gpu) == 2 * sum(shape.device == "h200" for shape in SHAPES.values())
    for report in on_gpu:
        assert not report["spilled"], report
        assert 0 < report["shared"] <= H200_SHARED_MEMORY, report
        # two products, the gate, the sum and the rows they take: what finds the order of tokens is the rest
        assert report["kernels"] <= (16 if SHAPES[report["layer"]].tokens <= 64 else 20), report


@pytest.mark.aot("gpu")
def test_float32_uses_no_tensor_core_and_16_bits_do(on_gpu):
    for report in on_gpu:
        assert (report["products"] == "fma") == report["layer"].startswith("float32"), report


@pytest.mark.aot("gpu")
def test_no_weight_is_copied_and_no_row_meets_every_expert_on_a_gpu(on_gpu):
    for report in on_gpu:
        _check(report)
        assert not report["loops"], report


@pytest.mark.aot("tpu")
def test_no_weight_is_copied_and_no_row_meets_every_expert_on_a_tpu(on_tpu):
    assert len(on_tpu) == sum(shape.device != "h200" for shape in SHAPES.values())
    for report in on_tpu:
        _check(report)
        assert report["loops"] <= 1, report  # over the bits of a search, in jax's own kernel


def _check(report: dict[str, Any]) -> None:
    assert report["made of weights"] == 0, report
    # of what the rows alone take in float32: a few arrays with a row for each pair
    assert report["temporaries MiB"] < 1 or report["of the rows"] < 2, report
