"""A verified workload: applications that use a disk at once, each checking every byte that it reads against what it
wrote.

Each application has a region of its own, so what a read must give is known exactly; within it, it issues reads,
writes, flushes, discards and zeroing, one after the other, in sizes from one block to beyond the largest request.
What it has in mind of its region is the model; nothing is assumed of a discarded range, which is written again before
it is read.
"""

from __future__ import annotations

import itertools
import random
import time
from typing import Literal, Protocol

import attrs
import trio

Pattern = Literal["random", "sequential"]

#: Applications at once, and the bytes of the region that each uses at the most.
APPLICATIONS = 16
REGION_BYTES_MAX = 1 << 20
#: Bytes of the longest read or write: beyond the usual largest request, so that splitting is exercised.
LENGTH_BYTES_MAX = 1 << 20


class Disk(Protocol):
    """What a workload needs of a disk: a simulated one, or any other way to a block device."""

    @property
    def size(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    async def read(self, offset: int, length: int) -> bytes: ...
    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None: ...
    async def flush(self) -> None: ...
    async def discard(self, offset: int, length: int) -> None: ...
    async def write_zeroes(self, offset: int, length: int) -> None: ...


@attrs.define
class WorkloadReport:
    """What a workload did so far."""

    disk: str
    reads: int = 0
    writes: int = 0
    others: int = 0
    bytes_verified: int = 0
    seconds: float = 0.0
    faults: list[str] = attrs.Factory(list)

    def __str__(self) -> str:
        done = self.reads + self.writes + self.others
        rate = done / self.seconds if self.seconds else 0.0
        return (
            f"{self.disk}: {self.reads} reads, {self.writes} writes, {self.others} others, "
            f"{self.bytes_verified / 1e6:.1f} MB verified, {rate:.0f} requests/s, {len(self.faults)} faults"
        )


@attrs.frozen(kw_only=True)
class Workload:
    """A seeded workload. The same seed issues the same requests per application; how far it gets depends on the
    time."""

    seed: int = 0
    pattern: Pattern = "random"
    #: How long to run at most.
    seconds: float = 5.0
    #: How many operations each application does; None: as many as there is time for.
    operations: int | None = None
    #: Bytes of each application's region at the most.
    region_bytes: int = REGION_BYTES_MAX
    #: False for a disk that forgets what is written (null): then reads must give zeroes.
    keeps_data: bool = True
    #: False for a disk that refuses to be changed: then it is only read.
    writable: bool = True

    async def run(self, disk: Disk, report: WorkloadReport) -> None:
        """Run on a disk, which it overwrites; faults are collected in the report; verifying nothing is one."""
        applications = max(1, min(APPLICATIONS, disk.size // disk.block_size))
        region = min(disk.size // applications, self.region_bytes)
        region -= region % disk.block_size
        begin = time.monotonic()
        with trio.move_on_after(self.seconds) as scope:
            async with trio.open_nursery() as nursery:
                for number in range(applications):
                    chance = random.Random(f"{self.seed}/{report.disk}/{number}")
                    application = _Application(self, chance, disk, number * region, region, report)
                    nursery.start_soon(application.run, begin)
        report.seconds = time.monotonic() - begin
        if self.operations is not None and scope.cancelled_caught:
            report.faults.append(f"{report.disk}: not done after {self.seconds:g} s")
        elif not report.bytes_verified and not report.faults:
            report.faults.append(f"{report.disk}: nothing was verified in {self.seconds:g} s: give it more time")


class _Application:
    def __init__(
        self, workload: Workload, chance: random.Random, disk: Disk, start: int, size: int, report: WorkloadReport
    ) -> None:
        self.workload = workload
        self.chance = chance
        self.disk = disk
        self.start = start
        self.size = size
        self.report = report
        self.model = bytearray()
        self.next_block = 0

    async def run(self, begin: float) -> None:
        try:
            self.model[:] = await self.disk.read(self.start, self.size)
            for _ in itertools.count() if self.workload.operations is None else range(self.workload.operations):
                await self._one()
                if self.report.faults:
                    return
                self.report.seconds = time.monotonic() - begin
                await trio.lowlevel.checkpoint()
        except OSError as error:
            self.report.faults.append(f"{self.report.disk}: {error}")

    def _range(self) -> tuple[int, int]:
        block = self.disk.block_size
        blocks = self.size // block
        length = min(blocks, LENGTH_BYTES_MAX // block, 1 << self.chance.randrange(12))
        if self.workload.pattern == "random":
            return self.chance.randrange(blocks - length + 1) * block, length * block
        if self.next_block + length > blocks:
            self.next_block = 0
        first, self.next_block = self.next_block, self.next_block + length
        return first * block, length * block

    async def _one(self) -> None:
        offset, length = self._range()
        kind = self.chance.randrange(100)
        if kind < 45 or not self.workload.writable:
            await self._verify(offset, length)
        elif kind < 90:
            await self._write(offset, length, fua=kind >= 85)
        elif kind < 94:
            await self._zero(offset, length)
        elif kind < 97:
            await self._discard(offset, length)
        else:
            await self.disk.flush()
            self.report.others += 1

    async def _verify(self, offset: int, length: int) -> None:
        data = await self.disk.read(self.start + offset, length)
        self.report.reads += 1
        expected = self.model[offset : offset + length]
        if data == expected:
            self.report.bytes_verified += length
            return
        wrong = next((i for i, (a, b) in enumerate(zip(data, expected, strict=False)) if a != b), len(data))
        self.report.faults.append(f"{self.report.disk}: wrong byte at offset {self.start + offset + wrong}")

    async def _write(self, offset: int, length: int, *, fua: bool) -> None:
        data = self.chance.randbytes(length)
        await self.disk.write(self.start + offset, data, fua=fua)
        if self.workload.keeps_data:
            self.model[offset : offset + length] = data
        self.report.writes += 1

    async def _zero(self, offset: int, length: int) -> None:
        await self.disk.write_zeroes(self.start + offset, length)
        self.model[offset : offset + length] = bytes(length)
        self.report.others += 1

    async def _discard(self, offset: int, length: int) -> None:
        try:
            await self.disk.discard(self.start + offset, length)
        except OSError:
            return  # the disk does not offer it
        self.report.others += 1
        await self._write(offset, length, fua=False)
