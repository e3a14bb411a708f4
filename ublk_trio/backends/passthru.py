"""`Passthru`: a backend that hands everything on to another one, to build upon."""

from __future__ import annotations

from ublk_trio.backends.base import Backend
from ublk_trio.backends.stacked import Stacked


class Passthru(Stacked):
    """The same disk once more: what it is asked for, it asks of `base`, and changes nothing.

    Made to be inherited from: override a method, and call ``super()`` for what the base does. Its methods are
    ``async def`` and typed, whatever the base's are. As any stack it can do what its base can, and does all of a request
    or raises.

    Args:
        base: another backend. It is opened and closed with this one, and belongs to it alone.
    """

    def __init__(self, base: Backend) -> None:
        super().__init__([base])
        self.base = self.bases[0]

    @property
    def size(self) -> int:  # type: ignore[override]
        """Bytes: at any time the base's."""
        return self.base.backend.size

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Read from the base."""
        await self.base.read(offset, buffer)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Written to the base."""
        await self.base.write(offset, data, fua=fua)

    async def flush(self) -> None:
        """Flushes the base."""
        await self.base.flush()

    async def discard(self, offset: int, length: int) -> None:
        """Discarded in the base."""
        await self.base.discard(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zeroed in the base."""
        await self.base.write_zeroes(offset, length, unmap=unmap)

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()}({self.base.backend})"
