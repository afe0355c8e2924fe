"""Attention's kernels on devices that need not be here: nothing spills, all fits, pools stay in place."""

from typing import Any

import pytest

from tests.aot import H200_SHARED_MEMORY, run


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return run("attention")


@pytest.mark.aot("gpu")
def test_kernels_fit_the_device(reports):
    on_gpu = [report for report in reports if report["device"] == "h200"]
    assert on_gpu
    for report in on_gpu:
        # with jax 0.12, float32 with heads of 256 spills 12 bytes
        assert report["spilled"] <= (12 if report["shape"] == "head size 256 mixed f32" else 0), report
        if report["shared"] != "unknown":
            assert 0 < report["shared"] <= H200_SHARED_MEMORY, report


@pytest.mark.aot("gpu")
def test_float32_uses_no_tensor_core_and_16_bits_do(reports):
    for report in reports:
        assert (report["products"] == "fma") == report["shape"].endswith("f32"), report


@pytest.mark.aot("gpu")
def test_pools_stay_in_place(reports):
    for report in reports:
        assert report["pools in place"] and not report["loops"], report
        assert report["of a pool"] < 1 / 2, report
