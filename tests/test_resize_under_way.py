"""What only a simulated kernel shows of a resize: requests under way, commands that meet, and a planted bug."""

from __future__ import annotations

import errno
import logging
from unittest import mock

import pytest
import trio
import trio.testing

from tests.both.test_resize import BLOCK, MIB, Rubber
from tests.sim.mini import machine
from ublk_trio import Backend, DeviceOptions, KernelError, SimKernel, open_target
from ublk_trio.control import Control
from ublk_trio.uapi import IoOp


class Slow(Rubber):
    """Reads when it is told to."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.go_on = trio.Event()

    async def read(self, offset: int, buffer: memoryview) -> None:  # type: ignore[override]
        await self.go_on.wait()
        super().read(offset, buffer)


async def test_shrinks_under_a_request(caplog: pytest.LogCaptureFixture) -> None:
    """A request beyond the new end that was under way fails with EIO, and is not taken for a bug of the backend's."""
    kernel, backend = SimKernel(partition_scan=False), Slow(MIB)
    with trio.fail_after(10):
        async with open_target(kernel) as target:
            device = await target.start_device(backend)
            disk = kernel.block_device(device.dev_id)
            beyond, within = disk.submit(IoOp.READ, MIB - BLOCK, BLOCK), disk.submit(IoOp.READ, 0, BLOCK)
            await trio.testing.wait_all_tasks_blocked()
            backend.resize(MIB // 2)
            await device.update_size()
            backend.go_on.set()
            assert (await beyond.wait(), await within.wait()) == (-errno.EIO, BLOCK)
            assert disk.submit(IoOp.READ, MIB - BLOCK, BLOCK).result == 0, "the end of the file, as Linux has it"
    assert all(record.levelno < logging.ERROR for record in caplog.records)
    assert kernel.leftovers() == []


async def test_the_last_size_counts() -> None:
    """Calls that meet come one after the other: the kernel ends with the size that the backend has."""
    kernel, backend = SimKernel(partition_scan=False, faults={"held-longer"}), Rubber(MIB)
    with trio.fail_after(10):
        async with open_target(kernel) as target:
            device = await target.start_device(backend)
            async with trio.open_nursery() as nursery:
                for blocks in range(1, 20):
                    backend.resize(blocks * BLOCK)
                    nursery.start_soon(device.update_size)
                    await trio.lowlevel.checkpoint()
            assert kernel.block_device(device.dev_id).size == 19 * BLOCK


async def test_wrapped_backend() -> None:
    """A plain backend that is served async has the size that it has, not the one it had when it was opened."""
    kernel, backend = SimKernel(partition_scan=False), Rubber(MIB)
    with trio.fail_after(10):
        async with open_target(kernel) as target:
            device = await target.start_device(backend, DeviceOptions(serve="async"))
            backend.resize(2 * MIB)
            await device.update_size()
            assert kernel.block_device(device.dev_id).size == 2 * MIB


async def test_stopped_by_another_program() -> None:
    """A disk that is gone in the kernel cannot be resized, and that is said."""
    kernel, backend = SimKernel(partition_scan=False), Slow(MIB)
    with trio.fail_after(10):
        async with machine(kernel) as control, open_target(kernel) as target:
            device = await target.start_device(backend)
            assert await control.stop() == 0
            with pytest.raises(KernelError, match="it was stopped"):
                await device.update_size()
            await target.wait_device(device)


async def _check_size(backend: Backend) -> None:
    kernel = SimKernel(partition_scan=False)
    async with open_target(kernel) as target:
        device = await target.start_device(backend)
        assert isinstance(backend, Rubber)
        backend.resize(2 * MIB)
        await device.update_size()
        assert kernel.block_device(device.dev_id).size == 2 * MIB


async def test_planted_bug_is_caught() -> None:
    """A size in bytes where the kernel wants sectors is noticed."""
    update_size = Control.update_size

    async def in_bytes(control: Control, dev_id: int, size: int) -> None:
        await update_size(control, dev_id, size << 9)

    await _check_size(Rubber(MIB))
    with mock.patch.object(Control, "update_size", in_bytes), pytest.raises(AssertionError):
        await _check_size(Rubber(MIB))
