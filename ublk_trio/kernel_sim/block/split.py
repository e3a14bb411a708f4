"""Where an operation is cut into requests.

**Supported.** Reads and writes at the largest request and at chunks, the cut moved down to a physical block's boundary
where there is one; discards at their limit and their granularity; write-zeroes at their limit, and then as writes are; zeroes
that are written where zeroing is not offered, a MiB at a time. The bios of one discard, or of one call's zeroes, are merged
again where one request may hold them: not what was cut off its bio.
**Rejected.** Nothing. **Differs from Linux.** A direct write of more than 256 pages is several bios there; here, as
there, it is cut at the same places unless the largest request is longer than that. Linux 7.3 may have been built with a
page of zeroes of 2 MiB, which makes the bios of zeroes longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from ublk_trio.kernel_sim.block.limits import BIO_BYTES_MAX

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block.limits import Limits

#: Bytes of zeroes in one bio: 256 pages.
_ZERO_PAGES_BYTES: Final = 1 << 20

#: Offset and length in bytes.
Piece = tuple[int, int]
#: The same, and whether it was cut off its bio, so that nothing is merged with it.
CutPiece = tuple[int, int, bool]


def reads_and_writes(limits: Limits, offset: int, length: int) -> Iterator[Piece]:
    """The requests of a read or write."""
    return _at_limits(limits, offset, length, limits.max_request)


def zero_pages(limits: Limits, offset: int, length: int) -> Iterator[CutPiece]:
    """The writes of zeroes where nothing better is offered."""
    for start, bio_length in _bios(offset, length, _ZERO_PAGES_BYTES):
        for piece, piece_length in reads_and_writes(limits, start, bio_length):
            yield piece, piece_length, piece + piece_length < start + bio_length


def write_zeroes(limits: Limits, offset: int, length: int) -> Iterator[Piece]:
    """The requests of a write-zeroes."""
    for start, bio_length in _bios(offset, length, min(limits.max_write_zeroes, BIO_BYTES_MAX)):
        yield from _at_limits(limits, start, bio_length, limits.max_write_zeroes)


def discards(limits: Limits, offset: int, length: int) -> Iterator[CutPiece]:
    """The requests of a discard.

    The first bio ends where the granularity is met, later ones are whole multiples.
    """
    granularity = limits.discard_granularity
    largest = limits.max_discard - limits.max_discard % granularity
    bio_max = BIO_BYTES_MAX // granularity * granularity
    while length:
        bio_length = min(length, -offset % granularity or bio_max)
        length -= bio_length
        yield from _discard_bio(limits, offset, bio_length, largest)
        offset += bio_length


def _discard_bio(limits: Limits, offset: int, length: int, largest: int) -> Iterator[CutPiece]:
    granularity = limits.discard_granularity
    while largest and length > largest:
        piece = largest
        over = (offset + piece - limits.discard_alignment % granularity) % granularity
        if piece > over:
            piece -= over
        yield offset, piece, True
        offset += piece
        length -= piece
    yield offset, length, False


def _bios(offset: int, length: int, longest: int) -> Iterator[Piece]:
    while length:
        piece = min(length, longest)
        yield offset, piece
        offset += piece
        length -= piece


def _at_limits(limits: Limits, offset: int, length: int, longest: int) -> Iterator[Piece]:
    physical, logical, chunk = limits.physical_block, limits.logical_block, limits.chunk
    while length:
        most = min(longest, chunk - offset % chunk) if chunk else longest
        start = offset % physical
        end = (start + most) // physical * physical
        piece = min(length, end - start if end > start else most // logical * logical)
        assert piece > 0, f"nothing fits at {offset}"
        yield offset, piece
        offset += piece
        length -= piece
