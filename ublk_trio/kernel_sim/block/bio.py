"""A bio: one operation of an application, or of the kernel itself, on a disk.

**Supported.** Operations that end when all their parts have, with the first error; a second phase after the parts (the
zeroes that are written where zeroing is refused); integrity metadata that travels with the data.
**Rejected.** Nothing here: `disk` checks.
**Differs from Linux.** One bio is one operation, however long: Linux chains several. Cancelling a wait does not stop the
operation, and the application is free at once: a real one would sleep on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from ublk_trio.uapi import IoOp

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block.disk import SimDisk


class Bio:
    """One operation. ``result`` is bytes, or a negative errno; None until ``done``."""

    __slots__ = (
        "_error",
        "_event",
        "_on_end",
        "_parts",
        "data",
        "disk",
        "done",
        "length",
        "metadata",
        "number",
        "offset",
        "op",
        "result",
    )

    def __init__(self, number: int, op: int, offset: int, length: int, data: memoryview) -> None:
        self.number = number
        self.op = op
        self.offset = offset
        self.length = length
        self.data = data
        #: Integrity metadata, for disks that have any.
        self.metadata: memoryview | None = None
        self.done = False
        self.result: int | None = None
        self.disk: SimDisk | None = None
        self._parts = 1
        self._error = 0
        self._event: trio.Event | None = None
        self._on_end: Callable[[int], bool] | None = None

    def __repr__(self) -> str:
        return f"<bio {self.number} {IoOp(self.op).name} {self.offset}+{self.length} {self.result}>"

    async def wait(self) -> int:
        """Wait for the end and return `result`; a checkpoint. Cancelling gives up the wait, not the operation.

        Who waits lets go of what is still plugged.
        """
        if self.disk is not None and self.disk.plugs:
            self.disk.unplug()
        if self.done:
            await trio.lowlevel.checkpoint()
        else:
            if self._event is None:
                self._event = trio.Event()
            await self._event.wait()
        assert self.result is not None
        return self.result

    def expect(self, parts: int, on_end: Callable[[int], bool] | None = None) -> None:
        """So many parts come; ``on_end(error)`` may start more of them and then returns True."""
        assert parts > 0
        self._parts = parts
        self._error = 0
        self._on_end = on_end

    def part_ended(self, error: int) -> None:
        """A part is over, with an errno or 0."""
        self._parts -= 1
        if error and not self._error:
            self._error = error
        if not self._parts:
            on_end, self._on_end = self._on_end, None
            if on_end is None or not on_end(self._error):
                self.finish(-self._error if self._error else self.length)

    def finish(self, result: int) -> None:
        """The operation is over."""
        assert not self.done
        self.done = True
        self.result = result
        if self._event is not None:
            self._event.set()
        if self.disk is not None:
            self.disk.bio_finished(self)
