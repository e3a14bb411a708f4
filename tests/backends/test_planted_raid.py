"""Suites that cannot fail are none: each planted bug of raid0, concat and raid1 is found, by a promise that is broken."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.backends import raid1_run
from tests.backends.backend_model import Step, scripts
from tests.backends.planted_raid import PLANTED_RAID1, PLANTED_SPANNING, Plant, name_of
from tests.backends.raid1_corpus import CORPUS, Planned
from tests.backends.raid1_run import Program, programs, tapes
from tests.backends.raid_members import SECTOR
from tests.backends.test_raid0_concat import SIZE, check_kind_durable
from ublk_trio.testing import BrokenPromiseError, TapeChoices, kernel_choices

#: No shrinking, and the same examples every time: whether a bug is found must not be a matter of luck.
HUNT = settings(
    deadline=None,
    max_examples=600,
    phases=[Phase.generate],
    database=None,
    derandomize=True,
    print_blob=False,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of members fail as planned."""
    logger = logging.getLogger("ublk_trio")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("kind", "plant"),
    [
        pytest.param(kind, plant, id=f"{kind}-{name_of(plant)}")
        for kind, all_ in PLANTED_SPANNING.items()
        for plant in all_
    ],
)
def test_planted_bug_of_raid0_and_concat(kind: str, plant: Plant) -> None:
    """Found by what a script of requests, and then a power failure, leave; or because a member is used beyond its end."""

    @HUNT
    @given(scripts(SIZE, SECTOR), kernel_choices())
    def random_script(script: list[Step], crash: TapeChoices) -> None:
        check_kind_durable(kind, script, crash)

    with plant(), pytest.raises(AssertionError):
        random_script()


@pytest.mark.parametrize("plant", PLANTED_RAID1, ids=name_of)
def test_planted_bug_of_raid1(plant: Plant) -> None:
    """Found by a planned run, or else by a random one."""

    @HUNT
    @given(programs(), tapes(), tapes())
    def random_run(program: Program, choices: TapeChoices, crash: TapeChoices) -> None:
        raid1_run.run(program, choices, crash)

    def hunt() -> None:
        for run in CORPUS:
            raid1_run.run(run.program, Planned(run.suspensions), Planned(()))
        random_run()

    with plant(), pytest.raises(BrokenPromiseError):
        hunt()
