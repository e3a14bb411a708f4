"""What a run consists of, decided before anything else: the swarm.

A run that does everything at once hides what only shows when some things do not happen. So the first choices of a run
switch each kind of operation, each fault that is allowed and each free decision on or off, and set the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import attrs

from ublk_trio.kernel_sim import Choices
from ublk_trio.kernel_sim.version import KernelVersion
from ublk_trio.options import DataMode, DeviceOptions
from ublk_trio.simulation.faults import DECISIONS, FAULTS
from ublk_trio.uapi import FEATURE_RELEASE, Feature

T = TypeVar("T")

#: What applications may do besides reading and writing.
OPTIONAL_OPERATIONS = ("flush", "fua-write", "discard", "write-zeroes")
_QUEUES = (1, 2, 4)
_DEPTHS = (4, 1, 2, 16, 64)
_BLOCK_BYTES = (512, 4096)
_IO_BYTES_MAX = (64 << 10, 4096, 16 << 10)
_POOL_BUFFERS = (4, 1, 2)


@attrs.frozen(kw_only=True)
class Plan:
    """What is enabled in one run."""

    faults: frozenset[str]
    #: Names of questions that are not asked in this run.
    off: frozenset[str]
    operations: tuple[str, ...]
    disks_max: int
    #: Regions of each disk; one application uses each.
    regions: int
    #: Blocks of each region, and of the longest operation.
    blocks: int
    serve_async: tuple[bool, ...]


@attrs.frozen(kw_only=True)
class DiskPlan:
    """What one disk is made of."""

    options: DeviceOptions
    serve_async: bool
    block_bytes: int


def draw_plan(choices: Choices, allowed: frozenset[str]) -> Plan:
    """Decide what is enabled; no fault that is not allowed."""
    faults = frozenset(name for name in FAULTS if name in allowed and choices.choose(f"enable {name}", 2))
    off = frozenset(name for name in DECISIONS if not choices.choose(f"free {name}", 2))
    optional = [name for name in OPTIONAL_OPERATIONS if choices.choose(f"enable {name}", 2)]
    return Plan(
        faults=faults,
        off=off,
        operations=("read", "write", *optional),
        disks_max=1 + choices.choose("disks", 3),
        regions=_one_of(choices, "regions", (4, 1, 2, 8)),
        blocks=_one_of(choices, "blocks", (8, 1, 64)),
        serve_async=_one_of(choices, "serving", ((False,), (True,), (False, True))),
    )


def draw_disk(choices: Choices, plan: Plan, dev_id: int, version: KernelVersion) -> DiskPlan:
    """Decide what one disk of the run is made of, on a kernel of that release."""
    has_user_copy = version >= FEATURE_RELEASE[Feature.USER_COPY]
    options = DeviceOptions(
        dev_id=dev_id,
        queues=_one_of(choices, "queues", _QUEUES),
        depth=_one_of(choices, "depth", _DEPTHS),
        max_io_bytes=_one_of(choices, "largest request", _IO_BYTES_MAX),
        mode=_one_of(choices, "mode", tuple(DataMode) if has_user_copy else (DataMode.COPY, DataMode.GET_DATA)),
        pool_buffers=_one_of(choices, "pool", _POOL_BUFFERS),
    )
    return DiskPlan(
        options=options,
        serve_async=_one_of(choices, "async", plan.serve_async),
        block_bytes=_one_of(choices, "block", _BLOCK_BYTES),
    )


def _one_of(choices: Choices, what: str, options: Sequence[T]) -> T:
    return options[choices.choose(what, len(options))]
