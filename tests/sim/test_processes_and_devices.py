"""Devices between processes: who takes over from whom, whose pid is reported, who may map, who is killed."""

from __future__ import annotations

import errno

import pytest

from tests.sim.mini import basic_params
from tests.sim.raw import FETCH, RawControl, RawServer, control_sqe, raw_kernel, raw_server
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import SimKernel
from ublk_trio.kernel_sim.process import CharFile
from ublk_trio.kernel_sim.uring import SimUring
from ublk_trio.uapi import (
    CONTROL_PATH,
    ControlCommand,
    DeviceState,
    DevInfo,
    Feature,
    IoOp,
    descriptors_length,
)

R, REISSUE, U = Feature.USER_RECOVERY, Feature.USER_RECOVERY_REISSUE, Feature.UNPRIVILEGED_DEV
PATH = b"/dev/ublkc0\0"
DESCRIPTORS = descriptors_length(2, page_size=4096)
VERSIONS = pytest.mark.parametrize("version", [(6, 12), (7, 3)])


def info_of(control: RawControl) -> DevInfo:
    buffer = bytearray(64)
    assert control.command(ControlCommand.GET_DEV_INFO, buffer=buffer) == 0
    return DevInfo.unpack(buffer)


def next_server(kernel: SimKernel, old: RawServer) -> RawServer:
    """Another process opens the device and fetches its tags."""
    process = kernel.process()
    control = RawControl(process)
    char = process.open("/dev/ublkc0")
    assert isinstance(char, CharFile)
    task = process.task()
    buffers = [[process.memory.map(65536) for _ in range(old.info.queue_depth)]]
    server = RawServer(control, old.info, char, [task], [SimUring(task)], old.disk, buffers)
    server.fetch_all()
    return server


@VERSIONS
def test_another_process_takes_over(version: tuple[int, int]) -> None:
    """A process exits with a request; the next one gets it, with its own rings, mappings and pid."""
    kernel = raw_kernel(version)
    watcher = RawControl(kernel.process())
    first = raw_server(kernel, flags=R | REISSUE)
    mapping = first.char.mmap(0, DESCRIPTORS)
    bio = first.disk.submit(IoOp.WRITE, 512, b"a" * 512)
    tag = first.delivered().user_data
    old = kernel.process()
    with pytest.raises(KernelError) as caught:
        first.char.mmap(0, DESCRIPTORS, process=old)
    assert caught.value.errno == errno.EINVAL
    assert mapping.read(tag) != bytes(24)
    first.process.exit()
    info = info_of(watcher)
    assert info.state is DeviceState.QUIESCED
    assert info.ublksrv_pid == (-1 if version == (7, 3) else first.process.pid)
    assert watcher.command(ControlCommand.START_USER_RECOVERY) == 0
    second = next_server(kernel, first)
    assert second.control.command(ControlCommand.END_USER_RECOVERY, data=second.process.pid) == 0
    assert info_of(watcher).ublksrv_pid == second.process.pid
    cqe = second.delivered()
    assert second.descriptor(cqe.user_data).start_sector == 1
    assert bytes(second.buffer(cqe.user_data, 512)) == b"a" * 512
    second.commit(cqe.user_data, 512)
    assert bio.result == 512


def test_only_the_openers_pid_ends_recovery() -> None:
    """On 7.3 neither the first server's pid nor the control process' is the new opener's."""
    kernel = raw_kernel()
    watcher = RawControl(kernel.process())
    first = raw_server(kernel, flags=R)
    first.process.exit()
    second = next_server(kernel, first)
    for pid in (first.process.pid, watcher.process.pid, 0):
        assert watcher.command(ControlCommand.END_USER_RECOVERY, data=pid) == -errno.EINVAL
    assert watcher.command(ControlCommand.END_USER_RECOVERY, data=second.process.pid) == 0


def test_old_process_cannot_touch_the_new_incarnation() -> None:
    """A mapping holds the char device: until it is gone the device has its old server, and nobody else opens it."""
    kernel = raw_kernel()
    first = raw_server(kernel, flags=R)
    mapping = first.char.mmap(0, DESCRIPTORS)
    first.ring.close()
    first.char.close()
    other = kernel.process()
    with pytest.raises(KernelError) as caught:
        other.open("/dev/ublkc0")
    assert caught.value.errno == errno.EBUSY
    control = RawControl(other)
    assert info_of(control).state is DeviceState.LIVE
    assert control.command(ControlCommand.START_USER_RECOVERY) == -errno.EBUSY
    mapping.unmap()
    assert info_of(control).state is DeviceState.QUIESCED
    assert control.command(ControlCommand.START_USER_RECOVERY) == 0


def users_server(kernel: SimKernel, *, uid: int = 1000) -> tuple[RawControl, CharFile, SimUring]:
    """A live device of an ordinary user's process, depth 2."""
    process = kernel.process(privileged=False, uid=uid, gid=uid)
    control = RawControl(process)
    assert control.add(flags=U).owner_uid == uid

    def command(number: int, payload: bytes = b"", data: int = 0) -> int:
        result = _with_path(control, number, payload, data)
        assert result is not None
        return result

    assert command(ControlCommand.SET_PARAMS, basic_params().pack()) == 0
    char = process.open("/dev/ublkc0")
    assert isinstance(char, CharFile)
    ring = SimUring(process.main_task)
    server = RawServer(
        control,
        DevInfo(nr_hw_queues=1, queue_depth=2, max_io_buf_bytes=65536, dev_id=0),
        char,
        [process.main_task],
        [ring],
        kernel.block_device(0),
        [[process.memory.map(65536) for _ in range(2)]],
    )
    for tag in range(2):
        assert ring.submit([server.io_sqe(FETCH, tag)]) == 1
    assert command(ControlCommand.START_DEV, data=process.pid) == 0
    return control, char, ring


def _with_path(control: RawControl, number: int, payload: bytes = b"", data: int = 0) -> int | None:
    buffer = bytearray(PATH + payload)
    sqe = control_sqe(
        control.file,
        number,
        addr=control.memory.map(buffer),
        length=len(buffer),
        path_length=len(PATH),
        data=data,
        user_data=7777,
    )
    assert control.ring.submit([sqe]) == 1
    return next((cqe.result for cqe in control.ring.reap() if cqe.user_data == 7777), None)


@VERSIONS
def test_a_process_that_does_not_answer_is_killed(version: tuple[int, int]) -> None:
    """After 30 s the kernel kills the process that serves an ordinary user's disk, and nobody else."""
    kernel = SimKernel(version=version)
    bystander = kernel.process()
    control, _, ring = users_server(kernel)
    bio = kernel.block_device(0).submit(IoOp.READ, 0, 512)
    assert len(ring.reap()) == 1
    kernel.let_time_pass(29)
    exited = [control.process.exited]
    kernel.let_time_pass(1)
    exited += [control.process.exited, bystander.exited]
    assert exited == [False, True, False]
    assert bio.result == -errno.EIO
    root = RawControl(bystander)
    assert _with_path(root, ControlCommand.GET_DEV_INFO2, bytes(64)) == 0
    assert _with_path(root, ControlCommand.DEL_DEV) == 0
    assert kernel.device_ids() == []


def test_a_process_command_is_its_own() -> None:
    """The caller of a control command is the ring's process: another user's is EACCES, root's is welcome."""
    kernel = SimKernel()
    users_server(kernel)
    stranger = RawControl(kernel.process(privileged=False, uid=1001, gid=1001))
    assert _with_path(stranger, ControlCommand.STOP_DEV) == -errno.EACCES
    assert stranger.command(ControlCommand.STOP_DEV) == -errno.EINVAL
    with pytest.raises(KernelError) as caught:
        stranger.process.open("/dev/ublkc0")
    assert caught.value.errno == errno.EACCES
    assert stranger.process.open(CONTROL_PATH) is not None
    assert _with_path(RawControl(kernel.process()), ControlCommand.STOP_DEV) == 0


def test_a_strangers_fetch_keeps_the_disk_from_being_scanned() -> None:
    """Root's disk whose tags an ordinary user's process fetched is not scanned for partitions."""
    for privileged, scanned in ((True, 1), (False, 0)):
        kernel = SimKernel()
        root = RawControl(kernel.process())
        info = root.add()
        assert root.set_params(0, basic_params()) == 0
        kernel.devices[0].node.mode = 0o666
        process = kernel.process(privileged=privileged, uid=1000)
        char = process.open("/dev/ublkc0")
        assert isinstance(char, CharFile)
        ring = SimUring(process.main_task)
        buffers = [[process.memory.map(65536) for _ in range(2)]]
        server = RawServer(root, info, char, [process.main_task], [ring], kernel.block_device(0), buffers)
        server.fetch_all()
        assert root.command(ControlCommand.START_DEV, data=process.pid) == 0
        assert len(ring.reap()) == scanned
        process.exit()


def test_the_next_server_may_be_trusted() -> None:
    """What an ordinary user's process fetched is forgotten with the last close: root's fetches after it let the disk be scanned."""
    kernel = SimKernel()
    root = RawControl(kernel.process())
    info = root.add()
    assert root.set_params(0, basic_params()) == 0
    kernel.devices[0].node.mode = 0o666
    for privileged in (False, True):
        process = kernel.process(privileged=privileged, uid=1000)
        char = process.open("/dev/ublkc0")
        assert isinstance(char, CharFile)
        ring = SimUring(process.main_task)
        buffers = [[process.memory.map(65536) for _ in range(2)]]
        server = RawServer(root, info, char, [process.main_task], [ring], kernel.block_device(0), buffers)
        server.fetch_all()
        if not privileged:
            process.exit()
    assert root.command(ControlCommand.START_DEV, data=process.pid) == 0
    assert len(ring.reap()) == 1


def test_a_pid_is_reported_while_its_process_lives() -> None:
    """A server that closed its files is still somebody; one that exited is nobody, whenever it did."""
    kernel = raw_kernel()
    root = RawControl(kernel.process())
    first = raw_server(kernel, flags=R)
    first.ring.close()
    first.char.close()
    assert info_of(root).ublksrv_pid == first.process.pid
    first.process.exit()
    assert info_of(root).ublksrv_pid == -1


def test_a_process_ends_beside_a_device_without_a_server() -> None:
    """A device that nobody has opened yet is nobody's: whoever ends leaves it as it is."""
    kernel = raw_kernel()
    root = RawControl(kernel.process())
    root.add()
    kernel.process().exit()
    assert kernel.device_ids() == [0]


def test_addresses_of_a_process() -> None:
    """A control command's address is one of the process': what it has not mapped is EFAULT."""
    kernel = raw_kernel()
    root = RawControl(kernel.process())
    root.add()

    def ask(addr: int, length: int = 64) -> int:
        sqe = control_sqe(root.file, ControlCommand.GET_DEV_INFO, addr=addr, length=length, user_data=5)
        assert root.ring.submit([sqe]) == 1
        (cqe,) = root.ring.reap()
        return cqe.result

    good = root.memory.map(64)
    assert ask(good) == 0
    assert ask(0) == -errno.EINVAL
    assert ask(good + 1) == -errno.EFAULT
    assert ask(8) == -errno.EFAULT
