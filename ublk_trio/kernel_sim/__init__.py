"""A Linux kernel's ublk driver and block layer, simulated in this process.

`SimKernel` is to the engine what the real kernel is, and `SimKernel.block_device` gives what an application sees of the
disks. No root, no Linux, no time and no chance: every free decision comes from one `Choices`, so a run replays exactly.
Each module says what it supports, what it rejects and where it differs from Linux.
"""

from ublk_trio.kernel_sim.block import Bio, SimBlockDevice, SimBlockFile
from ublk_trio.kernel_sim.checks import SimulatedOopsError, SimulatorViolationError, Violation
from ublk_trio.kernel_sim.choices import (
    Choice,
    Choices,
    DrawnChoices,
    FirstChoice,
    RecordedChoices,
    ReplayDivergedError,
    SeededChoices,
    exhaust,
    hypothesis_choices,
)
from ublk_trio.kernel_sim.event_log import EventLog
from ublk_trio.kernel_sim.kernel import SimKernel
from ublk_trio.kernel_sim.scheduling import scheduled_by
from ublk_trio.kernel_sim.version import KernelVersion

__all__ = [
    "Bio",
    "Choice",
    "Choices",
    "DrawnChoices",
    "EventLog",
    "FirstChoice",
    "KernelVersion",
    "RecordedChoices",
    "ReplayDivergedError",
    "SeededChoices",
    "SimBlockDevice",
    "SimBlockFile",
    "SimKernel",
    "SimulatedOopsError",
    "SimulatorViolationError",
    "Violation",
    "exhaust",
    "hypothesis_choices",
    "scheduled_by",
]
