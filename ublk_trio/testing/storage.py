"""`Storage`: a storage medium with a volatile cache, for a backend to keep its bytes on, that can crash.

Facts about disks that it models, and what follows:

- A write that was acknowledged may be in the disk's cache only. A flush settles all writes before it; a write with FUA settles itself.
- When power fails, of the unsettled writes **any** survive, in no order; and a write that survives may be torn: the only unit that is
  written whole is a sector.
- A process that dies takes its own memory with it, but nothing of what it wrote.

So a backend that survives every `crash` keeps its promises on any disk that keeps its own. The faults that no disk may have (lost and
misdirected writes, flushes that lie) are for backends that promise to notice, and for proving that a test does.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from ublk_trio.kernel_sim.choices import Choices, FirstChoice
from ublk_trio.kernel_sim.faults import enabled

#: The unit that is written whole or not at all, bytes.
SECTOR_BYTES: Final = 512
#: A broken disk breaks one write or flush in so many, where choices are drawn evenly.
_FAULT_OPTIONS: Final = 4


class Storage:
    """``size`` bytes, at first zeroes. Not a backend: what a backend writes to. Nothing blocks.

    ``choices`` decides what survives a crash, ``faults`` (names of `kernel_sim.faults.FAULTS`; None: the ordinary ones) what may
    go wrong.
    """

    def __init__(self, size: int, *, choices: Choices | None = None, faults: Collection[str] | None = None) -> None:
        assert size > 0
        assert size % SECTOR_BYTES == 0, f"{size} bytes are no whole number of sectors"
        self.size = size
        self.choices = choices if choices is not None else FirstChoice()
        self.faults = faults if isinstance(faults, set) else enabled(faults)
        self._stable = bytearray(size)
        self._current = bytearray(size)
        #: Since the last flush, in order: offset, data, and whether it settled itself.
        self._unsettled: list[tuple[int, bytes, bool]] = []
        self._gone = False

    def read(self, offset: int, buffer: memoryview | bytearray) -> None:
        """Fill ``buffer`` with what was written last."""
        assert 0 <= offset <= self.size - len(buffer), "read out of bounds"
        buffer[:] = self._current[offset : offset + len(buffer)]

    def write(self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False) -> None:
        """Whole sectors; into the cache, or with ``fua`` settled when this returns."""
        assert 0 <= offset <= self.size - len(data), "written out of bounds"
        assert not (offset | len(data)) % SECTOR_BYTES, "whole sectors are written"
        if self._gone or self._strikes("lost-write"):
            return
        if self._strikes("misdirected-write"):
            sectors = (self.size - len(data)) // SECTOR_BYTES
            offset = SECTOR_BYTES * self.choices.choose("misdirected to", min(sectors + 1, 256))
        self._current[offset : offset + len(data)] = data
        self._unsettled.append((offset, bytes(data), fua))

    def flush(self) -> None:
        """Settle every write so far."""
        if self._gone or self._strikes("lying-flush"):
            return
        self._stable[:] = self._current
        self._unsettled.clear()

    def crash(self) -> Storage:
        """Power fails. Returns the storage as it is found afterwards; writes to this one go nowhere any more."""
        return self._successor(self._survivors())

    def restart(self) -> Storage:
        """The process that used it died, the machine goes on. Returns the same storage for the next process."""
        after = self._successor(self._stable)
        after._current[:] = self._current
        after._unsettled = self._unsettled
        return after

    def _successor(self, content: bytearray) -> Storage:
        self._gone = True
        after = Storage(self.size, choices=self.choices, faults=self.faults)
        after._stable[:] = content
        after._current[:] = content
        return after

    def _survivors(self) -> bytearray:
        if not self.faults & {"lost-cache", "torn-write"} or not self._unsettled:
            return self._current
        kept = ("all", "some", "none")[self.choices.choose("crash keeps", 3 if "lost-cache" in self.faults else 2)]
        for offset, data, settled in self._unsettled:
            if settled or kept == "all":
                self._stable[offset : offset + len(data)] = data
            elif kept == "some":
                self._keep_some(offset, data)
        return self._stable

    def _keep_some(self, offset: int, data: bytes) -> None:
        if "torn-write" not in self.faults:
            if self.choices.choose("write survives", 2) == 0:
                self._stable[offset : offset + len(data)] = data
            return
        for start in range(0, len(data), SECTOR_BYTES):
            if self.choices.choose("sector survives", 2) == 0:
                self._stable[offset + start : offset + start + SECTOR_BYTES] = data[start : start + SECTOR_BYTES]

    def _strikes(self, fault: str) -> bool:
        return fault in self.faults and self.choices.choose(fault, _FAULT_OPTIONS) == _FAULT_OPTIONS - 1
