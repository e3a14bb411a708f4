"""The simulator's own tests can fail: they find each bug that is planted in it."""

from __future__ import annotations

import pytest

from tests.proof.forked import run_pytest
from tests.proof.planted_simulator import PLANTED, Plant
from tests.proof.reports import CAUGHT, Caught


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.name)
def test_planted_simulator_bug_is_caught(plant: Plant) -> None:
    """A test of the simulator fails under this bug, and not because the code crashes; without the bug none does."""
    planted = plant.plant()
    ended = run_pytest([plant.tests], prepare=planted.__enter__)
    assert ended.by_assertion or ended.verdict == "hung", ended
    CAUGHT.append(Caught(bug=plant.name, test=ended.test, how="hangs" if ended.verdict == "hung" else "fails"))


def test_no_test_of_the_simulator_fails_without_a_bug() -> None:
    """The same way of running finds nothing in the simulator as it is: it is the bugs that are found above."""
    files = sorted({plant.tests for plant in PLANTED})
    assert run_pytest(files).verdict == "passed"
