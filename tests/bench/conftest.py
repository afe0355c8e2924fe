from collections.abc import Iterator

import pytest

from tests.bench.fake_openai import FakeServer


@pytest.fixture(scope="session")
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()
