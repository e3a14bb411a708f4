"""A ring's registered buffers: requests' own memory, lent to the server without a copy.

**Supported.** A table of any size, empty at first; the driver puts the buffers of requests into it and takes them out; a
buffer that an operation uses stays until that ends.
**Rejected.** As the driver passes them on: EINVAL for an index that there is not, or where nothing is; EBUSY where
something is. For fixed reads and writes EFAULT: no such buffer, outside of it, against its direction.
**Differs from Linux.** The server's own memory cannot be registered.
"""

from __future__ import annotations

import errno
from collections.abc import Callable


class RequestBuffer:
    """A request's memory in a table. ``fills``: the server fills it (a READ's), else it reads it."""

    def __init__(self, view: memoryview, *, fills: bool, release: Callable[[], None]) -> None:
        self.view = view
        self.fills = fills
        self._release = release
        self._references = 1

    def get(self) -> None:
        """An operation uses it."""
        self._references += 1

    def put(self) -> None:
        """The table, or an operation, gives it up; the last one gives it back to the driver."""
        self._references -= 1
        if not self._references:
            self._release()

    def part(self, offset: int, length: int, *, fill: bool) -> memoryview | None:
        """The memory that a fixed read (``fill``) or write may use, or None: EFAULT."""
        if fill is not self.fills or offset + length > len(self.view):
            return None
        return self.view[offset : offset + length]


class BufferTable:
    """The registered buffers of one ring."""

    def __init__(self, count: int) -> None:
        self._buffers: list[RequestBuffer | None] = [None] * count

    def __len__(self) -> int:
        return len(self._buffers)

    def get(self, index: int) -> RequestBuffer | None:
        """What is registered there."""
        return self._buffers[index] if index < len(self._buffers) else None

    def register(self, index: int, buffer: RequestBuffer) -> int:
        """Put a buffer there: 0 or a negative errno."""
        if index >= len(self._buffers):
            return -errno.EINVAL
        if self._buffers[index] is not None:
            return -errno.EBUSY
        self._buffers[index] = buffer
        return 0

    def unregister(self, index: int) -> int:
        """Take away what is there: 0 or a negative errno."""
        buffer = self.get(index)
        if buffer is None:
            return -errno.EINVAL
        self._buffers[index] = None
        buffer.put()
        return 0

    def clear(self) -> None:
        """Take away everything."""
        for index in range(len(self._buffers)):
            self.unregister(index)
