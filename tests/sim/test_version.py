"""Releases differ as the contract says."""

from __future__ import annotations

import errno

import pytest

from ublk_trio.kernel_sim import KernelVersion, SimKernel
from ublk_trio.kernel_sim.uring import SimUring, Sqe, UringOp
from ublk_trio.ring import EVENT, pack_answer
from ublk_trio.uapi import ControlCommand, DevInfo, Feature, IoCmd, IoCommand, io_opcode


def test_versions_compare() -> None:
    """6.9 is older than 6.16, whatever its digits look like."""
    assert KernelVersion(6, 9) < KernelVersion(6, 16) < (7, 0)
    assert KernelVersion(7, 3) == (7, 3) == KernelVersion.of((7, 3))
    assert KernelVersion(7, 0) >= (6, 17)
    assert str(KernelVersion(6, 12)) == "6.12"
    with pytest.raises(ValueError, match=r"Linux 5\.19 had no ublk driver"):
        KernelVersion(5, 19)


def test_features_come_with_their_release() -> None:
    """No release offers a feature of a later one, and the simulator models all of them."""
    oldest = Feature.URING_CMD_COMP_IN_TASK | Feature.NEED_GET_DATA
    assert KernelVersion(6, 0).features == oldest
    assert KernelVersion(7, 3).features == Feature(sum(Feature))
    assert SimKernel().features == Feature(sum(Feature))
    recovery = Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE
    assert SimKernel(version=(6, 1)).features == oldest | recovery
    assert SimKernel(features=Feature.NEED_GET_DATA | Feature.ZONED).features == Feature.NEED_GET_DATA | Feature.ZONED


def test_commands_come_with_their_release() -> None:
    """A command is unknown before its release."""
    assert not KernelVersion(6, 8).has_command(ControlCommand.DEL_DEV_ASYNC)
    assert KernelVersion(6, 9).has_command(ControlCommand.DEL_DEV_ASYNC)
    assert not KernelVersion(6, 12).has_command(ControlCommand.QUIESCE_DEV)
    assert KernelVersion(6, 1).has_command(ControlCommand.START_USER_RECOVERY)


@pytest.mark.parametrize(
    ("version", "legacy_opcodes", "ioctl_encoded", "refusal"),
    [
        ((6, 1), True, False, 0),
        ((6, 1), True, True, errno.EINVAL),
        ((7, 3), True, False, 0),
        ((7, 3), False, False, errno.EOPNOTSUPP),
        ((7, 3), False, True, 0),
    ],
)
async def test_encodings(version: tuple[int, int], legacy_opcodes: bool, ioctl_encoded: bool, refusal: int) -> None:
    """Before 6.4 only bare numbers are understood; after it, a kernel may be built without them."""
    kernel = SimKernel(version=version, legacy_opcodes=legacy_opcodes)
    info = DevInfo(dev_id=0, nr_hw_queues=1, queue_depth=1, max_io_buf_bytes=4096)
    async with kernel.open_control() as control:

        async def send(command: ControlCommand, encoded: bool) -> int:
            return await control.submit(command, dev_id=0, buffer=bytearray(info.pack()), ioctl_encoded=encoded)

        result = await send(ControlCommand.ADD_DEV, ioctl_encoded)
        if refusal:
            assert result == -(errno.ENODEV if ioctl_encoded else errno.EOPNOTSUPP)
            assert await send(ControlCommand.ADD_DEV, not ioctl_encoded) == 0
        else:
            assert result == 0
        char = await kernel.open_char_device(info, ioctl_encoded=ioctl_encoded)
        ring = char.open_queue(0, buffers=1)
        ring.commit([pack_answer(IoCommand.FETCH_REQ, 0)])
        assert [event[2] for event in EVENT.iter_unpack(ring.reap())] == ([-refusal] if refusal else [])
        ring.close()
        char.close()


async def test_before_6_4_an_encoded_opcode_is_no_command() -> None:
    """Over a raw ring, too, FETCH_REQ in ioctl encoding is an unknown command, EINVAL, and a plain number a known one."""
    kernel = SimKernel(version=(6, 3))
    info = DevInfo(dev_id=0, nr_hw_queues=1, queue_depth=1, max_io_buf_bytes=4096)
    async with kernel.open_control() as control:
        added = control.submit(ControlCommand.ADD_DEV, dev_id=0, buffer=bytearray(info.pack()), ioctl_encoded=False)
        assert await added == 0
    process = kernel.process()
    ring, file = SimUring(process.main_task), process.open(kernel.char_path(0))
    payload = IoCmd(q_id=0, tag=0, result=0, addr=process.memory.map(4096)).pack()
    for encoded in (True, False):
        opcode = io_opcode(IoCommand.FETCH_REQ, ioctl_encoded=encoded)
        ring.submit([Sqe(opcode=UringOp.URING_CMD, file=file, cmd_op=opcode, payload=payload)])
        assert [cqe.result for cqe in ring.reap()] == ([-errno.EINVAL] if encoded else [])


async def test_no_release_before_6_5_knows_get_features() -> None:
    """To 6.4 GET_FEATURES is a command for a device, and there is none: ENODEV."""
    async with SimKernel(version=(6, 4)).open_control() as control:
        assert await control.submit(ControlCommand.GET_FEATURES, dev_id=0, buffer=bytearray(8)) == -errno.ENODEV
