"""An engine arranges its memory when its programs are made, and while no request is there."""

import threading
import time

import pytest

from jaxserve import Engine, SamplingParams
from jaxserve.engine import pages

OPTIONS = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "max_model_len": 128, "num_blocks": 33}


@pytest.fixture(autouse=True)
def alone():
    """Engines that other tests keep have arranged theirs, and take no part."""
    for thread in arranging():
        thread.join(300)


def arranging():
    return [thread for thread in threading.enumerate() if thread.name == "memory"]


def test_the_weights_get_large_pages_and_the_whole_pool_is_taken(model_dir, monkeypatch):
    enlarged, taken, done = [], [], threading.Event()

    def enlarge(places):
        enlarged.extend(places)
        yield

    def take(places):
        taken.extend(places)
        yield
        done.set()

    monkeypatch.setattr(pages, "enlarge", enlarge)
    monkeypatch.setattr(pages, "take", take)
    with Engine(str(model_dir), dtype="float32", **OPTIONS) as engine:
        core = engine._cores[0]
        assert done.wait(300) and core.state == "warm"
        assert sum(size for _, size in enlarged) == core.model.bytes
        assert set(taken) == {(pool.unsafe_buffer_pointer(), pool.nbytes) for pool in core._kv}


def test_it_makes_way_for_requests_and_ends_with_the_engine(model_dir, monkeypatch):
    piece = threading.Event()

    def take(places):
        while True:
            yield
            piece.set()
            time.sleep(0.001)

    monkeypatch.setattr(pages, "take", take)
    monkeypatch.setattr("jaxserve.engine.arranging.BUSY", 300.0)
    with Engine(str(model_dir), dtype="float32", **OPTIONS) as engine:
        assert piece.wait(300)
        engine.add_request([5, 6, 7], SamplingParams(max_tokens=20, ignore_eos=True))
        time.sleep(0.1)  # the piece under way
        piece.clear()
        assert not piece.wait(0.3)
    for thread in arranging():
        thread.join(10)
    assert not arranging()
