"""A queue's buffers: one page-aligned arena, cut into buffers of one size, and the table that gives tags their buffers.

Some facts, and what they mean here:

- The kernel copies a request's data by address. So the buffers are one anonymous mapping, which never moves, and not objects that
  Python may free.
- A buffer takes no memory until it is first touched, and NORESERVE asks for none. So one buffer per tag may be large: 128 tags of
  1 MiB cost what is used of them.
- A mapping can't be unmapped while anything still holds a view of it: Python refuses with BufferError.

Imports neither trio nor cffi; the simulator uses it as well.
"""

from __future__ import annotations

import contextlib
import mmap
from array import array
from collections.abc import Sequence

from ublk_trio.ring import NO_SLOT


class Arena:
    """``buffers`` writable buffers of ``buffer_bytes`` each, every one of them aligned to a page and zero at first."""

    def __init__(self, *, buffers: int, buffer_bytes: int) -> None:
        assert 0 <= buffers < NO_SLOT
        assert buffer_bytes > 0
        #: Bytes from one buffer to the next.
        self.stride = -(-buffer_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = _anonymous_memory(buffers * self.stride) if buffers else None
        self._buffers: tuple[memoryview, ...] = ()
        if self._memory is not None:
            whole = memoryview(self._memory)
            starts = range(0, buffers * self.stride, self.stride)
            self._buffers = tuple(whole[start : start + buffer_bytes] for start in starts)
            whole.release()

    @property
    def buffers(self) -> Sequence[memoryview]:
        """The buffers, each exactly ``buffer_bytes`` long."""
        return self._buffers

    @property
    def memory(self) -> mmap.mmap | None:
        """The whole mapping, for code that needs its address; None when there are no buffers, or after `close`."""
        return self._memory

    def discard(self) -> None:
        """Give the memory back to the system, but keep the addresses: whoever writes there still finds ours, and zeros."""
        if self._memory is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap. Repeatable. Buffers that somebody still holds stay valid, and go with their last holder."""
        memory, self._memory = self._memory, None
        self._buffers = ()
        if memory is None:
            return
        # BufferError: somebody holds a view, a handler that was cancelled in the middle or an array made from the buffer. Unmapping
        # would make their next access a crash, and waiting for them has no bound. The views hold the mapping and we no longer do,
        # so the garbage collector unmaps it after the last of them.
        with contextlib.suppress(BufferError):
            memory.close()


def make_slots(*, depth: int, buffers: int) -> memoryview:
    """`QueueRing.slots` for a start: each tag its own buffer when there are enough, else none for any."""
    owned = range(depth) if buffers >= depth else [NO_SLOT] * depth
    return memoryview(array("H", owned))


def _anonymous_memory(length: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, length)
    # Private: after a fork the kernel goes on copying to and from this process's pages only.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(-1, length, flags=flags)
