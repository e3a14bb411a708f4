"""A suite that cannot fail is no suite: it must find each planted bug, and say so by an invariant."""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.property.machine import EngineMachine
from tests.property.model import BrokenError
from tests.property.planted import PLANTED, Plant, name_of
from tests.property.reports import CAUGHT, PROFILES, Caught

#: No shrinking, and the same examples every time: whether a bug is found must not be a matter of luck.
HUNT = settings(PROFILES["ci"], phases=[Phase.generate], database=None, derandomize=True, print_blob=False)


@pytest.mark.parametrize("plant", PLANTED, ids=name_of)
def test_planted_bug_is_caught(plant: Plant) -> None:
    """The state machine finds this bug within the budget of CI, as a broken invariant and not as a crash of its own."""
    EngineMachine.begin_count()
    with plant(), pytest.raises(BrokenError):
        run_state_machine_as_test(EngineMachine, settings=HUNT)
    examples, broken = EngineMachine.broken[0]
    CAUGHT.append(Caught(bug=name_of(plant), examples=examples, invariant=broken.invariant))
