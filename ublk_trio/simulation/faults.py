"""What can go wrong in a run, by name.

Each fault is offered only where the contracts permit it: a kernel may do it to a server, a backend to the engine, an
operator to a device. A right engine stands all of them. Those with ``choices`` are decisions of the simulated kernel,
which it takes calmly when the fault is off; the others are injected by the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import attrs

from ublk_trio.errors import UsageError


@attrs.frozen(kw_only=True)
class Fault:
    """One way for a run to be troubled. ``choices`` are the names of the kernel's questions that it consists of."""

    name: str
    layer: str
    text: str
    choices: frozenset[str] = frozenset()


#: Every fault, by name.
FAULTS: Mapping[str, Fault] = MappingProxyType(
    {
        fault.name: fault
        for fault in (
            Fault(
                name="late-completions",
                layer="ring",
                text="a reap finds some of what is ready, in any order",
                choices=frozenset({"reap-left-behind", "reap-next"}),
            ),
            Fault(
                name="spurious-wake-ups",
                layer="ring",
                text="a wait ends though nothing is ready",
                choices=frozenset({"spurious-wake-up"}),
            ),
            Fault(
                name="late-cancels",
                layer="commands",
                text="a control command whose caller was cancelled is carried out all the same",
                choices=frozenset({"command-before-cancel"}),
            ),
            Fault(name="backend-error", layer="backend", text="a method raises OSError, a write when half is done"),
            Fault(name="backend-bug", layer="backend", text="a method raises what it should not"),
            Fault(name="backend-short", layer="backend", text="a read or write does a part of what it was asked"),
            Fault(name="backend-slow", layer="backend", text="an async method takes up to 200 ms"),
            Fault(name="start-cancelled", layer="engine", text="whoever starts a disk is cancelled"),
            Fault(name="stopped-by-others", layer="process", text="another program stops and deletes the device"),
            Fault(
                name="server-killed", layer="process", text="the kernel takes the device's rings and descriptor away"
            ),
        )
    }
)

#: The kernel's and Trio's other free decisions: no fault in any of them. A run has each of them free, or calm.
DECISIONS = ("partition-scan-later", "queue", "settle", "tag", "task")


def parse_faults(text: str) -> frozenset[str]:
    """``all``, ``none``, or names separated by commas. Raises `UsageError` for a name that there is not."""
    if text in ("all", "none"):
        return frozenset(FAULTS) if text == "all" else frozenset()
    names = frozenset(name.strip() for name in text.split(","))
    unknown = sorted(names - set(FAULTS))
    if unknown:
        raise UsageError(f"there is no fault {unknown[0]!r}: known are all, none, {', '.join(FAULTS)}")
    return names


def format_faults(faults: frozenset[str]) -> str:
    """The opposite of `parse_faults`."""
    if faults == set(FAULTS):
        return "all"
    return ",".join(name for name in FAULTS if name in faults) or "none"
