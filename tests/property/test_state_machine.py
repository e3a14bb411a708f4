"""The state machine, on an engine that is as it should be."""

from __future__ import annotations

import time

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.property.machine import EngineMachine
from tests.property.reports import PROFILE, SETTINGS


def test_engine_and_kernel_agree_whatever_happens() -> None:
    """Every request ends exactly once with the right bytes, in any interleaving, and nothing is left of a target."""
    EngineMachine.begin_count()
    began = time.process_time()
    run_state_machine_as_test(EngineMachine, settings=settings(SETTINGS))
    seconds = time.process_time() - began
    print(
        f"profile {PROFILE}: {EngineMachine.runs} runs, {EngineMachine.steps} steps, "
        f"{EngineMachine.steps / seconds:.0f} steps per CPU second"
    )
