"""Disks whose every call is in the test's hand: what it answers, how often it suspends, and when it goes on.

A disk models a volatile cache: each block has a version, and the version that is durable. It writes down whatever an engine must
not do to a backend (`misuse`), every call that it fails (`failures`), and who is being served (`running`). Reads and
writes move their first half before they suspend and the rest after, so that a buffer that changes hands too early shows.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable

import attrs
import trio

from tests.property.pumped import Choose
from ublk_trio.backends import Backend
from ublk_trio.kernel_sim.linux_errno import through_block_status

BLOCK = 512
#: The number of the write that a disk's first content is taken for.
FIRST_WRITE = 1
#: What a call may come to, by number of the choice: mostly it goes well. The others need their fault.
WELL: tuple[str, ...] = ("well",) * 6
SHORT = ("short", "short")
RAISES = ("OSError", "bug")
BUSY = ("busy", "busy", "busy")
ERRNOS = (errno.ENOSPC, errno.EPERM, errno.EOPNOTSUPP)


class PlantedFaultError(Exception):
    """A bug in a backend."""


@attrs.define(eq=False, kw_only=True)
class Call:
    """One call that a disk is working on. ``gate`` is what it waits for, if it waits for the test."""

    name: str
    offset: int
    length: int
    gate: trio.Event | None = None


@attrs.frozen(kw_only=True)
class Failure:
    """A call that did not go well. ``number`` is the errno that an application must see."""

    name: str
    offset: int
    length: int
    number: int

    def touches(self, offset: int, length: int) -> bool:
        return self.offset < offset + max(1, length) and offset < self.offset + max(1, self.length)


def content_of(number: int, block: int) -> bytes:
    """What the write with this number puts into this block, from 1 up: no two are alike."""
    return (number << 20 | block).to_bytes(8, "big") * (BLOCK // 8)


@functools.cache
def _first_content(blocks: int) -> bytes:
    return b"".join(content_of(FIRST_WRITE, block) for block in range(blocks))


class Disk:
    """What the plain and the async backend have in common."""

    def __init__(
        self, *, blocks: int, choose: Choose, faults: frozenset[str], suspensions_max: int, fails_to_open: bool
    ) -> None:
        self.size = blocks * BLOCK
        self.choose = choose
        outcomes: tuple[str, ...] = WELL
        if "backend-short" in faults:
            outcomes += SHORT
        if "backend-raises" in faults:
            outcomes += RAISES
        if "backend-busy" in faults:
            outcomes += BUSY
        self.outcomes = outcomes
        self.hangs = "backend-hangs" in faults
        self.suspensions_max = suspensions_max if faults & {"backend-slow", "backend-hangs"} else 0
        self.fails_to_open = fails_to_open
        # No two blocks are alike, or reading from a wrong place would not show.
        self.data = bytearray(_first_content(blocks))
        self.versions = [0] * blocks
        self.durable = [0] * blocks
        self.opened = self.closed = 0
        self.running: list[Call] = []
        self.failures: list[Failure] = []
        self.misuse: list[str] = []

    def calm_down(self) -> None:
        """From now on everything goes well and at once; whoever waits goes on."""
        self.outcomes = WELL
        self.suspensions_max = 0
        for call in self.waiting():
            self.release(call)

    def waiting(self) -> list[Call]:
        """The calls that wait for the test, oldest first."""
        return [call for call in self.running if call.gate is not None]

    def release(self, call: Call) -> None:
        """Let a call that waits go on."""
        assert call.gate is not None
        call.gate.set()
        call.gate = None

    # Opening and closing

    async def open(self) -> None:
        if self.opened > self.closed:
            self.misuse.append("opened twice")
        call = Call(name="open", offset=0, length=0)
        await self._suspend_around(call)
        if self.fails_to_open:
            raise OSError(errno.ENXIO, "planned")
        self.opened += 1

    async def close(self) -> None:
        self.closed += 1
        if self.closed != self.opened:
            self.misuse.append(f"opened {self.opened} times, closed {self.closed} times")
        if self.running:
            self.misuse.append(f"closed while it was being called: {self.running}")
        await self._suspend_around(Call(name="close", offset=0, length=0))

    async def _suspend_around(self, call: Call) -> None:
        self.running.append(call)
        try:
            await self.suspend(call)
        finally:
            self.running.remove(call)

    # Calls

    def begin(self, name: str, offset: int, length: int) -> tuple[Call, str]:
        """Take a call in, and decide what it will come to."""
        call = Call(name=name, offset=offset, length=length)
        if self.opened != self.closed + 1:
            self.misuse.append(f"called after it was closed: {call}")
        if offset < 0 or offset % BLOCK or length % BLOCK or offset + length > self.size:
            self.misuse.append(f"called out of bounds: {call}")
        outcome = self.outcomes[self.choose("outcome", len(self.outcomes))] if self.outcomes is not WELL else "well"
        if outcome == "short" and (name not in ("read", "write") or length <= BLOCK):
            outcome = "OSError" if "OSError" in self.outcomes else "well"
        self.running.append(call)
        return call, outcome

    def end(self, call: Call) -> None:
        self.running.remove(call)

    def fail(self, call: Call, number: int) -> None:
        """Write down that the application must see this errno."""
        self.failures.append(
            Failure(name=call.name, offset=call.offset, length=call.length, number=through_block_status(-number))
        )

    def raise_outcome(self, call: Call, outcome: str) -> None:
        if outcome == "OSError":
            number = ERRNOS[self.choose("errno", len(ERRNOS))]
            self.fail(call, number)
            raise OSError(number, "planned")
        if outcome == "busy":
            # Nobody may see that: the engine tries again.
            raise OSError(errno.ENOMEM, "planned")
        if outcome == "bug":
            self.fail(call, errno.EIO)
            raise PlantedFaultError("planned")

    async def suspend(self, call: Call) -> None:
        """Suspend as often as is drawn: for the test to release, or for a single pass."""
        times = self.choose("suspensions", self.suspensions_max + 1) if self.suspensions_max else 0
        for _ in range(times):
            if not self.hangs or self.choose(f"suspend {call.name} for", 3) == 2:
                await trio.lowlevel.checkpoint()
            elif self.suspensions_max:
                call.gate = gate = trio.Event()
                try:
                    await gate.wait()
                except trio.Cancelled:
                    # A backend that cleans up asynchronously when it is cancelled.
                    if self.choose("clean up", 2):
                        with trio.CancelScope(shield=True):
                            await trio.lowlevel.checkpoint()
                    raise
                finally:
                    call.gate = None

    def parts(self, call: Call, outcome: str) -> tuple[slice, slice, int | None]:
        """Which bytes of the buffer move before and after the suspension, and what the call returns."""
        length = call.length
        result: int | None = None
        if outcome == "short":
            length = result = BLOCK * (1 + self.choose("short by", length // BLOCK - 1))
            if call.name == "write":
                self.fail(call, errno.EIO)
        half = length // BLOCK // 2 * BLOCK
        return slice(0, half), slice(half, length), result

    def fill(self, call: Call, buffer: memoryview, part: slice) -> None:
        buffer[part] = self.data[call.offset + part.start : call.offset + part.stop]

    def store(self, offset: int, data: bytes | memoryview, *, fua: bool) -> None:
        self.data[offset : offset + len(data)] = data
        for block in range(offset // BLOCK, (offset + len(data)) // BLOCK):
            self.versions[block] += 1
            if fua:
                self.durable[block] = self.versions[block]

    def settle(self, versions: list[int]) -> None:
        """These versions reached stable storage."""
        self.durable = [max(old, new) for old, new in zip(self.durable, versions, strict=True)]


class _Opened(Backend):
    """A backend around a `Disk`."""

    def __init__(self, disk: Disk, unsupported: frozenset[str]) -> None:
        self.disk = disk
        self.size = disk.size
        self.unsupported = unsupported

    async def open(self) -> None:
        await self.disk.open()

    async def aclose(self) -> None:
        await self.disk.close()

    def discard(self, offset: int, length: int) -> None:
        # A plain method in the async backend too: an engine must cope with a mixture.
        call, outcome = self.disk.begin("discard", offset, length)
        try:
            self.disk.raise_outcome(call, outcome)
            self.disk.store(offset, bytes(length), fua=False)
        finally:
            self.disk.end(call)


class PlainDisk(_Opened):
    """Plain methods."""

    def read(self, offset: int, buffer: memoryview) -> int | None:
        disk = self.disk
        call, outcome = disk.begin("read", offset, len(buffer))
        try:
            disk.raise_outcome(call, outcome)
            first, second, result = disk.parts(call, outcome)
            disk.fill(call, buffer, first)
            disk.fill(call, buffer, second)
            return result
        finally:
            disk.end(call)

    def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        disk = self.disk
        call, outcome = disk.begin("write", offset, len(data))
        try:
            first, second, result = disk.parts(call, outcome)
            disk.store(offset, data[first], fua=fua)
            disk.raise_outcome(call, outcome)
            disk.store(offset + second.start, data[second], fua=fua)
            return result
        finally:
            disk.end(call)

    def flush(self) -> None:
        call, outcome = self.disk.begin("flush", 0, 0)
        try:
            self.disk.raise_outcome(call, outcome)
            self.disk.settle(self.disk.versions)
        finally:
            self.disk.end(call)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        call, outcome = self.disk.begin("write_zeroes", offset, length)
        try:
            self.disk.raise_outcome(call, outcome)
            self.disk.store(offset, bytes(length), fua=False)
        finally:
            self.disk.end(call)


class AsyncDisk(_Opened):
    """Async methods, which suspend as they are told."""

    async def _serve(self, call: Call, outcome: str, before: Callable[[], None], after: Callable[[], None]) -> None:
        disk = self.disk
        try:
            before()
            await disk.suspend(call)
            disk.raise_outcome(call, outcome)
            after()
        finally:
            disk.end(call)

    async def read(self, offset: int, buffer: memoryview) -> int | None:
        disk = self.disk
        call, outcome = disk.begin("read", offset, len(buffer))
        first, second, result = disk.parts(call, outcome)
        await self._serve(
            call, outcome, lambda: disk.fill(call, buffer, first), lambda: disk.fill(call, buffer, second)
        )
        return result

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        disk = self.disk
        call, outcome = disk.begin("write", offset, len(data))
        first, second, result = disk.parts(call, outcome)
        await self._serve(
            call,
            outcome,
            lambda: disk.store(offset, data[first], fua=fua),
            lambda: disk.store(offset + second.start, data[second], fua=fua),
        )
        return result

    async def flush(self) -> None:
        disk = self.disk
        call, outcome = disk.begin("flush", 0, 0)
        versions = list(disk.versions)
        await self._serve(call, outcome, lambda: None, lambda: disk.settle(versions))

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        disk = self.disk
        call, outcome = disk.begin("write_zeroes", offset, length)
        await self._serve(call, outcome, lambda: None, lambda: disk.store(offset, bytes(length), fua=False))
