from jaxserve.engine.stats import add_up


def test_numbers_add_up_and_flags_need_every_replica():
    one = {"running": 2, "block_size": 16, "warm": False}
    two = {"running": 3, "block_size": 16, "warm": True}
    assert add_up([one, two]) == {"running": 5, "block_size": 16, "warm": False}
    assert add_up([two]) == two and add_up([]) == {}
