import sys
from collections.abc import Iterator

import pytest

from tests.faults.stand import Stand


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with Stand(tmp_path_factory.mktemp("faults")) as stand:
        yield stand


@pytest.fixture
def stand(running: Stand) -> Iterator[Stand]:
    yield running
    sys.stderr.write(running.logs())  # pytest shows it when the test failed
