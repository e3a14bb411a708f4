"""The char device as a file: mmap's rules, and who may hold it."""

from __future__ import annotations

import errno

import attrs
import pytest

from tests.sim.mini import live, machine
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import SimKernel
from ublk_trio.kernel_sim.call import Identity
from ublk_trio.kernel_sim.char_device import Node, check_mmap, check_open, permission
from ublk_trio.kernel_sim.device import SimDevice
from ublk_trio.uapi import DevInfo, Feature

#: Bytes of 4096 descriptors of 24 bytes each: a queue's share of the offsets.
SHARE = 98304


def make_device(*, queues: int = 2, depth: int = 200, descriptor: int = 0) -> SimDevice:
    info = DevInfo(
        dev_id=0,
        nr_hw_queues=queues,
        queue_depth=depth,
        max_io_buf_bytes=65536,
        # Without the feature the size is not looked at.
        io_desc_size=descriptor or 96,
        flags=Feature.IO_DESC_SIZE if descriptor else Feature(0),
    )
    return SimDevice(SimKernel(), info)


def mapped(device: SimDevice, offset: int, length: int, *, writable: bool = False, process: object = 1) -> int:
    return check_mmap(device, process, offset=offset, length=length, writable=writable)


@pytest.mark.parametrize(
    ("offset", "length", "writable", "expected"),
    [
        (0, 8192, False, 0),
        (SHARE, 8192, False, 1),
        # 200 descriptors are 4800 bytes: two pages, of which a mapping may ask for any part of the second.
        (0, 4800, False, 0),
        (0, 4097, False, 0),
        (0, 4096, False, -errno.EINVAL),
        (0, 8193, False, -errno.EINVAL),
        (0, 0, False, -errno.EINVAL),
        (512, 8192, False, -errno.EINVAL),
        (-4096, 8192, False, -errno.EINVAL),
        # Any page of a queue's share means the queue.
        (4096, 8192, False, 0),
        (SHARE - 4096, 8192, False, 0),
        (2 * SHARE - 4096, 8192, False, 1),
        (2 * SHARE, 8192, False, -errno.EINVAL),
        (0, 8192, True, -errno.EPERM),
        # A mapping that is writable is refused before anybody looks where it is.
        (2 * SHARE, 1, True, -errno.EPERM),
    ],
)
def test_what_may_be_mapped(offset: int, length: int, writable: bool, expected: int) -> None:
    """A queue's descriptors, all of their pages, read-only."""
    assert mapped(make_device(), offset, length, writable=writable) == expected


def test_larger_descriptors_take_more() -> None:
    """With descriptors of 256 bytes the length and every queue's offset grow."""
    device = make_device(descriptor=256)
    assert mapped(device, 0, 53248) == 0
    assert mapped(device, 256 * 4096, 53248) == 1
    assert mapped(device, SHARE, 8192) == -errno.EINVAL


def test_one_process_maps() -> None:
    """The first process that tries, even in vain, is the only one, until the device is reset; for others EINVAL comes before EPERM."""
    device = make_device()
    assert mapped(device, 0, 1) == -errno.EINVAL
    assert mapped(device, 0, 8192, process=2, writable=True) == -errno.EINVAL
    assert mapped(device, 0, 8192) == 0
    device.reset()
    assert mapped(device, 0, 8192, process=2) == 0
    assert mapped(device, 0, 8192) == -errno.EINVAL


def test_a_mapping_of_nothing_is_no_attempt() -> None:
    """An mmap of no bytes, or not at a page, is refused before anybody counts as the process that maps."""
    device = make_device()
    for offset, length in ((0, 0), (512, 8192), (-4096, 8192)):
        assert mapped(device, offset, length) == -errno.EINVAL
    assert mapped(device, 0, 8192, process=2) == 0


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "allowed"),
    [
        (0o600, 1, 9, True),
        (0o060, 9, 2, True),
        (0o006, 9, 9, True),
        (0o066, 1, 2, False),
        (0o606, 9, 2, False),
        (0o660, 9, 9, False),
        (0o004, 9, 9, False),
        (0o002, 9, 9, False),
    ],
)
def test_who_may_read_and_write(mode: int, uid: int, gid: int, allowed: bool) -> None:
    """The first class that fits decides: owner, group, others."""
    node = Node(uid=1, gid=2, mode=mode)
    caller = Identity(pid=1, uid=uid, gid=gid, privileged=False)
    assert node.allows(caller, 6) is allowed
    assert node.allows(attrs.evolve(caller, privileged=True), 6)


def test_what_open_says() -> None:
    """ENOENT, EACCES, EBUSY, in this order."""
    root = Identity(pid=1, uid=0, gid=0, privileged=True)
    somebody = Identity(pid=2, uid=5, gid=5, privileged=False)
    device = make_device()
    assert check_open(None, root) == -errno.ENOENT
    assert check_open(device, root) == 0
    device.releasing = True
    assert check_open(device, root) == -errno.EBUSY
    assert check_open(device, somebody) == -errno.EACCES
    device.removed = True
    assert check_open(device, somebody) == -errno.ENOENT


async def test_another_file_is_told_from_none() -> None:
    """A path that is not the device's char device: EPERM if there is such a file, ENOENT if not, or not any more."""
    kernel = SimKernel(partition_scan=False)
    root = Identity(pid=1)
    async with machine(kernel) as m, live(m):
        await m.add(1)
        device, other = kernel.devices[0], kernel.devices[1]

        def said(path: str) -> int:
            return permission(device, path, root, write=True)

        assert said("/dev/ublkc0") == said("dev//ublkc0") == 0
        for path in ("/", "/dev", "/dev/ublk-control", "/dev/ublkc1", "/dev/ublkb0"):
            assert said(path) == -errno.EPERM
        for path in ("", "/dev/null", "/dev/ublkc2", "/dev/ublkb1", "/dev/ublkb2"):
            assert said(path) == -errno.ENOENT
        other.removed = True
        assert said("/dev/ublkc1") == -errno.ENOENT
        other.removed = False


async def test_descriptor_size_is_what_was_asked() -> None:
    """IO_DESC_SIZE is granted with its size; without it the size is 24, whatever stood there; an older driver echoes the field."""
    for version, flags, asked, expected in (
        ((7, 3), Feature.IO_DESC_SIZE, 64, 64),
        ((7, 3), Feature(0), 64, 24),
        ((6, 12), Feature(0), 64, 64),
    ):
        async with SimKernel(version=version).open_control() as control:
            info = DevInfo(
                dev_id=0, nr_hw_queues=1, queue_depth=1, max_io_buf_bytes=4096, flags=flags, io_desc_size=asked
            )
            buffer = bytearray(info.pack())
            assert await control.submit(4, dev_id=0, buffer=buffer) == 0  # type: ignore[arg-type]
            assert DevInfo.unpack(buffer).io_desc_size == expected


async def test_the_device_is_taken_until_the_last_ring_is_gone() -> None:
    """Closing the char device before its rings frees nothing; closing them in the other order frees it with the last."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m, queues=2) as device:
        device.char.close()
        for queue in device.queues:
            with pytest.raises(KernelError) as caught:
                await kernel.open_char_device(device.info, ioctl_encoded=True)
            assert caught.value.errno == errno.EBUSY
            queue.ring.close()
        device.char = await kernel.open_char_device(device.info, ioctl_encoded=True)
        device.queues = []
    assert {violation.kind for violation in kernel.violations} == {"char-closed-before-ring"}
