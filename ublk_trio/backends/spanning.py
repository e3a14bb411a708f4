"""`Spanning`: a disk each byte of which is on one of its bases; what raid0 and concat have in common.

A request becomes pieces, each on one base, which are carried out side by side. The request is done when all pieces are,
and fails when one fails; what the others wrote stays written, as after any write that failed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial

import attrs

from ublk_trio.backends.stacked import Base, Stacked
from ublk_trio.backends.together import run_together


@attrs.frozen(kw_only=True)
class Piece:
    """A part of a request; all in bytes."""

    base: Base
    #: Where it is on the base.
    offset: int
    #: What part of the request it is.
    start: int
    end: int


class Spanning(Stacked):
    """Subclasses say where the bytes are: `pieces`."""

    @abstractmethod
    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """A range in pieces, in order, none of them empty; those on one base follow each other there without a gap."""

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Fills the buffer from all bases that have a piece of it. Raises what the first failed one raised."""
        await run_together(
            [
                partial(piece.base.read, piece.offset, buffer[piece.start : piece.end])
                for piece in self.pieces(offset, len(buffer))
            ]
        )

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Stores each piece; with `fua` each on stable storage. Raises what the first failed one raised."""
        await run_together(
            [
                partial(piece.base.write, piece.offset, data[piece.start : piece.end], fua=fua)
                for piece in self.pieces(offset, len(data))
            ]
        )

    async def flush(self) -> None:
        """Flushes every base: a write may have gone to any."""
        await run_together([base.flush for base in self.bases])

    async def discard(self, offset: int, length: int) -> None:
        """One range for each base."""
        await run_together([partial(base.discard, *place) for base, place in self._ranges(offset, length)])

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """One range for each base."""
        await run_together(
            [partial(base.write_zeroes, *place, unmap=unmap) for base, place in self._ranges(offset, length)]
        )

    def _ranges(self, offset: int, length: int) -> Iterator[tuple[Base, tuple[int, int]]]:
        """The pieces of each base as one range of it: offset and length."""
        ranges: dict[Base, tuple[int, int]] = {}
        for piece in self.pieces(offset, length):
            first, end = ranges.get(piece.base, (piece.offset, piece.offset))
            assert piece.offset == end, f"pieces of {offset}+{length} on {piece.base.backend} have a gap at {end}"
            ranges[piece.base] = (first, end + piece.end - piece.start)
        for base, (first, end) in ranges.items():
            yield base, (first, end - first)
