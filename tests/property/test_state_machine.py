"""The state machine, on an engine that is as it should be."""

from __future__ import annotations

import time

import pytest

from tests.property.machine import EngineMachine
from tests.property.reports import PROFILE, SETTINGS
from tests.property.running import run_machine


def test_engine_and_kernel_agree_whatever_happens(pytestconfig: pytest.Config) -> None:
    """Every request ends exactly once with the right bytes, in any interleaving, and nothing is left of a target."""
    began = time.process_time()
    run_machine(
        SETTINGS,
        replay=pytestconfig.getoption("--replay", default=None),
        plant=pytestconfig.getoption("--plant", default=None),
    )
    seconds = time.process_time() - began
    print(
        f"profile {PROFILE}: {EngineMachine.runs} runs, {EngineMachine.steps} steps, "
        f"{EngineMachine.steps / seconds:.0f} steps per CPU second"
    )
