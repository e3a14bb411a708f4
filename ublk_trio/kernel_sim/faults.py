"""What can go wrong, by name: one table for the simulator, for the tests that inject it, and for `docs/faults.md`.

A fault is an option of a choice: where it could happen the kernel asks its `Choices`, and **it asks only while the
fault is enabled** (``SimKernel(faults=...)``). So a run with faults is still its list of answers, option 0 still means
that nothing goes wrong, and a run in which a fault is not enabled is not even asked about it.

**Supported.** The faults of `FAULTS`. Those marked ``ordinary`` are what a healthy kernel does at any time; they are
enabled unless a set is given. The layers ring, commands and process are injected by the simulator itself, backend and
storage by what stands under the engine: a test's own disk, or `ublk_trio.testing`.
**Rejected.** Names that the table does not have: ValueError.
**Differs from Linux.** Every fault stays within what the driver's contract permits, with one exception: storage that
loses, misplaces or does not settle writes breaks its own contract, and is there for the oracle that must notice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from types import MappingProxyType

import attrs


class Layer(Enum):
    """Who misbehaves, from the kernel down to the medium."""

    RING = "ring"
    COMMANDS = "commands"
    PROCESS = "process"
    BACKEND = "backend"
    STORAGE = "storage"


LAYER_MEANING: Mapping[Layer, str] = MappingProxyType(
    {
        Layer.RING: "when and in which order the server hears of what is ready",
        Layer.COMMANDS: "what becomes of control commands",
        Layer.PROCESS: "the server's own life",
        Layer.BACKEND: "what the disk's methods do",
        Layer.STORAGE: "what becomes of the bytes that a backend has put away",
    }
)


@attrs.frozen(kw_only=True)
class Fault:
    """One thing that can go wrong. ``choices`` are the questions that are asked of `Choices` while it is enabled."""

    name: str
    layer: Layer
    happens: str
    permitted: str
    choices: tuple[str, ...]
    ordinary: bool = False


#: One entry a fault; a new one is offered by asking `SimKernel.strikes`, or its choice where its name is in `SimKernel.faults`.
FAULTS: tuple[Fault, ...] = (
    Fault(
        name="completions-late",
        layer=Layer.RING,
        happens="a reap finds only a part of what is ready, or nothing; the rest comes with a later one",
        permitted="io_uring promises no moment for a completion, only that it comes and wakes who waits",
        choices=("reap-left-behind",),
        ordinary=True,
    ),
    Fault(
        name="completions-reordered",
        layer=Layer.RING,
        happens="a reap finds what is ready in another order than it became so",
        permitted="requests of different tags are independent: the driver completes each from its own task work",
        choices=("reap-next",),
        ordinary=True,
    ),
    Fault(
        name="spurious-wake-up",
        layer=Layer.RING,
        happens="a wait ends although nothing is ready",
        permitted="a poll or an eventfd says that something may have come, not that it did",
        choices=("spurious-wake-up",),
        ordinary=True,
    ),
    Fault(
        name="worker-late",
        layer=Layer.RING,
        happens="what is handed to a worker is with the kernel only when the engine next reaps or waits",
        permitted="a worker is another thread: it sends answers when it gets to it, in their order",
        choices=("worker-late",),
        ordinary=True,
    ),
    Fault(
        name="copy-short",
        layer=Layer.RING,
        happens="a pread or pwrite of user copy moves only half of what was asked for",
        permitted="it ends where the server's memory cannot be had; 6.12 and 7.3 then return what was moved until there",
        choices=("copy-short",),
    ),
    Fault(
        name="late-cancel",
        layer=Layer.COMMANDS,
        happens="a control command whose caller is cancelled is carried out all the same",
        permitted="a command that has begun is not undone: cancelling it in io_uring finds it running",
        choices=("command-before-cancel",),
        ordinary=True,
    ),
    Fault(
        name="held-longer",
        layer=Layer.COMMANDS,
        happens="a control command's result comes some passes of the scheduler after its effect",
        permitted="control commands run in a kernel worker, which completes them when it gets to it",
        choices=("held-longer",),
    ),
    Fault(
        name="no-memory",
        layer=Layer.COMMANDS,
        happens="ADD_DEV or START_DEV fails with ENOMEM and has done nothing",
        permitted="both allocate: the queues and the tag set; the disk",
        choices=("no-memory",),
    ),
    Fault(
        name="interrupted",
        layer=Layer.COMMANDS,
        happens="EINTR: ADD_DEV, or START_DEV while it waits for the queues, has done nothing; DEL_DEV has removed the "
        "device and does not wait for its last user",
        permitted="they sleep interruptibly (START_DEV, DEL_DEV) or killably (ADD_DEV), in a task that may get a signal",
        choices=("interrupted",),
    ),
    Fault(
        name="server-killed",
        layer=Layer.PROCESS,
        happens="the server dies just before a call of a ring: its rings and its char devices close",
        permitted="anybody may be killed at any moment; between two calls of a ring the kernel sees no difference",
        choices=("server-killed",),
    ),
    Fault(
        name="backend-raises",
        layer=Layer.BACKEND,
        happens="a method raises OSError, or an exception that is a bug, perhaps after half of a write",
        permitted="a request may fail with any errno; a write that failed may have been done in part",
        choices=("outcome", "errno"),
    ),
    Fault(
        name="backend-short",
        layer=Layer.BACKEND,
        happens="a read or a write does only its first blocks, and says so",
        permitted="the rest of a short read is delivered again; a short write must fail (contract: completion)",
        choices=("outcome", "short by"),
    ),
    Fault(
        name="backend-slow",
        layer=Layer.BACKEND,
        happens="an async method suspends for a pass of the scheduler, once or more",
        permitted="a privileged device's requests have no timeout",
        choices=("suspensions",),
    ),
    Fault(
        name="backend-hangs",
        layer=Layer.BACKEND,
        happens="an async method suspends until it is released or cancelled, and may suspend again to clean up",
        permitted="a privileged device's requests have no timeout; a stop is bounded all the same",
        choices=("suspensions", "suspend …", "clean up"),
    ),
    Fault(
        name="backend-busy",
        layer=Layer.BACKEND,
        happens="a method raises ENOMEM, at once or after it suspended: the backend is out of resources for now",
        permitted="no request fails by that: it waits in line, and is tried again",
        choices=("outcome",),
    ),
    Fault(
        name="lost-cache",
        layer=Layer.STORAGE,
        happens="in a crash some of the writes since the last flush are lost, each whole",
        permitted="a disk with a volatile cache promises durability by FLUSH and FUA only",
        choices=("crash keeps", "write survives"),
        ordinary=True,
    ),
    Fault(
        name="torn-write",
        layer=Layer.STORAGE,
        happens="in a crash of writes since the last flush some sectors of 512 bytes survive, others not",
        permitted="the only unit that a disk writes atomically is its logical block",
        choices=("crash keeps", "sector survives"),
        ordinary=True,
    ),
    Fault(
        name="lost-write",
        layer=Layer.STORAGE,
        happens="a write is acknowledged and never done",
        permitted="by no contract: for the oracle, and for backends that promise to notice",
        choices=("lost-write",),
    ),
    Fault(
        name="misdirected-write",
        layer=Layer.STORAGE,
        happens="a write lands at another place of the medium",
        permitted="by no contract: for the oracle, and for backends that promise to notice",
        choices=("misdirected-write", "misdirected to"),
    ),
    Fault(
        name="lying-flush",
        layer=Layer.STORAGE,
        happens="a flush returns and has settled nothing",
        permitted="by no contract: for the oracle, and for backends that promise to notice",
        choices=("lying-flush",),
    ),
)
BY_NAME: Mapping[str, Fault] = MappingProxyType({fault.name: fault for fault in FAULTS})
assert len(BY_NAME) == len(FAULTS), "a fault's name is its own"
#: What is enabled unless somebody says otherwise.
ORDINARY: frozenset[str] = frozenset(fault.name for fault in FAULTS if fault.ordinary)


def of_layers(*layers: Layer) -> frozenset[str]:
    """The names of these layers' faults."""
    return frozenset(fault.name for fault in FAULTS if fault.layer in layers)


def enabled(names: Collection[str] | None) -> set[str]:
    """The set to begin with: ``names``, or `ORDINARY` for None. Raises ValueError for a name that there is not."""
    if names is None:
        return set(ORDINARY)
    unknown = sorted(set(names) - set(BY_NAME))
    if unknown:
        raise ValueError(f"there is no fault {', '.join(unknown)}: known are {', '.join(BY_NAME)}")
    return set(names)
