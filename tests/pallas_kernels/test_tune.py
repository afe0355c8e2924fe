"""The tuner, in small: what it writes is what kernels are then made with."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxserve.pallas_kernels import tune
from jaxserve.pallas_kernels.paged_attention.tuning import measured
from jaxserve.pallas_kernels.paged_attention.tuning.gpu import TABLE, Variant, num_splits, variant
from jaxserve.pallas_kernels.paged_attention.tuning.measured import Tuning

DRY = ["--dry", "--head-size", "128"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    measured.read.cache_clear()
    yield tmp_path
    measured.read.cache_clear()


def test_what_it_writes_is_read(folder, monkeypatch):
    """Times are made up: sizes on trial are twice as fast, and few splits are best."""
    seen = []

    def milliseconds(layers, kernel, works, tuning):
        seen.append(tuning)
        return [0.001 * (tuning.filled or 1000) * (0.5 if tuning.variants else 1.0) for _ in works]

    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    monkeypatch.setattr(tune, "Layers", lambda *args, **options: None)
    tune.main([*DRY, "--out", str(folder / "here.json")])
    assert len(seen) == 2 * 2 + 2
    measured.read.cache_clear()  # as in another process
    assert variant("rows", 4, 128, 2) == Variant(16, 32, 4, 3)
    assert variant("tiles", 4, 64, 2) == Variant(32, 64, 4, 3)
    assert variant("rows", 4, 256, 2) == TABLE["rows", 2, 256]  # not measured
    assert json.loads((folder / "here.json").read_text())["filled"] == 264


def test_it_measures(folder, capsys):
    tune.main([*DRY, "--out", str(folder / "here.json")])
    found = json.loads((folder / "here.json").read_text())
    assert found["device_kind"] == jax.devices()[0].device_kind and found["filled"] in tune.FILLINGS
    assert [line["key"] for line in found["lines"]] == [["rows", 2, 128], ["tiles", 2, 128]]
    for line in found["lines"]:
        assert all(0 < ms < float("inf") for ms in line["ms"] + line["ms_before"])
    assert "Error" not in capsys.readouterr().out


def test_a_file_of_another_device_counts_for_nothing(folder):
    sizes = Variant(16, 16, 1, 1)
    line = {"kernel": "gpu", "key": ["rows", 2, 128], "variant": sizes._asdict()}
    found = {"device_kind": "another", "jax": "0", "filled": 1, "lines": [line]}
    (folder / "file.json").write_text(json.dumps(found))
    assert variant("rows", 4, 128, 2) == TABLE["rows", 2, 128] and num_splits(8, 131072, 64) == 16
    with measured.instead(measured.read("another")):
        assert variant("rows", 4, 128, 2) == sizes and num_splits(8, 131072, 64) == 1


def test_sizes_on_trial_are_those_of_the_kernel(folder):
    from jaxserve.pallas_kernels.paged_attention import paged_attention, ragged_meta

    def traced():
        lens = jnp.ones(1, jnp.int32)
        meta = ragged_meta(jnp.ones((1, 4), jnp.int32), lens, lens, 1)
        q, kv, pool = jnp.zeros((1, 4, 16)), jnp.zeros((1, 2, 16)), jnp.zeros((5, 2, 2, 16, 16))

        def attend(*args):
            return paged_attention(*args, scale=1.0, implementation="gpu")

        return str(jax.make_jaxpr(attend)(q, kv, kv, pool, meta))

    assert "paged_attention_q1_m16_t32_s2" in traced()
    with measured.instead(Tuning({"gpu": {("rows", 4, 128): {"tile": 16}}}, filled=2)):
        assert "paged_attention_q1_m16_t16_s1" in traced()
    assert "paged_attention_q1_m16_t32_s2" in traced()


def test_every_size_that_is_tried_is_one_of_its_kernel():
    import importlib

    for kernel in tune.KERNELS:
        table = importlib.import_module(f"jaxserve.pallas_kernels.paged_attention.tuning.{kernel}").TABLE
        for (kind, *_), sizes in table.items():
            assert set(tune.TRIED[kernel][kind]) <= set(sizes._fields)


def test_dry_times_are_not_shipped(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--dry"])
    assert "give --out" in capsys.readouterr().err
