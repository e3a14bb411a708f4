"""Backends to make raids of: each call of them suspends and fails as the test says, and their cache is lost in a crash."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Literal

import attrs
import trio

from ublk_trio.backends import Backend
from ublk_trio.kernel_sim import Choices, FirstChoice
from ublk_trio.testing import Storage

SECTOR = 512
#: Before anything is done, with half of it done, or with all of it.
When = Literal["before", "middle", "after"]


@attrs.define(kw_only=True)
class Fault:
    """What goes wrong in the next `times` calls of a kind; any kind if `call` is empty."""

    call: str = ""
    number: int = errno.EIO
    when: When = "before"
    times: int = 1


class Part(Backend):
    """A part of a storage, with plain methods: some of these are disks with a cache that crash together."""

    def __init__(self, storage: Storage, start: int, size: int) -> None:
        self.storage = storage
        self.start = start
        self.size = size

    def read(self, offset: int, buffer: memoryview) -> None:
        assert offset + len(buffer) <= self.size, "read beyond the end"
        self.storage.read(self.start + offset, buffer)

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        assert offset + len(data) <= self.size, "written beyond the end"
        self.storage.write(self.start + offset, data, fua=fua)

    def flush(self) -> None:
        self.storage.flush()

    def discard(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length, unmap=True)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        assert offset + length <= self.size, "zeroed beyond the end"
        self.storage.write(self.start + offset, bytes(length))


class Member(Backend):
    """A disk with a cache, on a storage of its own. A write moves its first half before it suspends, the rest after."""

    def __init__(self, size: int, *, choices: Choices | None = None, name: str = "member") -> None:
        self.size = size
        self.name = name
        self.choices = choices or FirstChoice()
        self.storage = Storage(size, choices=self.choices)
        self.faults: list[Fault] = []
        #: How many calls failed for good; ENOMEM does not count.
        self.failures = 0
        self.opened = self.closed = 0
        #: Its calls: name, offset, length.
        self.calls: list[tuple[str, int, int]] = []
        self.running = 0
        self.misuse: list[str] = []
        #: What a call waits for, if the test sets it.
        self.gate: trio.Event | None = None

    @property
    def content(self) -> bytes:
        """What it holds now, in its cache or below."""
        content = bytearray(self.size)
        self.storage.read(0, content)
        return bytes(content)

    def fail(self, call: str = "", *, number: int = errno.EIO, when: When = "before", times: int = 1) -> None:
        """Has the next calls of this kind fail."""
        self.faults.append(Fault(call=call, number=number, when=when, times=times))

    async def open(self) -> None:
        if self.opened != self.closed:
            self.misuse.append("opened twice")
        self.opened += 1

    async def aclose(self) -> None:
        self.closed += 1
        if self.closed != self.opened:
            self.misuse.append("closed without having been open")
        if self.running:
            self.misuse.append("closed while it was called")

    async def read(self, offset: int, buffer: memoryview) -> None:
        half = len(buffer) // SECTOR // 2 * SECTOR
        await self._call(
            ("read", offset, len(buffer)),
            lambda: self.storage.read(offset, buffer[:half]),
            lambda: self.storage.read(offset + half, buffer[half:]),
        )

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        half = len(data) // SECTOR // 2 * SECTOR
        await self._call(
            ("write", offset, len(data)),
            lambda: self.storage.write(offset, data[:half], fua=fua),
            lambda: self.storage.write(offset + half, data[half:], fua=fua),
        )

    async def flush(self) -> None:
        await self._call(("flush", 0, 0), lambda: None, self.storage.flush)

    async def discard(self, offset: int, length: int) -> None:
        await self._zero("discard", offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        await self._zero("write_zeroes", offset, length)

    def __str__(self) -> str:
        return self.name

    async def _zero(self, name: str, offset: int, length: int) -> None:
        half = length // SECTOR // 2 * SECTOR
        await self._call(
            (name, offset, length),
            lambda: self.storage.write(offset, bytes(half)),
            lambda: self.storage.write(offset + half, bytes(length - half)),
        )

    async def _call(self, call: tuple[str, int, int], first: Callable[[], None], second: Callable[[], None]) -> None:
        self.calls.append(call)
        if self.opened == self.closed:
            self.misuse.append(f"{call} while it was closed")
        fault = self._next_fault(call[0])
        self.running += 1
        try:
            _raise_if(fault, "before")
            first()
            await self._suspend()
            _raise_if(fault, "middle")
            second()
            _raise_if(fault, "after")
        finally:
            self.running -= 1

    def _next_fault(self, name: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.call in ("", name):
                fault.times -= 1
                self.failures += fault.number != errno.ENOMEM
                return fault
        return None

    async def _suspend(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        kind = self.choices.choose("suspend", 4)
        if kind == 3:
            await trio.sleep(1)
        for _ in range((0, 1, 3, 0)[kind]):
            await trio.lowlevel.checkpoint()


def _raise_if(fault: Fault | None, when: When) -> None:
    if fault is not None and fault.when == when:
        raise OSError(fault.number, "planned")
