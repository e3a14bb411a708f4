"""A tag as the driver sees it: four flags, the buffer that its last command named, and the request on it.

| flags | meaning |
|---|---|
| none | not fetched in this incarnation |
| ACTIVE | a command is pending: the driver owns the tag, idle or with a request on its way |
| OWNED_BY_SRV | a request was delivered: the server owes a commit |
| OWNED_BY_SRV, NEED_GET_DATA | a WRITE was announced: the server owes NEED_GET_DATA |
| ACTIVE, NEED_GET_DATA | that came; the data is on its way |
| OWNED_BY_SRV, AUTO_BUF_REG | delivered, with its buffer registered in the server's ring |
| ACTIVE, CANCELED | the pending command was completed with ABORT; the tag is over |

**Supported.** The flags above. **Rejected.** Nothing here: `queue` checks. **Differs from Linux.** The flags' values.

A command names its buffer by an **address**, and comes from a **task**. For a raw ring these are an address in its
process's memory and a `process.SimTask`; for the engine's packed ring the number of a slot plus one, and the thread.
Address 0 is none.
"""

from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block import Request
    from ublk_trio.kernel_sim.queue import CommandRing


class TagFlag(IntFlag):
    """The driver's ``UBLK_IO_FLAG_*``."""

    ACTIVE = 1
    OWNED_BY_SRV = 2
    NEED_GET_DATA = 4
    AUTO_BUF_REG = 8
    CANCELED = 16


# Plain integers for the path that every request takes.
ACTIVE: Final = int(TagFlag.ACTIVE)
OWNED_BY_SRV: Final = int(TagFlag.OWNED_BY_SRV)
NEED_GET_DATA: Final = int(TagFlag.NEED_GET_DATA)
AUTO_BUF_REG: Final = int(TagFlag.AUTO_BUF_REG)
CANCELED: Final = int(TagFlag.CANCELED)


class SimTag:
    """One tag of one queue."""

    __slots__ = (
        "address",
        "auto_buffer",
        "auto_ring",
        "committed",
        "deadline",
        "delivered_flags",
        "flags",
        "poisoned_bytes",
        "request",
        "result",
        "ring",
        "sectors_copied",
        "shared",
        "shared_address",
        "tag",
        "task",
        "uses",
    )

    # Not there before the command or the delivery that they are about.
    #: AUTO_BUF_REG: the word that the last command carried, and where the request's buffer was registered.
    auto_buffer: int
    auto_ring: CommandRing
    #: What the delivery to a raw ring adds to the request's flags.
    delivered_flags: int
    #: How much of a WRITE's data was copied to a raw ring's server; -1 where nothing was.
    sectors_copied: int
    #: When the request's time is up; kept where somebody would mind.
    deadline: float
    #: Of the commit, with `committed`.
    result: int

    def __init__(self, tag: int) -> None:
        self.tag = tag
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new server may fetch it."""
        self.flags = 0
        self.address = 0
        self.request: Request | None = None
        #: Where the pending command came from, and will be completed.
        self.ring: CommandRing | None = None
        #: References to the request's data, besides the server's own until it commits.
        self.uses = 0
        #: A commit came while there were such references: the request ends with the last of them.
        self.committed = False
        #: The request's data lies in memory that it shares with the server: where, as the descriptor says it.
        self.shared = False
        self.shared_address: int | None = None
        #: The daemon: who fetched it.
        self.task: object = None
        #: How much of the buffer is poison, or 0 when it is the server's to use.
        self.poisoned_bytes = 0

    def __repr__(self) -> str:
        return f"<tag {self.tag} {TagFlag(self.flags)!r} address {self.address:#x} {self.request}>"
