"""Devices of ordinary users: who may do what with them, and for how long their servers may think."""

from __future__ import annotations

import errno
from collections.abc import Callable

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.sim.mini import RawQueue, basic_params, live, machine
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import SimKernel
from ublk_trio.kernel_sim.call import Identity
from ublk_trio.kernel_sim.char_device import Node
from ublk_trio.kernel_sim.clock import Timer
from ublk_trio.kernel_sim.device import SimDevice
from ublk_trio.kernel_sim.ring import SimControlRing
from ublk_trio.uapi import ControlCommand, DeviceState, DevInfo, Feature, IoOp, Params

U = Feature.UNPRIVILEGED_DEV
INFO = DevInfo(dev_id=0, nr_hw_queues=1, queue_depth=2, max_io_buf_bytes=65536, flags=U)
PATH = b"/dev/ublkc0\0"


class User:
    """Sends commands with the char device's path in front of the buffer, as an ordinary user has to."""

    def __init__(self, kernel: SimKernel, control: SimControlRing) -> None:
        self.kernel = kernel
        self.control = control

    async def command(
        self, command: int, *, data: int = 0, payload: bytes = b"", path: bytes = PATH, queue_id: int = 0xFFFF
    ) -> tuple[int, bytes]:
        buffer = bytearray(path + payload)
        result = await self.control.submit(
            command,  # type: ignore[arg-type]
            dev_id=0,
            data=data,
            buffer=buffer,
            dev_path_length=len(path),
            queue_id=queue_id,
        )
        return result, bytes(buffer[len(path) :])

    async def result(
        self, command: int, *, data: int = 0, payload: bytes = b"", path: bytes = PATH, queue_id: int = 0xFFFF
    ) -> int:
        return (await self.command(command, data=data, payload=payload, path=path, queue_id=queue_id))[0]

    async def add(self, flags: Feature = U) -> int:
        buffer = bytearray(attrs.evolve(INFO, flags=flags).pack())
        return await self.control.submit(ControlCommand.ADD_DEV, dev_id=0, buffer=buffer)

    async def info(self) -> DevInfo:
        result, answer = await self.command(ControlCommand.GET_DEV_INFO2, payload=bytes(64))
        assert result == 0
        return DevInfo.unpack(answer)

    @property
    def device(self) -> SimDevice:
        return self.kernel.devices[0]

    async def open(self) -> RawQueue:
        self.char = await self.kernel.open_char_device(await self.info(), ioctl_encoded=True)
        return RawQueue(self.char.open_queue(0, buffers=2))

    async def live(self) -> RawQueue:
        assert await self.add() == 0
        assert await self.result(ControlCommand.SET_PARAMS, payload=basic_params().pack()) == 0
        queue = await self.open()
        queue.fetch_all()
        assert await self.result(ControlCommand.START_DEV, data=self.kernel.server_pid) == 0
        return queue


VERSIONS = pytest.mark.parametrize("version", [(6, 12), (7, 3)])


@VERSIONS
async def test_a_users_device_from_start_to_end(version: tuple[int, int]) -> None:
    """An ordinary user adds a device, serves it and deletes it; the disk is never scanned for partitions."""
    kernel = SimKernel(version=version, privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        queue = await user.live()
        assert queue.events() == []
        info = await user.info()
        assert U in info.flags
        assert (info.owner_uid, info.owner_gid) == (kernel.uid, kernel.gid) == (1000, 1000)
        assert await user.result(ControlCommand.STOP_DEV) == 0
        queue.ring.close()
        user.char.close()
        assert await user.result(ControlCommand.DEL_DEV) == 0
    assert kernel.leftovers() == []


async def test_root_has_no_unprivileged_device() -> None:
    """Root's ADD_DEV loses the flag; an ordinary user's needs it."""
    kernel = SimKernel()
    async with machine(kernel) as m:
        assert U not in (await m.add(flags=U)).flags
        kernel.privileged = False
        assert await User(kernel, m.control).add(Feature(0)) == -errno.EPERM


@pytest.mark.parametrize(
    ("flags", "result"),
    [
        (Feature.USER_COPY, -errno.EINVAL),
        (Feature.SUPPORT_ZERO_COPY, -errno.EINVAL),
        (Feature.AUTO_BUF_REG, -errno.EINVAL),
        (Feature.USER_RECOVERY, 0),
        (Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE, 0),
        (Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO | Feature.QUIESCE, 0),
        (Feature.QUIESCE, -errno.EINVAL),
        (Feature.USER_RECOVERY_REISSUE, -errno.EINVAL),
    ],
)
async def test_flags_of_a_users_device(flags: Feature, result: int) -> None:
    """What would let a user's server reach others' data is refused; recovery is dropped without a word, FAIL_IO and QUIESCE are not."""
    kernel = SimKernel(privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        assert await user.add(U | flags) == result
        if not result:
            granted = (await user.info()).flags
            assert granted & flags == flags & ~(Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE)


async def test_zero_copy_was_no_feature() -> None:
    """6.12 looks at USER_COPY only: it knows no other way to move data."""
    kernel = SimKernel(version=(6, 12), privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        assert await user.add(U | Feature.USER_COPY) == -errno.EINVAL
        assert await user.add(U | Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG) == 0


async def test_the_limit_is_for_users_devices() -> None:
    """ublks_max counts what ordinary users have added and nobody has deleted."""
    kernel = SimKernel(devices_max=1)
    async with machine(kernel) as m:
        for dev_id in (5, 6):
            await m.add(dev_id)
        kernel.privileged = False
        user = User(kernel, m.control)
        assert await user.add() == 0
        assert await user.add() == -errno.EACCES
        kernel.privileged = True
        await m.add(7)
        kernel.privileged = False
        assert await user.result(ControlCommand.DEL_DEV) == 0
        assert await user.add() == 0


# ---------------------------------------------------------------------- permission

READERS = (
    ControlCommand.GET_DEV_INFO,
    ControlCommand.GET_DEV_INFO2,
    ControlCommand.GET_PARAMS,
    ControlCommand.GET_QUEUE_AFFINITY,
)
WRITERS = (
    ControlCommand.SET_PARAMS,
    ControlCommand.START_DEV,
    ControlCommand.STOP_DEV,
    ControlCommand.DEL_DEV,
    ControlCommand.START_USER_RECOVERY,
    ControlCommand.END_USER_RECOVERY,
    ControlCommand.UPDATE_SIZE,
    ControlCommand.QUIESCE_DEV,
    ControlCommand.TRY_STOP_DEV,
    ControlCommand.REG_BUF,
    ControlCommand.UNREG_BUF,
)


@pytest.mark.parametrize("command", READERS + WRITERS)
async def test_what_the_path_must_be(command: ControlCommand) -> None:
    """EINVAL: no path, or a length that cannot be. EPERM: another device's. ENOENT: none. EACCES: no right to it."""
    kernel = SimKernel(privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        assert await user.add() == 0
        assert await user.result(command, path=b"") == -errno.EINVAL
        assert await control.submit(command, dev_id=0, buffer=bytearray(8), dev_path_length=9) == -errno.EINVAL
        assert await control.submit(command, dev_id=0, length=8, dev_path_length=8) == -errno.EFAULT
        assert await user.result(command, path=bytes(4097)) == -errno.EINVAL
        assert await user.result(command, path=b"/dev/ublkc1\0") == -errno.ENOENT
        assert await user.result(command, path=b"\0" * 8) == -errno.ENOENT
        for other in (b"/dev/ublk-control", b"/dev", b"/"):
            assert await user.result(command, path=other) == -errno.EPERM
        user.device.node = Node(uid=0, gid=kernel.gid, mode=0o646)
        # The group's rights are the caller's, not everybody's.
        assert await user.result(command) == (-errno.EACCES if command in WRITERS else -errno.EINVAL)
        user.device.node.mode = 0o600
        assert await user.result(command) == -errno.EACCES


@pytest.mark.parametrize(
    "path", [PATH, b"/dev/ublkc0", b"//dev/./ublkc0", b"dev/ublkc0\0garbage", PATH.ljust(4096, b"\0")]
)
async def test_paths_to_the_same_file(path: bytes) -> None:
    """A path is a path: with or without its end, and by any way."""
    kernel = SimKernel(privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        assert await user.add() == 0
        assert await user.result(ControlCommand.GET_DEV_INFO2, path=path, payload=bytes(64)) == 0


@pytest.mark.parametrize(
    ("version", "command"),
    [
        ((7, 3), ControlCommand.DEL_DEV_ASYNC),
        ((6, 12), ControlCommand.DEL_DEV_ASYNC),
        ((7, 3), 0x7F),
        ((6, 12), ControlCommand.UPDATE_SIZE),
        ((6, 12), ControlCommand.QUIESCE_DEV),
        ((6, 12), ControlCommand.TRY_STOP_DEV),
    ],
)
async def test_commands_that_users_devices_do_not_have(version: tuple[int, int], command: int) -> None:
    """An unlisted command is EINVAL, after the path was read and before it is looked at; for root, too."""
    kernel = SimKernel(version=version, privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        assert await user.add() == 0
        for kernel.privileged in (False, True):
            assert await user.result(command, path=b"/nowhere") == -errno.EINVAL


async def test_the_path_counts_for_the_length() -> None:
    """What is behind the path must be long enough by itself."""
    kernel = SimKernel(privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        assert await user.add() == 0
        for command, length in (
            (ControlCommand.GET_DEV_INFO, 64),
            (ControlCommand.GET_DEV_INFO2, 64),
            (ControlCommand.GET_QUEUE_AFFINITY, 8),
        ):
            assert await user.result(command, payload=bytes(length)) == 0
            assert await user.result(command, payload=bytes(length - 1)) == -errno.EINVAL
        query = Params.query()
        assert await user.result(ControlCommand.GET_PARAMS, payload=query) == 0
        assert await user.result(ControlCommand.GET_PARAMS, payload=query[:-1]) == -errno.EINVAL


async def test_others_keep_out() -> None:
    """Another user can neither command the device, nor open its char device or its disk; root can, by the path."""
    kernel = SimKernel(privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        queue = await user.live()
        queue.ring.close()
        user.char.close()
        assert user.device.open_disk(kernel.identity) == 0
        kernel.uid = 1001
        assert await user.result(ControlCommand.STOP_DEV) == -errno.EACCES
        assert user.device.open_disk(kernel.identity) == -errno.EPERM
        with pytest.raises(KernelError) as caught:
            await kernel.open_char_device(INFO, ioctl_encoded=True)
        assert caught.value.errno == errno.EACCES
        kernel.privileged = True
        assert await control.submit(ControlCommand.STOP_DEV, dev_id=0) == -errno.EINVAL
        assert await user.result(ControlCommand.STOP_DEV) == 0


async def test_users_keep_out_of_roots_devices() -> None:
    """Root's device is EPERM to everybody else, whatever path they name."""
    kernel = SimKernel()
    async with machine(kernel) as m:
        await m.add()
        kernel.privileged = False
        user = User(kernel, m.control)
        for command in (*READERS, *WRITERS, ControlCommand.DEL_DEV_ASYNC, 0x7F):
            assert await user.result(command) == -errno.EPERM


def open_result(kernel: SimKernel, caller: Identity | None = None) -> int:
    """0, or the errno with which open(2) of the disk fails."""
    try:
        kernel.block_device(0).open(caller=caller).close()
    except OSError as error:
        return -(error.errno or 0)
    return 0


async def test_a_users_disk_is_for_its_owner_and_root() -> None:
    """Nobody else may open it, EPERM, were its node open to all. Root's disk is for everybody."""
    kernel = SimKernel(privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        await user.live()
        callers = [
            Identity(pid=1, uid=uid, gid=gid, privileged=privileged)
            for uid, gid, privileged in ((1000, 1000, False), (1001, 1000, False), (1000, 1001, False), (0, 0, True))
        ]
        assert [open_result(kernel, caller) for caller in callers] == [0, -errno.EPERM, -errno.EPERM, 0]
        assert open_result(kernel) == 0
        kernel.crash_server(0)
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m):
        assert [open_result(kernel, caller) for caller in callers] == [0] * 4


async def test_a_device_that_was_stopped_by_try_stop_is_for_root() -> None:
    """After TRY_STOP_DEV an ordinary user finds no disk to open, ENXIO, not even that of the device's next server."""
    kernel = SimKernel(privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        queue = await user.live()
        assert await user.result(ControlCommand.TRY_STOP_DEV) == 0
        queue.ring.close()
        user.char.close()
        queue = await user.open()
        queue.fetch_all()
        assert await user.result(ControlCommand.START_DEV, data=kernel.server_pid) == 0
        assert kernel.block_device(0).exists
        assert open_result(kernel) == -errno.ENXIO
        kernel.privileged = True
        assert open_result(kernel) == 0
        kernel.crash_server(0)


# ---------------------------------------------------------------------- 30 seconds


async def test_a_slow_server_is_killed() -> None:
    """A request that an ordinary user's server has not answered after 30 s kills the server; the disk goes, EIO for all."""
    kernel = SimKernel(privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        queue = await user.live()
        disk = kernel.block_device(0)
        early = disk.submit(IoOp.READ, 0, 512)
        queue.commit(queue.event().tag, 512)
        slow = disk.submit(IoOp.READ, 0, 512)
        kernel.let_time_pass(10)
        late = disk.submit(IoOp.READ, 512, 512)
        kernel.let_time_pass(19.9)
        assert not slow.done
        kernel.let_time_pass(0.1)
        assert [bio.result for bio in (early, slow, late)] == [512, -errno.EIO, -errno.EIO]
        with pytest.raises(trio.ClosedResourceError):
            queue.events()
        info = await user.info()
        assert (info.state, info.ublksrv_pid) == (DeviceState.DEAD, -1)


async def test_a_server_is_killed_that_has_only_its_rings_left() -> None:
    """A ring keeps the char device open for its pending commands, so a slow server is still found behind it."""
    kernel = SimKernel(privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        queue = await user.live()
        slow = kernel.block_device(0).submit(IoOp.READ, 0, 512)
        assert queue.events()
        user.char.close()
        kernel.let_time_pass(29.9)
        assert not slow.done
        kernel.let_time_pass(0.1)
        assert slow.result == -errno.EIO
        with pytest.raises(trio.ClosedResourceError):
            queue.events()


async def test_an_answer_in_time_saves_the_server() -> None:
    """Each request has its own 30 s, and the rest of a short READ has them again."""
    kernel = SimKernel(privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        queue = await user.live()
        bio = kernel.block_device(0).submit(IoOp.READ, 0, 1024)
        kernel.let_time_pass(29)
        queue.commit(queue.event().tag, 512)
        kernel.let_time_pass(29)
        queue.commit(queue.event().tag, 512)
        kernel.let_time_pass(60)
        assert bio.result == 1024
        kernel.crash_server(0)


async def test_time_is_counted_from_each_request() -> None:
    """Of two requests the first is answered: the server is killed 30 s after the second was delivered, and not later."""
    kernel = SimKernel(privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        queue = await user.live()
        disk = kernel.block_device(0)
        disk.submit(IoOp.READ, 0, 512)
        answered = queue.event()
        kernel.let_time_pass(10)
        second = disk.submit(IoOp.READ, 512, 512)
        queue.commit(answered.tag, 512)
        kernel.let_time_pass(29.9)
        assert not second.done
        kernel.let_time_pass(0.1)
        assert second.result == -errno.EIO


async def test_a_device_has_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests come, the clock keeps one timer for them; after a pause the next request has its time, too."""
    kernel = SimKernel(privileged=False)
    timers: list[float] = []
    after = kernel.clock.after

    def counted(seconds: float, callback: Callable[[], None]) -> Timer:
        timers.append(seconds)
        return after(seconds, callback)

    monkeypatch.setattr(kernel.clock, "after", counted)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        queue = await user.live()
        disk = kernel.block_device(0)
        for _ in range(3):
            disk.submit(IoOp.READ, 0, 512)
            queue.commit(queue.event().tag, 512)
        assert timers == [30]
        kernel.let_time_pass(100)
        assert timers == [30]
        late = disk.submit(IoOp.READ, 0, 512)
        kernel.let_time_pass(30)
        assert late.result == -errno.EIO
        assert timers == [30, 30]


async def test_who_waits_for_a_tag_has_not_begun() -> None:
    """The 30 s begin with the delivery: a server that answers each request in time lives, however long the line."""
    kernel = SimKernel(privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        queue = await user.live()
        disk = kernel.block_device(0)
        bios = [disk.submit(IoOp.READ, 4096 * number, 512) for number in range(6)]
        for _ in range(3):
            events = queue.events()
            kernel.let_time_pass(29)
            for event in events:
                queue.commit(event.tag, 512)
        assert [bio.result for bio in bios] == [512] * 6
        kernel.let_time_pass(1000)
        assert user.device.char is user.char
        kernel.crash_server(0)


async def test_before_6_15_nobody_tells_of_a_killed_server_that_had_every_tag() -> None:
    """An ordinary user's server is killed, once; its requests, unlike those of root's devices, are not looked at again."""
    kernel = SimKernel(version=(6, 12), privileged=False)
    async with kernel.open_control() as control:
        user = User(kernel, control)
        queue = await user.live()
        bios = [kernel.block_device(0).submit(IoOp.READ, 4096 * number, 512) for number in range(2)]
        queue.events()
        kernel.let_time_pass(30)
        assert user.device.char is None
        kernel.let_time_pass(86400)
        assert [bio.result for bio in bios] == [None, None]


async def test_roots_servers_have_all_the_time() -> None:
    """A privileged device's requests have no limit."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, trio.open_nursery() as nursery:
        await m.add(depth=2)
        await m.set_params(0, basic_params())
        char = await kernel.open_char_device(INFO, ioctl_encoded=True)
        queue = RawQueue(char.open_queue(0, buffers=2))
        queue.fetch_all()
        assert await m.start() == 0
        bio = kernel.block_device(0).submit(IoOp.READ, 0, 512)
        event = queue.event()
        kernel.let_time_pass(86400)
        queue.commit(event.tag, 512)
        assert bio.result == 512
        nursery.start_soon(m.stop)
        await wait_all_tasks_blocked()
        queue.ring.close()
        char.close()


async def test_a_users_fetch_keeps_roots_disk_from_being_scanned() -> None:
    """A disk that an ordinary user serves is not scanned for partitions, even when root added it."""
    kernel = SimKernel()
    async with machine(kernel) as m:
        info = await m.add(depth=2)
        await m.set_params(0, basic_params())
        char = await kernel.open_char_device(info, ioctl_encoded=True)
        queue = RawQueue(char.open_queue(0, buffers=2))
        kernel.privileged = False
        queue.fetch_all()
        kernel.privileged = True
        assert await m.start() == 0
        assert queue.events() == []
        kernel.crash_server(0)
