"""`Stacked`: a backend that is made of other backends, and `Base`: how it calls them.

Facts, and what they mean:

- A base may have plain or ``async def`` methods, may do less than it was asked for, and may lack what another one has.
  `Base` makes one shape of them all: every call is awaited, and does all of it or raises.
- A disk has a volatile cache when any of its bases has one: a flush goes to those, and a FUA write asks those that know
  of it. It can discard, zero and be written only when every base can: half a discard is none, and half a write is lost
  data.
- A base is opened and closed by what is made of it. So it belongs to one stack, or to one device, never to both.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Sequence
from typing import Any

import trio

from ublk_trio.backends.base import Backend, capabilities
from ublk_trio.backends.file import File, as_threaded

#: What every base must be able to do for the stack to be able to.
_OF_ALL = frozenset({"write", "discard", "write_zeroes"})


class Base:
    """A backend as the backend above it calls it. A `File` that is not open yet becomes a `ThreadedFile`.

    Each call raises `OSError` when the base fails: ENOMEM also when its result was ``-errno.ENOMEM``, and EIO when it
    did less than it was asked for and does not go on.
    Checkpoints, and cancellation, are the base's: there is none where the base has none.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend: Backend = as_threaded(backend) if type(backend) is File else backend
        self._methods: Any = self.backend
        #: What it can do; known once it is open.
        self.offered: frozenset[str] = frozenset()

    async def open(self) -> None:
        """Opens the backend. Raises what it raises."""
        await self.backend.open()
        self.settle()

    def settle(self) -> None:
        """Asks anew what the backend can do; a backend that is a stack itself asks its own bases first."""
        if isinstance(self.backend, Stacked):
            self.backend.settle()
        self.offered = capabilities(self.backend)

    async def aclose(self) -> None:
        """Closes the backend."""
        await self.backend.aclose()

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Fills all of the buffer."""
        done = 0
        while True:
            count = self._methods.read(offset + done, buffer[done:] if done else buffer)
            if count is not None and not isinstance(count, int):
                count = await count
            if count is None:
                return
            self._check_resources(count)
            if not 0 < count <= len(buffer) - done:
                raise OSError(errno.EIO, f"{self.backend} read {done + count} of {len(buffer)} bytes")
            done += count
            if done == len(buffer):
                return

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Stores all of the data; with `fua` on stable storage, as far as the base knows of any other."""
        count = self._methods.write(offset, data, fua=fua and "flush" in self.offered)
        if count is not None and not isinstance(count, int):
            count = await count
        if count is None:
            return
        self._check_resources(count)
        if count != len(data):
            raise OSError(errno.EIO, f"{self.backend} wrote {count} of {len(data)} bytes")

    async def flush(self) -> None:
        """Brings what was written to stable storage; nothing to do for a base without a cache."""
        if "flush" in self.offered:
            result = self._methods.flush()
            if result is not None and not isinstance(result, int):
                result = await result
            self._check_resources(result)

    async def discard(self, offset: int, length: int) -> None:
        """Only for a base that offers it."""
        result = self._methods.discard(offset, length)
        if result is not None and not isinstance(result, int):
            result = await result
        self._check_resources(result)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Only for a base that offers it."""
        result = self._methods.write_zeroes(offset, length, unmap=unmap)
        if result is not None and not isinstance(result, int):
            result = await result
        self._check_resources(result)

    def _check_resources(self, result: int | None) -> None:
        """A backend may also say by its result that it is out of resources for now."""
        if result == -errno.ENOMEM:
            raise OSError(errno.ENOMEM, f"{self.backend} is out of resources")


class Stacked(Backend):
    """A backend made of others. Subclasses define `read` and the optional methods, and set `size` in `settle`."""

    def __init__(self, bases: Sequence[Backend]) -> None:
        assert bases, "a stack stands on something"
        self.bases = tuple(Base(backend) for backend in bases)

    async def open(self) -> None:
        """Opens the bases, in order, and takes their geometry over.

        If one fails, or if this is cancelled, those before it are closed again. What fails in closing them is told in
        notes on the error.
        """
        opened: list[Base] = []
        try:
            for base in self.bases:
                await base.open()
                opened.append(base)
            self.settle()
        except BaseException as error:
            for failure in await _close(opened):
                error.add_note(f"and in closing: {failure!r}")
            raise

    async def aclose(self) -> None:
        """Closes the bases, the last one first: all of them, even if one fails or if this is cancelled."""
        failures = await _close(self.bases)
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise ExceptionGroup(f"{self}: bases failed to close", failures)

    def settle(self) -> None:
        """Takes over from the open bases what the stack has in common with them: all but the size.

        Called by `open`, and by whoever changed something below while the stack is open: the size, or what can be done.
        """
        for base in self.bases:
            base.settle()
        backends = [base.backend for base in self.bases]
        self.block_size = max(backend.block_size for backend in backends)
        self.physical_block_size = max(self.block_size, *(backend.physical_block_size for backend in backends))
        # A hint of less than a block, from a base with smaller ones, would be refused.
        optimal = max(backend.optimal_io_size for backend in backends)
        self.optimal_io_size = optimal if optimal >= self.block_size else 0
        # Powers of two as a rule, but any multiple of a base's own block is possible.
        self.discard_granularity = math.lcm(self.block_size, *(backend.discard_granularity for backend in backends))
        self.rotational = any(backend.rotational for backend in backends)
        offered = frozenset.intersection(*(base.offered for base in self.bases))
        self.unsupported = _OF_ALL - offered
        if not any("flush" in base.offered for base in self.bases):
            self.unsupported |= {"flush"}
        self.read_only = "write" not in offered


async def _close(bases: Sequence[Base]) -> list[Exception]:
    """Closes each, the last one first, and returns what failed."""
    failures = []
    with trio.CancelScope(shield=True):
        for base in reversed(bases):
            try:
                await base.aclose()
            except Exception as failure:
                failures.append(failure)
    return failures
