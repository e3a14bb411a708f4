"""A request: what a hardware queue hands to the driver, on a tag.

**Supported.** A part of one bio, or adjacent parts of several that were merged; partial completion, which ends the parts
that are done and leaves the rest to be delivered again; an error, which fails all that is left.
**Rejected.** Nothing. **Differs from Linux.** The data of merged parts passes through a buffer of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ublk_trio.uapi import SECTOR_SHIFT, IoFlag, IoOp

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block.bio import Bio

#: The tag of a request that has none.
NO_TAG: Final = -1
_READ: Final = int(IoOp.READ)
_WRITE: Final = int(IoOp.WRITE)
_INTEGRITY: Final = int(IoFlag.INTEGRITY)
_EMPTY: Final = memoryview(b"")


class Request:
    """A part of a `Bio` that fits into one ublk request."""

    __slots__ = ("bio", "length", "nr_sectors", "op", "op_flags", "start_sector", "tag", "view")

    #: Integrity metadata that goes with the data.
    metadata: memoryview | None = None
    #: A piece that a split cut off: it stays alone.
    no_merge = False
    #: Its tag stays taken when the driver is done with it: a flush sequence has more to come.
    keeps_tag = False

    def __init__(self, bio: Bio, op_flags: int, start_sector: int, length: int, view: memoryview) -> None:
        self.bio = bio
        self.op = op_flags & 0xFF
        self.op_flags = op_flags
        self.start_sector = start_sector
        self.nr_sectors = length >> SECTOR_SHIFT
        self.length = length
        self.view = view
        self.tag = NO_TAG

    @property
    def parts(self) -> list[Request]:
        """What it was merged from: by itself, only itself."""
        return [self]

    def advance(self, moved_bytes: int) -> int | None:
        """So many bytes are done: 0 when that was all, None when a rest remains to be delivered."""
        if moved_bytes == self.length:
            return 0
        self.view = self.view[moved_bytes:]
        self.length -= moved_bytes
        self.start_sector += moved_bytes >> SECTOR_SHIFT
        self.nr_sectors = self.length >> SECTOR_SHIFT
        return None

    def end(self, error: int) -> None:
        """It is over, with an errno or 0."""
        self.bio.part_ended(error)

    def __repr__(self) -> str:
        return f"<{IoOp(self.op).name} sector {self.start_sector}+{self.nr_sectors} of {self.bio}>"


class Piece(Request):
    """A request that carries metadata, or was cut off of something longer."""

    __slots__ = ("metadata", "no_merge")

    def __init__(
        self,
        bio: Bio,
        op_flags: int,
        start_sector: int,
        length: int,
        view: memoryview,
        *,
        metadata: memoryview | None = None,
        no_merge: bool = False,
    ) -> None:
        super().__init__(bio, op_flags | (_INTEGRITY if metadata is not None else 0), start_sector, length, view)
        self.metadata = metadata
        self.no_merge = no_merge

    def advance(self, moved_bytes: int) -> int | None:
        if self.metadata is not None and moved_bytes != self.length:
            self.metadata = self.metadata[len(self.metadata) * moved_bytes // self.length :]
        return super().advance(moved_bytes)


class MergedRequest(Piece):
    """Adjacent requests as one, in the order of their sectors."""

    __slots__ = ("_parts",)

    def __init__(self, parts: list[Request], *, op_flags: int) -> None:
        first = parts[0]
        length = sum(part.length for part in parts)
        metadata = [part.metadata for part in parts if part.metadata is not None]
        super().__init__(
            first.bio,
            op_flags,
            first.start_sector,
            length,
            _joined([part.view for part in parts]),
            metadata=_joined(metadata) if metadata else None,
        )
        self._parts = parts

    @property
    def parts(self) -> list[Request]:
        return self._parts

    def advance(self, moved_bytes: int) -> int | None:
        """As for any request; each part whose bytes are all done ends now, unless the whole does."""
        if self.op == _READ:
            self._scatter(moved_bytes)
        if moved_bytes == self.length:
            return 0
        rest = super().advance(moved_bytes)
        left = moved_bytes
        while left >= self._parts[0].length:
            part = self._parts.pop(0)
            left -= part.length
            part.end(0)
        if left:
            self._parts[0].advance(left)
        self.bio = self._parts[0].bio
        return rest

    def _scatter(self, moved_bytes: int) -> None:
        position = 0
        for part in self._parts:
            count = min(part.length, moved_bytes - position)
            part.view[:count] = self.view[position : position + count]
            if part.metadata is not None and self.metadata is not None:
                begin = len(self.metadata) * position // self.length
                done = len(part.metadata) * count // part.length
                part.metadata[:done] = self.metadata[begin : begin + done]
            position += count

    def end(self, error: int) -> None:
        for part in self._parts:
            part.end(error)


def _joined(views: list[memoryview]) -> memoryview:
    return memoryview(bytearray().join(views)) if any(views) else _EMPTY
