"""What a test of the service leaves as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def same_cpus() -> Iterator[None]:
    """The mask of a target holds as long as the target does: the next test runs where this one did."""
    before = os.sched_getaffinity(0)
    yield
    after = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before)
    assert after == before, "the thread was left on the CPUs of a mask"
