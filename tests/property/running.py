"""Runs the state machine: from a seed, from a failure's blob, with a bug planted; and says how a failure is repeated.

Hypothesis keeps a failing run as a blob, `@reproduce_failure(VERSION, BLOB)`. ``pytest tests/property/test_state_machine.py --replay
PROFILE:BLOB`` runs just that, on any machine with the same version of Hypothesis and of this checkout. The profile belongs to it: it says how long a
run may be, and a longer run would be cut off in a shorter profile.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Collection

import hypothesis
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.property.machine import EngineMachine
from tests.property.planted import PLANTED, Plant, name_of
from tests.property.reports import PROFILES

_BLOB = re.compile(r"@reproduce_failure\('[^']+', b'([^']+)'\)")
_TEST = "tests/property/test_state_machine.py"


def planted(name: str) -> Plant:
    """The bug of this name. Raises ValueError, with the names that there are."""
    by_name = {name_of(plant): plant for plant in PLANTED}
    if name not in by_name:
        raise ValueError(f"there is no planted bug {name!r}: known are {', '.join(by_name)}")
    return by_name[name]


def run_machine(
    profile: settings,
    *,
    seed: int | None = None,
    replay: str | None = None,
    plant: str | None = None,
    cpus: Collection[int] | None = None,
    test: str = _TEST,
) -> None:
    """Run it, with workers on ``cpus`` if there are any. What it finds has the line that repeats it as its last note: ``test`` with
    ``--replay PROFILE:BLOB``."""

    class Machine(EngineMachine):
        """A class of its own, for the seed or the blob."""

    Machine.cpus = cpus
    machine: type[EngineMachine] = Machine
    if seed is not None:
        machine = hypothesis.seed(seed)(machine)
    if replay is not None:
        name, _, blob = replay.partition(":")
        if name not in PROFILES or not blob:
            raise ValueError(f"--replay {replay!r}: give PROFILE:BLOB, as the failure printed it")
        profile = settings(profile, stateful_step_count=PROFILES[name].stateful_step_count)
        machine = hypothesis.reproduce_failure(hypothesis.__version__, blob.encode())(machine)
    EngineMachine.begin_count()
    # Each run leaves cycles to be collected; what was there before need not be looked at for them each time.
    gc.freeze()
    try:
        with planted(plant)() if plant is not None else contextlib.nullcontext():
            run_state_machine_as_test(machine, settings=settings(profile, print_blob=True, report_multiple_bugs=False))
    except Exception as error:
        line = repeating_line(error, profile, plant=plant, test=test)
        if line is not None:
            error.add_note(f"To repeat it: {line}")
        raise
    finally:
        gc.unfreeze()


def repeating_line(
    error: BaseException, profile: settings, *, plant: str | None = None, test: str = _TEST
) -> str | None:
    """The command that repeats a failure, if Hypothesis says how."""
    for note in getattr(error, "__notes__", ()):
        match = _BLOB.search(note)
        if match is not None:
            options = f" --plant {plant}" if plant is not None else ""
            steps = profile.stateful_step_count
            name = next(name for name, known in PROFILES.items() if known.stateful_step_count == steps)
            return f"python -m pytest {test}{options} --replay '{name}:{match[1]}'"
    return None
