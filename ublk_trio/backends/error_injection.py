"""`ErrorInjection`: a disk that fails when it is told to.

Facts of SPDK's error bdev, whose counterpart this is, and what is different here:

- Each type of request has one injection at a time: a new one takes the old one's place. It counts down, and is over at
  0. ``all`` sets it for each type, each with a count of its own.
- A queue depth of N leaves requests alone while fewer than N others are with the base. Those that are pending are not
  with the base.
- Corrupting is XOR of one byte, so a value of 0 would change nothing and is refused. An offset beyond a request's end changes
  nothing in it, but the request is counted. A flush, a discard or zeroing has no data: it is counted and carried out.
- There a pending request is forgotten, unless the disk is reset. Here clearing and closing answer it with EIO, and it can be
  cancelled: whatever stops the disk gets to its end.
- There requests that write zeroes cannot be failed; here they can.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Literal, get_args

import attrs
import trio

from ublk_trio.backends.base import Backend
from ublk_trio.backends.passthru import Passthru
from ublk_trio.errors import UsageError

#: What can be made to fail; ``all`` is each of the others.
IoType = Literal["read", "write", "flush", "discard", "write_zeroes", "all"]
#: How: with EIO; never answered; with another byte in its data; with ENOMEM.
ErrorType = Literal["failure", "pending", "corrupt_data", "nomem"]

_IO_TYPES: Final = tuple(io_type for io_type in get_args(IoType) if io_type != "all")


@attrs.define(kw_only=True)
class _Injection:
    error_type: ErrorType
    #: How many requests it is still for.
    num: int
    queue_depth: int
    corrupt_offset: int
    corrupt_value: int

    def corrupt(self, data: memoryview) -> None:
        if self.corrupt_offset < len(data):
            data[self.corrupt_offset] ^= self.corrupt_value


class ErrorInjection(Passthru):
    """`base`, and the errors that `inject` asks for.

    A request that is made to fail does not get to the base. *Cancellation*: a pending request can be cancelled; another one as
    the base's.

    Args:
        base: another backend. It is opened and closed with this one, and belongs to it alone.
    """

    def __init__(self, base: Backend) -> None:
        super().__init__(base)
        self._injections: dict[str, _Injection] = {}
        self._with_base = 0
        self._pending = trio.lowlevel.ParkingLot()

    @property
    def pending(self) -> int:
        """How many requests are pending."""
        return len(self._pending)

    def inject(
        self,
        io_type: IoType,
        error_type: ErrorType,
        *,
        num: int = 1,
        queue_depth: int = 0,
        corrupt_offset: int = 0,
        corrupt_value: int = 0xFF,
    ) -> None:
        """From now on the next `num` requests of `io_type` fail, in place of what was injected for that type before.

        Args:
            io_type: ``read``, ``write``, ``flush``, ``discard``, ``write_zeroes``; or ``all``: `num` of each.
            error_type: ``failure`` is EIO and ``nomem`` ENOMEM. ``pending`` is no answer, until `clear` or `aclose`; then EIO.
                ``corrupt_data`` changes a byte of what a read reads, or of what a write writes; not the writer's own.
            num: of how many requests, 0 or more.
            queue_depth: only of those that find this many others with the base.
            corrupt_offset: which byte of a request's data.
            corrupt_value: what that byte is XORed with, 1 to 255.

        Raises `UsageError` for anything else, and changes nothing. What is pending stays pending.
        """
        _check("io_type", io_type, get_args(IoType))
        _check("error_type", error_type, get_args(ErrorType))
        for name, value in (("num", num), ("queue_depth", queue_depth), ("corrupt_offset", corrupt_offset)):
            if type(value) is not int or value < 0:
                raise UsageError(f"error injection: {name} {value!r} is not possible: use a whole number from 0 up")
        if type(corrupt_value) is not int or not 1 <= corrupt_value <= 0xFF:
            raise UsageError(f"error injection: corrupt_value {corrupt_value!r} is not possible: use 1 to 255")
        for one in _IO_TYPES if io_type == "all" else (io_type,):
            self._injections[one] = _Injection(
                error_type=error_type,
                num=num,
                queue_depth=queue_depth,
                corrupt_offset=corrupt_offset,
                corrupt_value=corrupt_value,
            )

    def clear(self) -> None:
        """Forgets every injection, and answers what is pending with EIO."""
        self._injections.clear()
        self._pending.unpark_all()

    async def aclose(self) -> None:
        """As `Stacked.aclose`; what is pending is answered with EIO."""
        self.clear()
        await super().aclose()

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Reads, or what is injected."""
        async with self._injected("read") as injection:
            await self.base.read(offset, buffer)
            if injection is not None:
                injection.corrupt(buffer)

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Writes, or what is injected."""
        async with self._injected("write") as injection:
            if injection is not None:
                data = memoryview(bytearray(data))
                injection.corrupt(data)
            await self.base.write(offset, data, fua=fua)

    async def flush(self) -> None:
        """Flushes, or what is injected."""
        async with self._injected("flush"):
            await self.base.flush()

    async def discard(self, offset: int, length: int) -> None:
        """Discards, or what is injected."""
        async with self._injected("discard"):
            await self.base.discard(offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zeroes, or what is injected."""
        async with self._injected("write_zeroes"):
            await self.base.write_zeroes(offset, length, unmap=unmap)

    @asynccontextmanager
    async def _injected(self, io_type: str) -> AsyncIterator[_Injection | None]:
        """Fails here if it is to, or lets the block ask the base; gives the injection if data is to be corrupted."""
        injection = self._take(io_type)
        error_type = injection.error_type if injection is not None else None
        if error_type == "pending":
            await self._pending.park()
        if error_type in ("pending", "failure"):
            raise OSError(errno.EIO, f"{self}: injected {error_type} of {io_type}")
        if error_type == "nomem":
            raise OSError(errno.ENOMEM, f"{self}: injected {error_type} of {io_type}")
        self._with_base += 1
        try:
            yield injection
        finally:
            self._with_base -= 1

    def _take(self, io_type: str) -> _Injection | None:
        injection = self._injections.get(io_type)
        if injection is None or injection.num == 0 or self._with_base < injection.queue_depth:
            return None
        injection.num -= 1
        return injection


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"error injection: {name} {value!r} is unknown: use {', '.join(known)}")
