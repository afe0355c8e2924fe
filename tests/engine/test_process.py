import os

from jaxserve.config import EngineConfig
from jaxserve.engine.process import with_own_devices


def test_each_replica_sees_its_own_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = with_own_devices(EngineConfig(mesh="2x3", seed=5), 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert (config.mesh, config.seed) == ("2x1", 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    with_own_devices(EngineConfig(mesh="2x2"), 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7,5"


def test_deterministic_replicas_draw_the_same(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert with_own_devices(EngineConfig(mesh="1x2", seed=5, deterministic=True), 1).seed == 5


def test_one_replica_keeps_what_the_user_chose(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = EngineConfig(mesh="4x1")
    assert with_own_devices(config, 0) is config
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
