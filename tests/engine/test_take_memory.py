"""An engine gives its weights large pages and takes all of its pool's memory, after its programs are made."""

import threading

from jaxserve import Engine
from jaxserve.engine import pages


def test_memory_is_arranged_after_the_last_program(model_dir, monkeypatch):
    enlarged, taken, stops, asked = [], [], [], threading.Event()

    def take(places, stop):
        taken.extend(places)
        stops.append(stop)
        asked.set()

    monkeypatch.setattr(pages, "take", take)
    monkeypatch.setattr(pages, "enlarge", lambda places, stop: enlarged.extend(places))
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "max_model_len": 128, "num_blocks": 33}
    with Engine(str(model_dir), dtype="float32", **options) as engine:
        core = engine._cores[0]
        assert not asked.is_set() or core.state == "warm"
        assert asked.wait(300) and core.state == "warm"
        pools = {(pool.unsafe_buffer_pointer(), pool.nbytes) for pool in core._kv}
        assert sum(size for _, size in enlarged) == core.model.bytes
        assert not stops[0].is_set()
    assert stops[0].is_set()  # their memory is gone
    assert set(taken) == pools
