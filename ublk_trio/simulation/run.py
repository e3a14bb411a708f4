"""`simulate`: a run from its options and its source of decisions to what came of it."""

from __future__ import annotations

import logging
from collections import Counter

import attrs
import trio

from ublk_trio.kernel_sim import Choice, Choices, EventLog, KernelVersion, RecordedChoices, SimKernel, scheduled_by
from ublk_trio.simulation.clock import HangError, VirtualClock
from ublk_trio.simulation.faults import FAULTS, OF_THE_KERNEL, format_faults
from ublk_trio.simulation.plan import Plan, draw_plan
from ublk_trio.simulation.scenario import Scenario

_CPUS = 4


@attrs.frozen(kw_only=True)
class RunOptions:
    """What a run depends on besides its choices; ``seed`` is where those came from."""

    seed: int = 0
    #: What may be enabled; each run enables some of it.
    faults: frozenset[str] = frozenset(FAULTS)
    kernel_version: KernelVersion = attrs.Factory(lambda: KernelVersion(7, 3))
    #: Steps of the safety phase.
    steps: int = 300

    def command_line(self) -> str:
        """The command that repeats the run."""
        return (
            f"python -m ublk_trio sim --seed {self.seed} --faults {format_faults(self.faults)} "
            f"--kernel-version {self.kernel_version} --steps {self.steps}"
        )


@attrs.frozen(kw_only=True)
class Report:
    """What came of a run. ``problems`` is empty when all went well."""

    options: RunOptions
    plan: Plan
    #: Steps, disks, operations by name, and how many of them failed.
    counts: Counter[str]
    #: Faults that happened, by name. Late and reordered completions, late cancels and results are among ``choices`` only.
    faults: Counter[str]
    bytes_verified: int
    virtual_seconds: float
    problems: tuple[str, ...]
    choices: tuple[Choice, ...]
    log: EventLog

    @property
    def requests(self) -> int:
        """Operations of applications."""
        return sum(number for name, number in self.counts.items() if name not in ("steps", "disks", "failed"))


def simulate(options: RunOptions, choices: Choices) -> Report:
    """Do one run, in this thread, without a running Trio. Raises `ReplayDivergedError` when a replay does not fit."""
    kernel = SimKernel(choices, version=options.kernel_version, cpus=_CPUS, log=True, faults=frozenset())
    assert kernel.log is not None
    plan = draw_plan(choices, options.faults)
    choices.off = plan.off
    kernel.faults |= plan.faults & OF_THE_KERNEL
    scenario = Scenario(kernel, plan, steps=options.steps)
    problems = scenario.problems
    clock = VirtualClock(scenario.hang, kernel.let_time_pass)
    with scheduled_by(choices):
        try:
            trio.run(scenario.run, clock=clock)
        except trio.TrioInternalError as error:
            if not isinstance(error.__cause__, HangError):
                raise
            problems.append("nothing hangs: it cannot even be cancelled")
        except Exception as error:
            logging.getLogger("ublk_trio.simulation").debug("the run ended with an error", exc_info=True)
            problems.append(f"nothing fails unasked: {_describe(error)}")
    if isinstance(choices, RecordedChoices) and choices.diverged is not None:
        raise choices.diverged
    problems += [f"the kernel's contract: {violation}" for violation in kernel.violations]
    problems += [f"nothing is left: {thing}" for thing in kernel.leftovers()]
    problems += [f"each operation ends once: {text}" for text in _ended_otherwise(kernel.log)]
    return Report(
        options=options,
        plan=plan,
        counts=scenario.counts,
        faults=Counter(event[1] for event in kernel.log if event[0] == "fault"),
        bytes_verified=scenario.bytes_verified,
        virtual_seconds=clock.current_time(),
        problems=tuple(problems),
        choices=tuple(choices.trace),
        log=kernel.log,
    )


def _describe(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return ", ".join(_describe(each) for each in error.exceptions)
    return f"{type(error).__name__}: {error}"


def _ended_otherwise(log: EventLog) -> list[str]:
    """The operations that got a tag and did not end exactly once. (One that is refused at once never gets that far.)"""
    begun = dict.fromkeys(event[4] for event in log if event[0] == "request")
    ended = Counter(event[1] for event in log if event[0] == "bio-done")
    return [f"operation {number} ended {ended[number]} times" for number in begun if ended[number] != 1]
