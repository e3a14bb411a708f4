"""The tests of the wire can fail: they find each bug that is planted in it."""

from __future__ import annotations

import pytest

from tests.proof.forked import run_pytest
from tests.rpc.planted import PLANTED, Plant


@pytest.mark.parametrize("tests", sorted({plant.tests[0] for plant in PLANTED}))
def test_nothing_is_found_without_a_bug(tests: str) -> None:
    """The same way of running finds nothing in the wire as it is: it is the bugs that are found below."""
    assert run_pytest([tests]).verdict == "passed"


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.name)
def test_planted_bug_is_caught(plant: Plant) -> None:
    """A test fails under this bug, and not because the code crashes."""
    ended = run_pytest(plant.tests, prepare=plant.plant().__enter__)
    assert ended.by_assertion or ended.verdict in ("hung", "looped"), ended
