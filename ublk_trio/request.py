"""A request: what the kernel asks of one tag. One object per tag, made once and reused for every request that
passes."""

from __future__ import annotations

from ublk_trio.uapi import OP_MASK, SECTOR_SHIFT, IoOp

_HAS_DATA = (int(IoOp.READ), int(IoOp.WRITE))


class Request:
    """The request that a tag carries now; meaningful only while the tag is SERVING or waits for its data or buffer."""

    __slots__ = ("buffer", "data", "done", "flags", "length", "offset", "op", "success", "tag")

    #: An `IoOp` number, and the `IoFlag` bits.
    op: int
    flags: int
    #: Bytes.
    offset: int
    length: int
    #: The result that means "all of it": the length for READ and WRITE; 0 for the others, because a range of
    #: 2 GiB or more does not fit the kernel's signed 32-bit result.
    success: int
    #: Bytes in front of `offset` that were read already, if the rest of a short READ is what this asks for.
    done: int
    #: The tag's buffer, whole: `buffer` to fill for READ, `data` (the same memory, read-only) for WRITE.
    buffer: memoryview
    data: memoryview

    def __init__(self, tag: int) -> None:
        self.tag = tag
        self.op = self.flags = self.offset = self.length = self.success = self.done = 0
        self.buffer = self.data = memoryview(b"")

    def load(self, op_flags: int, nr_sectors: int, start_sector: int) -> None:
        """Take over a descriptor: op in bits 0-7 and flags above, then the range in sectors of 512 bytes."""
        self.op = op = op_flags & OP_MASK
        self.flags = op_flags
        self.offset = start_sector << SECTOR_SHIFT
        self.length = length = nr_sectors << SECTOR_SHIFT
        self.success = length if op in _HAS_DATA else 0
        self.done = 0

    def read_on(self, count: int) -> None:
        """The first ``count`` bytes of a READ are in the buffer: from now on this asks for the rest."""
        self.done += count
        self.offset += count
        self.length -= count
        self.success = self.length
        self.buffer = self.buffer[count:]

    def __str__(self) -> str:
        name = IoOp(self.op).name if self.op in IoOp._value2member_map_ else f"op {self.op}"
        if self.op == IoOp.FLUSH:  # of the whole disk: the kernel sends all ones, or nothing, in place of a sector
            return name
        return f"{name} of {self.length} bytes at {self.offset}"
