"""What an application knows of the part of a disk that is its own, and whether what it got back is right.

One operation at a time works on a region. So each block has one content, or, after a write that failed, one of two.
"""

from __future__ import annotations

from ublk_trio.simulation.disk import Failure


class Region:
    """Some blocks of a disk, from ``start`` (bytes) on, and what each may hold."""

    def __init__(self, *, start: int, blocks: int, block_bytes: int) -> None:
        self.start = start
        self.blocks = blocks
        self.block_bytes = block_bytes
        self.busy = False
        self._zeroes = bytes(block_bytes)
        self._allowed: list[set[bytes]] = [{self._zeroes} for _ in range(blocks)]

    def contents(self, number: int, first: int, count: int) -> list[bytes]:
        """What the write with this number puts into each of the blocks: no two are alike."""
        place = self.start // self.block_bytes + first
        return [(number << 32 | place + index).to_bytes(8, "big") * (self.block_bytes // 8) for index in range(count)]

    def zeroes(self, count: int) -> list[bytes]:
        return [self._zeroes] * count

    def written(self, first: int, contents: list[bytes], *, surely: bool) -> None:
        """The blocks hold this now; unless it is sure, or what they held before."""
        for block, content in enumerate(contents, first):
            self._allowed[block] = {content} if surely else self._allowed[block] | {content}

    def wrong_block(self, first: int, data: bytes) -> int | None:
        """The first block that was read and cannot be so. What was right is known from now on."""
        for index in range(len(data) // self.block_bytes):
            content = data[index * self.block_bytes : (index + 1) * self.block_bytes]
            if content not in self._allowed[first + index]:
                return first + index
            self._allowed[first + index] = {content}
        return None


#: The calls of a backend that an operation of an application becomes.
CALLS = {
    "read": ("read",),
    "write": ("write",),
    "fua-write": ("write",),
    "flush": ("flush",),
    "discard": ("discard",),
    "write-zeroes": ("write_zeroes",),
}


def causes(failures: list[Failure], operation: str, offset: int, length: int) -> set[int]:
    """The errnos that these failures of a backend's calls must give the operation."""
    return {
        failure.number for failure in failures if failure.name in CALLS[operation] and failure.touches(offset, length)
    }
