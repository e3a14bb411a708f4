"""A server on the raw interface: a process with its tasks, rings, memory and files, and the commands in words."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from tests.sim.mini import basic_params
from ublk_trio.kernel_sim import SimBlockDevice, SimKernel
from ublk_trio.kernel_sim.process import CharFile, ControlFile, SimProcess, SimTask
from ublk_trio.kernel_sim.uring import Cqe, SimUring, Sqe, UringOp
from ublk_trio.uapi import (
    ANY_DEVICE_ID,
    CONTROL_PATH,
    NO_QUEUE,
    ControlCmd,
    ControlCommand,
    DevInfo,
    Feature,
    IoCmd,
    IoCommand,
    IoDesc,
    Params,
    control_opcode,
    descriptors_length,
    descriptors_offset,
    io_opcode,
)

FETCH, COMMIT, GET_DATA = IoCommand.FETCH_REQ, IoCommand.COMMIT_AND_FETCH_REQ, IoCommand.NEED_GET_DATA


def control_sqe(
    file: ControlFile,
    command: int,
    *,
    dev_id: int = 0,
    queue_id: int = NO_QUEUE,
    length: int = 0,
    addr: int = 0,
    data: int = 0,
    path_length: int = 0,
    user_data: int = 0,
    cmd_op: int | None = None,
) -> Sqe:
    """A control command's entry."""
    header = ControlCmd(dev_id=dev_id, queue_id=queue_id, len=length, addr=addr, data=data, dev_path_len=path_length)
    return Sqe(
        opcode=UringOp.URING_CMD,
        file=file,
        cmd_op=control_opcode(command, ioctl_encoded=True) if cmd_op is None else cmd_op,
        payload=header.pack(),
        user_data=user_data,
    )


class RawControl:
    """A control ring of a process', with the commands in words. A result is returned, not raised; None: still held."""

    def __init__(self, process: SimProcess) -> None:
        self.process = process
        self.memory = process.memory
        self.ring = SimUring(process.main_task)
        file = process.open(CONTROL_PATH)
        assert isinstance(file, ControlFile)
        self.file = file
        self._sent = 0

    def send(self, command: int, dev_id: int = 0, *, buffer: bytearray | None = None, data: int = 0) -> int:
        """Send it, and return its user data."""
        addr = 0 if buffer is None else self.memory.map(buffer)
        self._sent += 1
        sqe = control_sqe(
            self.file,
            command,
            dev_id=dev_id,
            addr=addr,
            length=0 if buffer is None else len(buffer),
            data=data,
            user_data=self._sent,
        )
        assert self.ring.submit([sqe]) == 1
        return self._sent

    def command(self, command: int, dev_id: int = 0, *, buffer: bytearray | None = None, data: int = 0) -> int | None:
        user_data = self.send(command, dev_id, buffer=buffer, data=data)
        return next((cqe.result for cqe in self.ring.reap() if cqe.user_data == user_data), None)

    def add(
        self,
        *,
        queues: int = 1,
        depth: int = 2,
        max_io_bytes: int = 64 << 10,
        flags: Feature = Feature(0),  # noqa: B008
    ) -> DevInfo:
        asked = DevInfo(
            dev_id=ANY_DEVICE_ID,
            nr_hw_queues=queues,
            queue_depth=depth,
            max_io_buf_bytes=max_io_bytes,
            flags=flags,
        )
        buffer = bytearray(asked.pack())
        assert self.command(ControlCommand.ADD_DEV, ANY_DEVICE_ID, buffer=buffer) == 0
        return DevInfo.unpack(buffer)

    def set_params(self, dev_id: int, params: Params) -> int | None:
        return self.command(ControlCommand.SET_PARAMS, dev_id, buffer=bytearray(params.pack()))

    def start(self, dev_id: int = 0) -> int | None:
        return self.command(ControlCommand.START_DEV, dev_id, data=self.process.pid)

    def stop(self, dev_id: int = 0) -> int | None:
        return self.command(ControlCommand.STOP_DEV, dev_id)

    def delete(self, dev_id: int = 0) -> int | None:
        return self.command(ControlCommand.DEL_DEV, dev_id)


@attrs.define
class RawServer:
    """A device with one open char device and one ring per queue, each of a task of its own."""

    control: RawControl
    info: DevInfo
    char: CharFile
    tasks: list[SimTask]
    rings: list[SimUring]
    disk: SimBlockDevice
    #: Where the buffer of each tag is, in copy mode.
    buffers: list[list[int]]

    @property
    def process(self) -> SimProcess:
        return self.control.process

    @property
    def ring(self) -> SimUring:
        return self.rings[0]

    def io_sqe(
        self,
        command: int,
        tag: int,
        *,
        queue: int = 0,
        result: int = 0,
        addr: int | None = None,
        sqe_addr: int = 0,
        user_data: int | None = None,
        cmd_op: int | None = None,
    ) -> Sqe:
        """A per-tag command's entry. By default the address is the tag's buffer, and the user data the tag."""
        if addr is None:
            known = queue < len(self.buffers) and tag < self.info.queue_depth
            addr = self.buffers[queue][tag] if known else 0
        return Sqe(
            opcode=UringOp.URING_CMD,
            file=self.char,
            cmd_op=io_opcode(command, ioctl_encoded=True) if cmd_op is None else cmd_op,
            payload=IoCmd(q_id=queue, tag=tag, result=result, addr=addr).pack(),
            addr=sqe_addr,
            user_data=tag if user_data is None else user_data,
        )

    def io(self, command: int, tag: int, *, queue: int = 0, ring: SimUring | None = None, **more: int) -> int | None:
        """Send one per-tag command: its result if it ends at once, or None when it is pending."""
        ring = ring if ring is not None else self.rings[min(queue, len(self.rings) - 1)]
        assert ring.reap() == []
        assert ring.submit([self.io_sqe(command, tag, queue=queue, user_data=999, **more)]) == 1
        found = [cqe.result for cqe in ring.reap() if cqe.user_data == 999]
        return found[0] if found else None

    def fetch_all(self, addr: Callable[[int], int] | None = None) -> None:
        for queue, ring in enumerate(self.rings):
            for tag in range(self.info.queue_depth):
                assert ring.submit([self.io_sqe(FETCH, tag, queue=queue)]) == 1

    def delivered(self, ring: SimUring | None = None) -> Cqe:
        """The one completion that is there."""
        (cqe,) = (ring if ring is not None else self.ring).reap()
        return cqe

    def commit(self, tag: int, result: int, **more: int) -> None:
        """Commit a tag of queue 0, which must become pending."""
        assert self.ring.submit([self.io_sqe(COMMIT, tag, result=result, **more)]) == 1

    def descriptor(self, tag: int, queue: int = 0) -> IoDesc:
        mapping = self.char.mmap(
            descriptors_offset(queue, page_size=4096), descriptors_length(self.info.queue_depth, page_size=4096)
        )
        data = mapping.read(tag)
        mapping.unmap()
        return IoDesc.unpack(data)

    def buffer(self, tag: int, length: int, queue: int = 0) -> memoryview:
        view = self.process.memory.view(self.buffers[queue][tag], length)
        assert view is not None
        return view


def raw_kernel(version: tuple[int, int] = (7, 3)) -> SimKernel:
    return SimKernel(version=version, partition_scan=False)


def raw_server(
    kernel: SimKernel,
    *,
    queues: int = 1,
    depth: int = 2,
    flags: Feature = Feature(0),  # noqa: B008
    params: Params | None = None,
    copies: bool = True,
    live: bool = True,
) -> RawServer:
    """A device of a new process', with its parameters and its rings; ``live``: fetched and started, too."""
    process = kernel.process()
    control = RawControl(process)
    info = control.add(queues=queues, depth=depth, flags=flags)
    assert control.set_params(info.dev_id, params if params is not None else basic_params()) == 0
    char = process.open(kernel.char_path(info.dev_id))
    assert isinstance(char, CharFile)
    tasks = [process.task() for _ in range(queues)]
    server = RawServer(
        control=control,
        info=info,
        char=char,
        tasks=tasks,
        rings=[SimUring(task) for task in tasks],
        disk=kernel.block_device(info.dev_id),
        buffers=[[process.memory.map(info.max_io_buf_bytes) for _ in range(depth)] for _ in range(queues)]
        if copies
        else [],
    )
    if live:
        server.fetch_all()
        assert control.start(info.dev_id) == 0
    return server
