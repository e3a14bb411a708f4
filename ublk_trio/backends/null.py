"""`Null`: a disk that keeps nothing, to measure everything but the disk."""

from __future__ import annotations

from ublk_trio.backends.base import Backend, check_geometry, fill_zeroes, set_size
from ublk_trio.backends.sizes import format_size


class Null(Backend):
    """Reads give zeroes, writes are dropped. Never blocks, never fails.

    The kernel's null_blk leaves a read's buffer alone; here the buffer is memory that served other requests before, so
    that would hand one reader another's data. Filling it costs one copy from a page that stays in the processor's
    cache.

    Args:
        size: bytes.
        block_size: logical block, bytes.

    Raises:
        UsageError: no disk has these sizes.
    """

    def __init__(self, size: int, *, block_size: int = 512) -> None:
        self.size = size
        self.block_size = block_size
        check_geometry(self)

    def read(self, offset: int, buffer: memoryview) -> int | None:
        """Zeroes."""
        fill_zeroes(buffer)
        return None

    def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        """Dropped."""
        return None

    def discard(self, offset: int, length: int) -> None:
        """Nothing to free."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """It holds zeroes already."""

    def resize(self, size: int) -> None:
        """Changes the size, bytes. Requests beyond the end are served as any others.

        Raises `UsageError`, and changes nothing, for a size that no disk has.
        """
        set_size(self, size)

    def __str__(self) -> str:
        return describe_sized("null", self)


def describe_sized(kind: str, backend: Backend) -> str:
    """The SPEC of a backend whose argument is its size. A size that is no int is shown as it is."""
    given: object = backend.size
    size = format_size(given) if isinstance(given, int) else repr(given)
    options = "" if backend.block_size == Backend.block_size else f",block_size={backend.block_size}"
    return f"{kind}:{size}{options}"
