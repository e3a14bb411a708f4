"""The disks of a run: memory that fails as the run's choices have it, and writes down each failure.

Two shapes of the same disk, with plain and with async methods. A write that fails has stored its first half: what the
disk then holds is a matter of blocks, each of them old or new.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import attrs
import trio

from ublk_trio.backends import Backend
from ublk_trio.kernel_sim import Choices
from ublk_trio.kernel_sim.linux_errno import through_block_status

#: One call in so many goes wrong, when one kind of trouble is enabled.
_CALM_OPTIONS = 12
#: What a call may raise: an OSError, or, for the last, what no backend should.
_ERRNOS = (errno.EIO, errno.ENOSPC, errno.EPERM, errno.ETIMEDOUT, None)
_SLOW_SECONDS = 0.05
_SLOW_STEPS = 4


class BackendBugError(Exception):
    """An exception that no backend should raise."""


@attrs.frozen(kw_only=True)
class Failure:
    """A call that failed; ``number`` is the errno that the application must see."""

    name: str
    offset: int
    length: int
    number: int

    def touches(self, offset: int, length: int) -> bool:
        """Whether one of the bytes is among those; a flush has none, and touches every flush."""
        return self.offset < offset + max(length, 1) and offset < self.offset + max(self.length, 1)


class Medium:
    """A disk's content and its troubles. ``injected(fault, text)`` is called with every fault."""

    def __init__(
        self,
        *,
        size: int,
        block_bytes: int,
        choices: Choices,
        faults: frozenset[str],
        injected: Callable[[str, str], None],
    ) -> None:
        self.data = bytearray(size)
        self.block_bytes = block_bytes
        self.failures: list[Failure] = []
        self.opened = self.closed = 0
        self._choices = choices
        self._troubles = tuple(name for name in ("backend-raises", "backend-short") if name in faults)
        self._slow = "backend-slow" in faults
        self._injected = injected

    def trouble(self, name: str, offset: int, length: int) -> str | None:
        """Which fault this call is to have."""
        if not self._troubles:
            return None
        number = self._choices.choose(f"backend {name}", _CALM_OPTIONS + len(self._troubles)) - _CALM_OPTIONS
        if number < 0:
            return None
        fault = self._troubles[number]
        if fault == "backend-short" and (name not in ("read", "write") or length <= self.block_bytes):
            return None
        self._injected(fault, f"{name} of {length} bytes at {offset}")
        return fault

    def raise_trouble(self, fault: str | None, name: str, offset: int, length: int) -> None:
        """Raise what the fault is made of, if it is one that raises."""
        if fault != "backend-raises":
            return
        number = _ERRNOS[self._choices.choose("backend errno", len(_ERRNOS))]
        if number is None:
            self._fail(name, offset, length, errno.EIO)
            raise BackendBugError("injected")
        self._fail(name, offset, length, number)
        raise OSError(number, "injected")

    def done_bytes(self, fault: str | None, name: str, offset: int, length: int) -> int:
        """How much of a read or write is done: all of it, unless the fault is to fall short."""
        if fault != "backend-short":
            return length
        if name == "write":
            self._fail(name, offset, length, errno.EIO)  # the engine never tells the kernel of a short write
        return self.block_bytes * (1 + self._choices.choose("backend short", length // self.block_bytes - 1))

    def _fail(self, name: str, offset: int, length: int, number: int) -> None:
        failure = Failure(name=name, offset=offset, length=length, number=through_block_status(-number))
        self.failures.append(failure)

    async def suspend(self, name: str) -> None:
        """What an async method waits for: nothing, a pass of the scheduler, or, when slow, some time."""
        kind = self._choices.choose("backend suspends", 3 if self._slow else 2)
        if kind == 1:
            await trio.lowlevel.checkpoint()
        elif kind == 2:
            self._injected("backend-slow", name)
            await trio.sleep(_SLOW_SECONDS * (1 + self._choices.choose("backend sleeps", _SLOW_STEPS)))

    def first_half(self, length: int) -> int:
        return length // self.block_bytes // 2 * self.block_bytes


class _Disk(Backend):
    """What both shapes have in common."""

    def __init__(self, medium: Medium) -> None:
        self.medium = medium
        self.size = len(medium.data)
        self.block_size = medium.block_bytes

    async def open(self) -> None:
        self.medium.opened += 1

    async def aclose(self) -> None:
        self.medium.closed += 1

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.size} bytes"


class PlainDisk(_Disk):
    """Plain methods: served inline."""

    def read(self, offset: int, buffer: memoryview) -> int:
        medium, length = self.medium, len(buffer)
        fault = medium.trouble("read", offset, length)
        medium.raise_trouble(fault, "read", offset, length)
        done = medium.done_bytes(fault, "read", offset, length)
        buffer[:done] = medium.data[offset : offset + done]
        return done

    def write(self, offset: int, data: memoryview, *, fua: bool) -> int:
        medium, length = self.medium, len(data)
        fault = medium.trouble("write", offset, length)
        half = medium.first_half(length)
        medium.data[offset : offset + half] = data[:half]
        medium.raise_trouble(fault, "write", offset, length)
        done = medium.done_bytes(fault, "write", offset, length)
        medium.data[offset : offset + done] = data[:done]
        return done

    def flush(self) -> None:
        self.medium.raise_trouble(self.medium.trouble("flush", 0, 0), "flush", 0, 0)

    def discard(self, offset: int, length: int) -> None:
        self.medium.raise_trouble(self.medium.trouble("discard", offset, length), "discard", offset, length)
        self.medium.data[offset : offset + length] = bytes(length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.medium.raise_trouble(self.medium.trouble("write_zeroes", offset, length), "write_zeroes", offset, length)
        self.medium.data[offset : offset + length] = bytes(length)


class AsyncDisk(_Disk):
    """Async methods, which may suspend in their middle."""

    async def read(self, offset: int, buffer: memoryview) -> int:
        medium, length = self.medium, len(buffer)
        fault = medium.trouble("read", offset, length)
        half = medium.first_half(length)
        buffer[:half] = medium.data[offset : offset + half]
        await medium.suspend("read")
        medium.raise_trouble(fault, "read", offset, length)
        done = medium.done_bytes(fault, "read", offset, length)
        buffer[:done] = medium.data[offset : offset + done]
        return done

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> int:
        medium, length = self.medium, len(data)
        fault = medium.trouble("write", offset, length)
        half = medium.first_half(length)
        medium.data[offset : offset + half] = data[:half]
        await medium.suspend("write")
        medium.raise_trouble(fault, "write", offset, length)
        done = medium.done_bytes(fault, "write", offset, length)
        medium.data[offset : offset + done] = data[:done]
        return done

    async def flush(self) -> None:
        fault = self.medium.trouble("flush", 0, 0)
        await self.medium.suspend("flush")
        self.medium.raise_trouble(fault, "flush", 0, 0)

    async def discard(self, offset: int, length: int) -> None:
        fault = self.medium.trouble("discard", offset, length)
        await self.medium.suspend("discard")
        self.medium.raise_trouble(fault, "discard", offset, length)
        self.medium.data[offset : offset + length] = bytes(length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        fault = self.medium.trouble("write_zeroes", offset, length)
        await self.medium.suspend("write_zeroes")
        self.medium.raise_trouble(fault, "write_zeroes", offset, length)
        self.medium.data[offset : offset + length] = bytes(length)
