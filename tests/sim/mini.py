"""A server in a hundred lines, straight on the ring interface: the simulator is tested without the engine.

It answers from a bytearray, in the order of arrival. A test that wants control of the answers drives `RawQueue` itself.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import attrs
import trio

from ublk_trio.kernel_sim import SimBlockDevice, SimKernel
from ublk_trio.kernel_sim.ring import SimCharDevice, SimControlRing, SimQueueRing
from ublk_trio.ring import EVENT, pack_answer
from ublk_trio.uapi import (
    ANY_DEVICE_ID,
    SECTOR_SIZE,
    BasicAttr,
    ControlCommand,
    DevInfo,
    Feature,
    IoCommand,
    IoOp,
    Params,
    ParamsBasic,
    ParamsDiscard,
)

MIB = 1 << 20
FETCH, COMMIT, GET_DATA = IoCommand.FETCH_REQ, IoCommand.COMMIT_AND_FETCH_REQ, IoCommand.NEED_GET_DATA


@attrs.frozen
class Event:
    """A reaped completion, unpacked."""

    tag: int
    result: int
    op_flags: int
    nr_sectors: int
    start_sector: int

    @property
    def op(self) -> IoOp:
        return IoOp(self.op_flags & 0xFF)

    @property
    def length(self) -> int:
        return self.nr_sectors * SECTOR_SIZE


class RawQueue:
    """A queue ring with its calls in words."""

    def __init__(self, ring: SimQueueRing) -> None:
        self.ring = ring

    def fetch_all(self) -> None:
        self.ring.commit([pack_answer(FETCH, tag) for tag in range(self.ring.depth)])

    def events(self) -> list[Event]:
        """Everything that one reap finds."""
        return [Event(tag, *rest) for tag, _, *rest in EVENT.iter_unpack(self.ring.reap())]

    def event(self) -> Event:
        """The one completion that is ready."""
        events = self.events()
        assert len(events) == 1, f"one completion was expected: {events}"
        return events[0]

    def commit(self, tag: int, result: int) -> None:
        self.ring.commit([pack_answer(COMMIT, tag, result)])

    def get_data(self, tag: int) -> None:
        self.ring.commit([pack_answer(GET_DATA, tag)])

    def buffer(self, tag: int) -> memoryview:
        return self.ring.buffers[self.ring.slots[tag]]


class Machine:
    """A kernel with an open control ring, and the commands in words. A command's result is returned, not raised."""

    def __init__(self, kernel: SimKernel, control: SimControlRing) -> None:
        self.kernel = kernel
        self.control = control

    async def command(
        self, command: ControlCommand, dev_id: int = 0, *, data: int = 0, buffer: bytearray | None = None
    ) -> int:
        return await self.control.submit(command, dev_id=dev_id, data=data, buffer=buffer)

    async def add(
        self,
        dev_id: int = ANY_DEVICE_ID,
        *,
        queues: int = 1,
        depth: int = 4,
        max_io_bytes: int = 64 << 10,
        flags: Feature = Feature(0),  # noqa: B008 - an enum member is immutable
    ) -> DevInfo:
        """ADD_DEV, which must succeed."""
        asked = DevInfo(
            dev_id=dev_id, nr_hw_queues=queues, queue_depth=depth, max_io_buf_bytes=max_io_bytes, flags=flags
        )
        buffer = bytearray(asked.pack())
        assert await self.command(ControlCommand.ADD_DEV, dev_id, buffer=buffer) == 0
        return DevInfo.unpack(buffer)

    async def set_params(self, dev_id: int, params: Params) -> int:
        return await self.command(ControlCommand.SET_PARAMS, dev_id, buffer=bytearray(params.pack()))

    async def start(self, dev_id: int = 0) -> int:
        return await self.command(ControlCommand.START_DEV, dev_id, data=os.getpid())

    async def stop(self, dev_id: int = 0) -> int:
        return await self.command(ControlCommand.STOP_DEV, dev_id)

    async def delete(self, dev_id: int = 0) -> int:
        return await self.command(ControlCommand.DEL_DEV, dev_id)

    async def info(self, dev_id: int = 0) -> DevInfo:
        buffer = bytearray(64)
        assert await self.command(ControlCommand.GET_DEV_INFO, dev_id, buffer=buffer) == 0
        return DevInfo.unpack(buffer)


@asynccontextmanager
async def machine(kernel: SimKernel) -> AsyncIterator[Machine]:
    async with kernel.open_control() as control:
        yield Machine(kernel, control)


def basic_params(
    *,
    size: int = MIB,
    max_sectors: int = 128,
    attrs: BasicAttr = BasicAttr(0),  # noqa: B008
    discard: ParamsDiscard | None = None,
    logical_bs_shift: int = 9,
    chunk_sectors: int = 0,
) -> Params:
    basic = ParamsBasic(
        dev_sectors=size // SECTOR_SIZE,
        max_sectors=max_sectors,
        attrs=attrs,
        logical_bs_shift=logical_bs_shift,
        chunk_sectors=chunk_sectors,
    )
    return Params(basic=basic, discard=discard)


@attrs.define
class Started:
    """A live device without a server loop: the test reaps and commits."""

    machine: Machine
    info: DevInfo
    char: SimCharDevice
    queues: list[RawQueue]
    disk: SimBlockDevice

    @property
    def queue(self) -> RawQueue:
        return self.queues[0]

    def close(self) -> None:
        for queue in self.queues:
            queue.ring.close()
        self.char.close()


@asynccontextmanager
async def opened(
    machine: Machine,
    *,
    params: Params | None = None,
    queues: int = 1,
    depth: int = 4,
    max_io_bytes: int = 64 << 10,
    flags: Feature = Feature(0),  # noqa: B008
    buffers: int | None = None,
    dev_id: int = ANY_DEVICE_ID,
) -> AsyncIterator[Started]:
    """A device that is added, has its parameters and open rings; its tags are not fetched. Taken down at the end."""
    info = await machine.add(dev_id, queues=queues, depth=depth, max_io_bytes=max_io_bytes, flags=flags)
    assert await machine.set_params(info.dev_id, params if params is not None else basic_params()) == 0
    kernel = machine.kernel
    char = await kernel.open_char_device(info, ioctl_encoded=True)
    rings = [
        char.open_queue(queue_id, buffers=depth if buffers is None else buffers)
        for queue_id in range(info.nr_hw_queues)
    ]
    started = Started(machine, info, char, [RawQueue(ring) for ring in rings], kernel.block_device(info.dev_id))
    try:
        yield started
    finally:
        with trio.CancelScope(shield=True):
            started.close()
            if info.dev_id in kernel.device_ids():
                await machine.delete(info.dev_id)


@asynccontextmanager
async def live(
    machine: Machine,
    *,
    params: Params | None = None,
    queues: int = 1,
    depth: int = 4,
    max_io_bytes: int = 64 << 10,
    flags: Feature = Feature(0),  # noqa: B008
    buffers: int | None = None,
    dev_id: int = ANY_DEVICE_ID,
) -> AsyncIterator[Started]:
    """As `opened`, and started. The kernel must have been made with ``partition_scan=False``: nobody would answer it."""
    assert not machine.kernel.partition_scan
    async with opened(
        machine,
        params=params,
        queues=queues,
        depth=depth,
        max_io_bytes=max_io_bytes,
        flags=flags,
        buffers=buffers,
        dev_id=dev_id,
    ) as device:
        for queue in device.queues:
            queue.fetch_all()
        assert await machine.start(device.info.dev_id) == 0
        yield device


class MemoryServer:
    """Answers one queue's requests from ``data`` until every tag was aborted or the ring closes."""

    def __init__(self, ring: SimQueueRing, data: bytearray) -> None:
        self.queue = RawQueue(ring)
        self.data = data
        self.seen: list[tuple[IoOp, int, int]] = []
        #: Called with each event before it is answered.
        self.on_event: Callable[[Event], None] = lambda event: None

    async def run(self) -> None:
        ring = self.queue.ring
        self.queue.fetch_all()
        alive = ring.depth
        while alive:
            events = self.queue.events()
            answers = []
            for event in events:
                if event.result < 0:
                    alive -= 1
                else:
                    self.on_event(event)
                    answers.append(self.answer(event))
            if answers:
                ring.commit(answers)
            elif not events:
                try:
                    await ring.wait()
                except trio.ClosedResourceError:
                    return

    def answer(self, event: Event) -> int:
        offset, length, tag = event.start_sector * SECTOR_SIZE, event.length, event.tag
        if event.result == 1:
            return pack_answer(GET_DATA, tag)
        self.seen.append((event.op, event.start_sector, event.nr_sectors))
        if event.op is IoOp.READ:
            self.queue.buffer(tag)[:length] = self.data[offset : offset + length]
            return pack_answer(COMMIT, tag, length)
        if event.op is IoOp.WRITE:
            self.data[offset : offset + length] = self.queue.buffer(tag)[:length]
            return pack_answer(COMMIT, tag, length)
        if event.op is IoOp.WRITE_ZEROES:
            self.data[offset : offset + length] = bytes(length)
        return pack_answer(COMMIT, tag, 0)


@attrs.define
class Served:
    """A live device with a `MemoryServer` on every queue."""

    machine: Machine
    info: DevInfo
    disk: SimBlockDevice
    data: bytearray
    servers: list[MemoryServer]

    @property
    def seen(self) -> list[tuple[IoOp, int, int]]:
        return [seen for server in self.servers for seen in server.seen]


@asynccontextmanager
async def served(
    machine: Machine,
    *,
    params: Params | None = None,
    queues: int = 1,
    depth: int = 4,
    flags: Feature = Feature(0),  # noqa: B008
    buffers: int | None = None,
    dev_id: int = ANY_DEVICE_ID,
) -> AsyncIterator[Served]:
    """A device that answers, live inside the block, stopped and deleted after it."""
    params = params if params is not None else basic_params()
    assert params.basic is not None
    data = bytearray(params.basic.dev_sectors * SECTOR_SIZE)
    async with opened(
        machine, params=params, queues=queues, depth=depth, flags=flags, buffers=buffers, dev_id=dev_id
    ) as device:
        servers = [MemoryServer(queue.ring, data) for queue in device.queues]
        async with trio.open_nursery() as nursery:
            for server in servers:
                nursery.start_soon(server.run)
            assert await machine.start(device.info.dev_id) == 0
            yield Served(machine, device.info, device.disk, data, servers)
            await machine.stop(device.info.dev_id)
