"""`Raid1` in many runs, planned and random: see `raid1_run`."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.backends import raid1_run
from tests.backends.raid1_corpus import CORPUS, Planned, PlannedRun
from tests.backends.raid1_run import Program, programs, tapes
from ublk_trio.testing import TapeChoices


@pytest.mark.parametrize("run", CORPUS, ids=lambda run: run.about)
def test_planned_run(run: PlannedRun) -> None:
    """Nothing promised is lost, and members in sync are equal."""
    raid1_run.run(run.program, Planned(run.suspensions), Planned(()))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(programs(), tapes(), tapes())
def test_random_run(program: Program, choices: TapeChoices, crash: TapeChoices) -> None:
    """Members fail, go, come back and are rebuilt while requests go on and are cancelled: nothing promised is lost."""
    raid1_run.run(program, choices, crash)
