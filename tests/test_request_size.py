"""A request has as many bytes as was agreed: 512 KiB if nothing was said, and up to the kernel's 32 MiB."""

from __future__ import annotations

import pytest

from ublk_trio import DeviceOptions, Memory, SimKernel, UsageError, open_target
from ublk_trio.uapi import MAX_IO_BYTES

KIB, MIB = 1 << 10, 1 << 20


class Sized(Memory):
    """Keeps how long each write was."""

    def __init__(self) -> None:
        super().__init__(64 * MIB)
        self.written: list[int] = []

    def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        self.written.append(len(data))
        return super().write(offset, data, fua=fua)


@pytest.mark.parametrize(
    ("options", "largest"),
    [
        (DeviceOptions(depth=1), 512 * KIB),
        (DeviceOptions(depth=1, max_io_bytes=64 * KIB), 64 * KIB),
        (DeviceOptions(depth=1, max_io_bytes=32 * MIB), 32 * MIB),
    ],
    ids=["default", "64K", "32M"],
)
async def test_largest_request(options: DeviceOptions, largest: int) -> None:
    """What is as long is one request; a block more, and it is two; the bytes are right."""
    kernel, backend = SimKernel(partition_scan=False), Sized()
    # Else Linux has a cap of its own.
    backend.optimal_io_size = largest
    data = (b"0123456789abcdef" * (largest // 16 + 32))[: largest + 512]
    async with open_target(kernel) as target:
        device = await target.start_device(backend, options)
        disk = kernel.block_device(device.dev_id)
        await disk.write(0, data[:largest])
        await disk.write(0, data)
        assert await disk.read(0, len(data)) == data
    assert backend.written == [largest, largest, 512]
    assert kernel.leftovers() == []


async def test_beyond_the_kernel_s() -> None:
    """It is refused in words, and leaves nothing."""
    assert MAX_IO_BYTES == 32 * MIB
    kernel = SimKernel()
    async with open_target(kernel) as target:
        with pytest.raises(UsageError, match="max_io_bytes"):
            await target.start_device(Memory(MIB), DeviceOptions(max_io_bytes=64 * MIB))
    assert kernel.leftovers() == []
