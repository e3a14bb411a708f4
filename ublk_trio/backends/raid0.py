"""`Raid0`: striping, so that a disk is as fast as all its members together.

Strip number n is on member n % members, as its strip number n // members. A lost member is a lost disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ublk_trio.backends.base import Backend
from ublk_trio.backends.sizes import format_size
from ublk_trio.backends.spanning import Piece, Spanning
from ublk_trio.errors import UsageError


class Raid0(Spanning):
    """A disk striped over its members; as many whole strips of each as the smallest of them has.

    Args:
        bases: its members, in their order.
        strip_size: bytes on one member before the next one's turn; a power of two, at least the block size.

    Raises:
        UsageError: the strip size cannot be, or (from `open`) does not fit the members.
    """

    def __init__(self, bases: Sequence[Backend], strip_size: int) -> None:
        super().__init__(bases)
        if strip_size <= 0 or strip_size & (strip_size - 1):
            raise UsageError(f"raid0: strip_size {strip_size} is not possible: use a power of two, e.g. 65536")
        self.strip_size = strip_size

    def settle(self) -> None:
        """The size follows the smallest member; no byte of what remains moves."""
        super().settle()
        if self.strip_size < self.block_size:
            raise UsageError(f"raid0: strip_size {self.strip_size} is below the block size: use {self.block_size}")
        smallest = min((base.backend for base in self.bases), key=lambda backend: backend.size)
        strips = smallest.size // self.strip_size
        if not strips:
            raise UsageError(f"raid0: {smallest} holds no strip of {format_size(self.strip_size)}: use a smaller strip")
        self.size = len(self.bases) * strips * self.strip_size
        # A request that stays within a strip needs one member only.
        self.optimal_io_size = self.strip_size

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """Cut at the borders of strips."""
        start = 0
        while start < length:
            strip, within = divmod(offset + start, self.strip_size)
            row, member = divmod(strip, len(self.bases))
            end = min(length, start + self.strip_size - within)
            yield Piece(base=self.bases[member], offset=row * self.strip_size + within, start=start, end=end)
            start = end
