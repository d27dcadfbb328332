from __future__ import annotations

from collections.abc import Iterator

import pytest
from processes import Cluster, make_client, start_engine, start_router


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/e2e/" in str(item.path):
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    engines = [start_engine(), start_engine()]
    router, admin = start_router(*engines)
    client = make_client(router.url)
    yield Cluster(engines, router, admin, client)
    client.close()
    for process in (router, *engines):
        assert process.stop() == 0
