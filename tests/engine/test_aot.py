"""The programs of Llama 3.1 8B and 70B, compiled for devices that need not be here."""

from functools import cache
from typing import Any, NamedTuple

import pytest

from tests.aot import H200_SHARED_MEMORY, run


class Expected(NamedTuple):
    """What a model is, and what its steps became when it was looked at last: no more is allowed."""

    layers: int
    hidden: int
    kernels: dict[str, int]
    """By program, on a GPU."""
    outside: dict[str, int]
    """Launched by the host, outside of command buffers, by kind of step."""
    vocab: int = 128256


GPUS = {
    "8B h200": Expected(
        32,
        4096,
        {"decode[1]": 587, "decode[64]": 395, "decode[256]": 362, "mixed[512]": 416, "mixed[8192]": 431},
        {"decode": 0, "mixed": 0},
    ),
    "8B h200 mosaic": Expected(
        32,
        4096,
        {"decode[1]": 585, "decode[64]": 426, "decode[256]": 426, "mixed[512]": 542, "mixed[8192]": 557},
        {"decode": 0, "mixed": 0},
    ),
    "70B h200 4x1": Expected(
        80,
        8192,
        {"decode[1]": 1455, "decode[64]": 1253, "decode[256]": 1013, "mixed[512]": 1181, "mixed[8192]": 1219},
        {"decode": 487, "mixed": 488},
    ),
}
CHOOSING = {"greedy": 4, "random": 4, "full": 20}
"""Kernels in which tokens are chosen, by variant."""
SHAPING = 9
"""Kernels that shape logits without typical_p."""
TPUS = {"8B v5e 4x1": Expected(32, 4096, {}, {}), "8B v6e": Expected(32, 4096, {}, {})}
MODELS = GPUS | TPUS
ON_GPU = [pytest.param(name, marks=pytest.mark.aot("gpu")) for name in GPUS]
ON_TPU = [pytest.param(name, marks=pytest.mark.aot("tpu")) for name in TPUS]


@cache
def made(name: str) -> list[dict[str, Any]]:
    return run("steps", name)


def steps(name: str, *kinds: str) -> list[dict[str, Any]]:
    found = [report for report in made(name) if report["program"].partition("[")[0] in kinds]
    assert found
    return found


@pytest.mark.parametrize("name", ON_GPU)
def test_no_kernel_spills_or_outgrows_its_shared_memory(name):
    for report in made(name):
        assert report["spilled"] == 0, report
        assert report["shared"] <= H200_SHARED_MEMORY, report


@pytest.mark.parametrize("name", [*ON_GPU, *ON_TPU])
def test_programs_take_what_was_planned(name):
    taken, planned = max(report["temporaries MiB"] for report in made(name)), made(name)[0]["planned MiB"]
    assert taken <= planned <= 1.5 * taken


@pytest.mark.parametrize("name", [*ON_GPU, *ON_TPU])
def test_no_weight_and_no_pool_is_copied(name):
    for report in steps(name, "decode", "mixed"):
        assert report["copies"] == {}, report
        assert report["in place MiB"] >= report["pools MiB"], report


@pytest.mark.parametrize("name", [*ON_GPU, *ON_TPU])
def test_a_layer_on_a_mesh_adds_up_after_attention_and_after_the_mlp_and_nothing_else_travels(name):
    model = MODELS[name]
    for report in made(name):
        found = {tuple(part.split(" ", 1)): count for part, count in report["collectives"].items()}
        sums = sum(count for (operation, _), count in found.items() if operation == "all-reduce")
        rest = [part for part in found if part[0] != "all-reduce"]
        if "4x1" in name and report["program"].startswith(("decode", "mixed")):
            assert sums == 2 * model.layers + 1, report  # the embedding's
            assert [operation for operation, _ in rest] == ["all-gather"], report
            assert found[rest[0]] == 1 and str(model.vocab) in rest[0][1], report  # the logits, for sampling
            assert all(f"{model.hidden}]" in sizes for operation, sizes in found if operation == "all-reduce")
        elif "4x1" not in name or not report["program"].startswith("score"):  # has logits of its own
            assert not found, report


@pytest.mark.parametrize("name", ON_GPU)
def test_a_step_is_so_many_kernels_in_command_buffers_without_loop_or_branch(name):
    model = GPUS[name]
    for report in steps(name, "decode", "mixed"):
        assert not report["loops"] and not report["branches"], report
        assert report["kernels"] <= model.kernels[report["program"]], report
        kind = report["program"].partition("[")[0]
        assert sum(report["outside"].values()) <= model.outside[kind], report


@pytest.mark.parametrize("name", ON_GPU)
def test_logits_are_shaped_in_one_command_buffer(name):
    plain = [report for report in steps(name, "shape") if report["program"].endswith("plain")]
    assert plain
    for report in plain:
        assert not report["loops"] and not report["branches"] and not report["outside"], report
        assert report["kernels"] <= SHAPING, report


@pytest.mark.parametrize("name", ON_GPU)
def test_a_token_is_chosen_in_so_many_kernels_and_the_host_waits_for_none(name):
    for report in steps(name, "sample"):
        assert not report["loops"] and not report["branches"], report
        variant = report["program"].rpartition(" ")[2]
        assert report["kernels"] <= CHOOSING[variant], report
        # XLA makes no command buffer of fewer than five
        assert set(report["outside"]) <= {"kCustomKernel"}, report
        assert variant != "full" or not report["outside"], report
