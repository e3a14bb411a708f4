"""Opcodes as plain numbers, as before Linux 6.4: a kernel may be built without them."""

from __future__ import annotations

import errno
import platform
from pathlib import Path

import trio

from tests.both.arms import RealDisk
from ublk_trio import Backend, Device, DeviceOptions, KernelError, Memory, RealKernel
from ublk_trio.control import Control, open_control
from ublk_trio.uapi import Feature


class Opened(Memory):
    """Counts, so that a refused start can be seen to have closed it."""

    opened = closed = 0

    async def open(self) -> None:
        self.opened += 1

    async def aclose(self) -> None:
        self.closed += 1


async def serve_and_check(kernel: RealKernel, control: Control, backend: Backend) -> None:
    """A disk whose every command, of control and of queues, is a plain number."""
    async with trio.open_nursery() as nursery:
        device: Device = await nursery.start(Device(kernel, control, backend, DeviceOptions(queues=2)).run)
        disk = await trio.to_thread.run_sync(RealDisk, device.path)
        try:
            await disk.write(4096, b"legacy  " * 512)
            assert await disk.read(0, 8192) == bytes(4096) + b"legacy  " * 512
        finally:
            await trio.to_thread.run_sync(disk.close)
        device.ask_to_stop()


def kernel_configuration() -> str:
    """What this kernel was built with; nothing if it does not say."""
    release = platform.release()
    for path in (Path("/lib/modules", release, "config"), Path("/boot", f"config-{release}")):
        if path.exists():
            return path.read_text(encoding="ascii")
    return ""


def single(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    return error


async def test_legacy_opcodes() -> None:
    """Without ioctl encoding a disk works where the kernel permits that; elsewhere the refusal has a name, and leaves nothing."""
    kernel, backend = RealKernel(), Opened(1 << 20)
    with trio.fail_after(60):
        async with open_control(kernel) as control:
            assert control.features is not None
            control.features &= ~Feature.CMD_IOCTL_ENCODE
            try:
                await serve_and_check(kernel, control, backend)
            except (KernelError, BaseExceptionGroup) as raised:
                error = single(raised)
                assert isinstance(error, KernelError), error
                assert error.errno == errno.EOPNOTSUPP
                assert "the kernel refused ADD_DEV: EOPNOTSUPP" in str(error)
                assert "CONFIG_BLKDEV_UBLK_LEGACY_OPCODES=y" not in kernel_configuration()
    assert (backend.opened, backend.closed) == (1, 1)
    assert kernel.device_ids() == []
