"""User copy in the engine, on the simulated kernel: copies that fall short, reads that are short, kernels that do not have it."""

from __future__ import annotations

import errno

import pytest
import trio

from ublk_trio import Backend, DataMode, DeviceOptions, Memory, SimKernel, UsageError, open_target
from ublk_trio.handlers import Serve
from ublk_trio.kernel_sim.choices import DrawnChoices

BLOCK = 4096
SIZE = 64 * BLOCK
USER_COPY = DeviceOptions(mode=DataMode.USER_COPY, depth=4, pool_buffers=1)


def bad_kernel(*faults: str) -> SimKernel:
    """One on which these faults happen whenever they can, and nothing else."""
    choices = DrawnChoices(lambda what, options: options - 1 if what in faults else 0)
    return SimKernel(choices, faults=faults, partition_scan=False, paranoid=True)


class Counts(Memory):
    """Memory that knows what it was asked for."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.calls: list[str] = []

    def read(self, offset: int, buffer: memoryview) -> int | None:
        self.calls.append("read")
        return super().read(offset, buffer)

    def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        self.calls.append("write")
        return super().write(offset, data, fua=fua)


@pytest.mark.parametrize("workers", [None, (0, 1)], ids=["alone", "late-workers"])
async def test_a_copy_that_falls_short(workers: tuple[int, ...] | None) -> None:
    """The request is EIO, whole, and counts as failed; a write does not reach the backend; then all goes on as before."""
    kernel, backend = bad_kernel("copy-short", *(["worker-late"] if workers else [])), Counts()
    with trio.fail_after(30):
        async with open_target(kernel, cpus=workers) as target:
            device = await target.start_device(backend, USER_COPY)
            disk = kernel.block_device(device.dev_id)
            for operation in (disk.write(0, b"w" * 2 * BLOCK), disk.read(0, 2 * BLOCK)):
                with pytest.raises(OSError, match=r".") as raised:
                    await operation
                assert raised.value.errno == errno.EIO
            assert backend.calls == ["read"]
            statistics = device.statistics()
            assert (statistics.requests, statistics.failed) == (2, 2)
            assert statistics.queues[0].ring.copies_failed == 1
            kernel.faults.clear()
            async with trio.open_nursery() as nursery:
                for block in range(16):
                    nursery.start_soon(disk.write, block * BLOCK, bytes([block + 1]) * BLOCK)
            for block in range(16):
                assert await disk.read(block * BLOCK, BLOCK) == bytes([block + 1]) * BLOCK
            assert device.statistics().failed == 2
    assert kernel.leftovers() == []
    kernel.check()


class Sips(Backend):
    """Reads one block at a time, and says ENOMEM before every second one."""

    def __init__(self) -> None:
        self.size = SIZE
        self.content = bytes(block + 1 for block in range(64) for _ in range(BLOCK))
        self.asked: list[int] = []

    def read(self, offset: int, buffer: memoryview) -> int:
        self.asked.append(offset // BLOCK)
        if len(self.asked) % 2 == 0:
            return -errno.ENOMEM
        buffer[:BLOCK] = self.content[offset : offset + BLOCK]
        return BLOCK


class SipsLate(Backend):
    """The same, but it suspends before it answers."""

    def __init__(self) -> None:
        self.size, self.plain = SIZE, Sips()

    async def read(self, offset: int, buffer: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        return self.plain.read(offset, buffer)


@pytest.mark.parametrize("version", [(6, 12), (7, 3)])
@pytest.mark.parametrize("serve", ["inline", "async"])
async def test_short_reads(serve: Serve, version: tuple[int, int]) -> None:
    """The rest of a short read is asked of the backend, again and again, until the application's read is whole: one request."""
    kernel = SimKernel(version=version, partition_scan=False, paranoid=True)
    backend = Sips() if serve == "inline" else SipsLate()
    with trio.fail_after(30):
        async with open_target(kernel) as target:
            device = await target.start_device(backend, USER_COPY)
            disk = kernel.block_device(device.dev_id)
            reads: dict[int, bytes] = {}

            async def read(first: int) -> None:
                reads[first] = await disk.read(first * BLOCK, 8 * BLOCK)

            async with trio.open_nursery() as nursery:
                for first in range(0, 64, 8):
                    nursery.start_soon(read, first)
            statistics = device.statistics()
    for first, data in reads.items():
        assert data == b"".join(bytes([block + 1]) * BLOCK for block in range(first, first + 8))
    assert (statistics.requests, statistics.failed) == (8, 0)
    assert statistics.queues[0].bytes_read == 64 * BLOCK
    assert kernel.leftovers() == []
    kernel.check()


class EndsEarly(Backend):
    """Has only the first block of any read."""

    size = SIZE

    def read(self, offset: int, buffer: memoryview) -> int:
        if len(buffer) < 2 * BLOCK:
            raise OSError(errno.ENOSPC, "no more")
        buffer[:BLOCK] = b"e" * BLOCK
        return BLOCK


async def test_a_rest_that_fails() -> None:
    """A read whose rest fails, fails: its beginning is not taken for all of it."""
    kernel = SimKernel(partition_scan=False, paranoid=True)
    with trio.fail_after(30):
        async with open_target(kernel) as target:
            device = await target.start_device(EndsEarly(), USER_COPY)
            with pytest.raises(OSError, match=r".") as raised:
                await kernel.block_device(device.dev_id).read(0, 2 * BLOCK)
            assert raised.value.errno == errno.ENOSPC
            assert device.statistics().failed == 1
    kernel.check()


async def test_kernels_that_do_not_have_it() -> None:
    """Before Linux 6.5 it is refused in words; it never becomes another mode."""
    kernel = SimKernel(version=(6, 4))
    async with open_target(kernel) as target:
        with pytest.raises(UsageError, match="does not do mode user-copy: choose copy"):
            await target.start_device(Memory(SIZE), USER_COPY)
    assert kernel.leftovers() == []
