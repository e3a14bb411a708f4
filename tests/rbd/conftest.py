"""The cluster that the tests in here share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.rbd.ceph import Ceph, missing, started


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    """A cluster that runs; each test makes images of its own."""
    packages = missing()
    if packages:
        pytest.skip(f"needs Ceph: apt-get install {' '.join(packages)}")
    with started(tmp_path_factory.mktemp("ceph")) as ceph:
        yield ceph
