"""What can go wrong in a run, by name.

Most are of the simulator's own table, `kernel_sim.faults`. Each is offered only where the contracts permit it: a kernel
may do it to a server, a backend to the engine, an operator to a device. A right engine stands all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ublk_trio.errors import UsageError
from ublk_trio.kernel_sim.faults import BY_NAME, Layer, of_layers

#: Those that a run injects besides the ones that `kernel_sim.faults` describes, by name: what each is.
_OF_THE_RUN: Mapping[str, str] = MappingProxyType(
    {
        "start-cancelled": "whoever starts a disk is cancelled",
        "stopped-by-others": "another program stops and deletes the device",
    }
)
_FROM_THE_TABLE = (
    "completions-late",
    "completions-reordered",
    "spurious-wake-up",
    "late-cancel",
    "held-longer",
    "no-memory",
    "interrupted",
    "server-killed",
    "backend-raises",
    "backend-short",
    "backend-slow",
)
#: Every fault that a run may have, by name: what happens.
FAULTS: Mapping[str, str] = MappingProxyType(
    {**{name: BY_NAME[name].happens for name in _FROM_THE_TABLE}, **_OF_THE_RUN}
)
#: Those that the simulated kernel injects by itself. It would kill the server of all devices; a run kills that of one.
OF_THE_KERNEL = of_layers(Layer.RING, Layer.COMMANDS) & set(FAULTS)

#: The kernel's and Trio's other free decisions: no fault in any of them. A run has each of them free, or calm.
DECISIONS = ("cpu", "merge-waiting", "release-late", "settle", "tag", "task", "waiter")


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
