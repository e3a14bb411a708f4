"""`Concat`: members one after the other, so that a disk is as large as all of them together."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from ublk_trio.backends.base import Backend
from ublk_trio.backends.spanning import Piece, Spanning
from ublk_trio.errors import UsageError


class Concat(Spanning):
    """A disk of its members' whole blocks, in order. Members may differ in size.

    While it is open only the last member may be resized: all that comes after another one would move. So the part that
    another one has stays what it was.

    Args:
        bases: its members, in their order.

    Raises:
        UsageError: (from `open`) a member has not even one block.
    """

    def __init__(self, bases: Sequence[Backend]) -> None:
        super().__init__(bases)
        #: Where each member's part begins on the disk; known while it is open.
        self._starts: list[int] = []

    async def aclose(self) -> None:
        """Closes the members. They may be resized until it is opened again."""
        self._starts = []
        await super().aclose()

    def settle(self) -> None:
        """The size follows the last member; at first, all."""
        super().settle()
        parts = [base.backend.size // self.block_size * self.block_size for base in self.bases]
        if 0 in parts:
            small = self.bases[parts.index(0)].backend
            raise UsageError(f"concat: {small} is smaller than a block of {self.block_size} bytes: leave it out")
        if not self._starts:
            self._starts = [0, *accumulate(parts[:-1])]
        self.size = self._starts[-1] + parts[-1]

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """Cut where a member ends."""
        start = 0
        while start < length:
            number = bisect_right(self._starts, offset + start) - 1
            part_ends = self._starts[number + 1] if number + 1 < len(self._starts) else self.size
            end = min(length, part_ends - offset)
            assert start < end, f"{offset}+{length} lies beyond the disk's end at {self.size}"
            yield Piece(base=self.bases[number], offset=offset + start - self._starts[number], start=start, end=end)
            start = end
