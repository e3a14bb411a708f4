"""Batch commands: prepare, commit, multishot fetch, and their rules."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

import attrs
import pytest

from tests.sim.mini import basic_params
from tests.sim.raw import FETCH, RawServer, raw_kernel, raw_server
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import Bio, SeededChoices, SimKernel
from ublk_trio.kernel_sim.process import ByteFile, CharFile
from ublk_trio.kernel_sim.uring import (
    CQE_BUFFER,
    CQE_BUFFER_SHIFT,
    CQE_MORE,
    Cqe,
    SimUring,
    Sqe,
    UringOp,
)
from ublk_trio.uapi import (
    BasicAttr,
    BatchFlag,
    BatchIo,
    BlkZone,
    ControlCommand,
    Feature,
    IoCommand,
    IoFlag,
    IoOp,
    Params,
    ParamsZoned,
    ZoneCondition,
    ZoneType,
    batch_elem_layout,
    io_opcode,
    user_copy_offset,
)

PREP, COMMIT, FETCH_BATCH = IoCommand.PREP_IO_CMDS, IoCommand.COMMIT_IO_CMDS, IoCommand.FETCH_IO_CMDS
REGISTER, UNREGISTER = IoCommand.REGISTER_IO_BUF, IoCommand.UNREGISTER_IO_BUF
GROUP = 5


@attrs.frozen
class Batch:
    """A batch server on one queue: elements are (tag, buffer index, result, zone LBA), and the address of its tag in copy mode."""

    server: RawServer
    flags: BatchFlag

    @property
    def ring(self) -> SimUring:
        return self.server.ring

    def sqe(
        self,
        command: int,
        elements: Sequence[tuple[int, ...]] = (),
        *,
        user_data: int = 1,
        count: int | None = None,
        elem_bytes: int | None = None,
        flags: int | None = None,
        queue: int = 0,
        addr: int | None = None,
        more: bool = True,
    ) -> Sqe:
        layout = batch_elem_layout(self.flags)
        data = bytearray()
        for tag, *rest in elements:
            index, result, lba = (*rest, 0, 0, 0)[:3]
            words = [tag, index, result]
            if self.flags & BatchFlag.HAS_BUF_ADDR:
                words.append(self.server.buffers[0][tag] if tag < len(self.server.buffers[0]) else 4096)
            if self.flags & BatchFlag.HAS_ZONE_LBA:
                words.append(lba)
            data += layout.pack(*words)
        io = BatchIo(
            q_id=queue,
            flags=BatchFlag(self.flags if flags is None else flags),
            nr_elem=len(elements) if count is None else count,
            elem_bytes=layout.size if elem_bytes is None else elem_bytes,
        )
        is_fetch = command == FETCH_BATCH and more
        return Sqe(
            opcode=UringOp.URING_CMD,
            file=self.server.char,
            cmd_op=io_opcode(command, ioctl_encoded=True),
            payload=io.pack(),
            addr=addr if addr is not None else self.server.process.memory.map(data) if data else 0,
            buf_index=GROUP if is_fetch else 0,
            buffer_select=is_fetch,
            multishot=is_fetch,
            user_data=user_data,
        )

    def send(
        self, command: int, elements: Sequence[tuple[int, ...]] = (), *, ring: SimUring | None = None, **more: int
    ) -> int:
        ring = ring if ring is not None else self.ring
        ring.submit([self.sqe(command, elements, user_data=77, **more)])  # type: ignore[arg-type]
        (cqe,) = [cqe for cqe in ring.reap() if cqe.user_data == 77]
        return cqe.result

    def fetch(self, ring: SimUring | None = None, user_data: int = 1) -> None:
        (ring if ring is not None else self.ring).submit(
            [self.sqe(FETCH_BATCH, elem_bytes=2, flags=0, user_data=user_data)]
        )

    def provide(self, ring: SimUring, sizes: Sequence[int]) -> list[int]:
        addresses = [self.server.process.memory.map(max(size, 1)) for size in sizes]
        ring.register_buffer_ring(GROUP, list(zip(addresses, sizes, strict=True)))
        return addresses

    def tags(self, address: int, length: int) -> list[int]:
        view = self.server.process.memory.view(address, length)
        assert view is not None
        return list(view.cast("H"))


def batch_server(
    kernel: SimKernel | None = None,
    *,
    depth: int = 4,
    flags: Feature = Feature(0),  # noqa: B008
    live: bool = True,
    batch_flags: BatchFlag | None = None,
) -> Batch:
    server = raw_server(
        kernel if kernel is not None else raw_kernel(),
        depth=depth,
        flags=Feature.BATCH_IO | flags,
        copies=not flags,
        live=False,
        params=basic_params(attrs=BasicAttr.VOLATILE_CACHE),
    )
    if batch_flags is None:
        batch_flags = BatchFlag(0) if flags else BatchFlag.HAS_BUF_ADDR
    batch = Batch(server, batch_flags)
    if live:
        server.ring.submit([batch.sqe(PREP, [(tag, tag) for tag in range(depth)])])
        assert server.control.start(server.info.dev_id) == 0
        server.ring.reap()
    return batch


def reads(batch: Batch, count: int) -> list[Bio]:
    return [batch.server.disk.submit(IoOp.READ, 512 * i, 512) for i in range(count)]


def test_many_tags_by_one_command() -> None:
    """One completion delivers what came, one command commits it; data moves by the addresses in the elements."""
    batch = batch_server()
    addresses = batch.provide(batch.ring, [64, 64])
    bios = reads(batch, 2)
    written = batch.server.disk.submit(IoOp.WRITE, 8192, b"w" * 512)
    batch.fetch()
    assert batch.ring.reap() == [Cqe(1, 6, CQE_MORE | CQE_BUFFER)]
    assert batch.tags(addresses[0], 6) == [0, 1, 2]
    assert [batch.server.descriptor(tag).start_sector for tag in range(3)] == [0, 1, 16]
    assert batch.server.buffer(2, 512) == b"w" * 512
    batch.server.buffer(0, 512)[:] = b"0" * 512
    batch.server.buffer(1, 512)[:] = b"1" * 512
    assert batch.send(COMMIT, [(1, 0, 512), (0, 0, 512), (2, 0, 512)]) == 3 * 16
    assert [bytes(bio.data) for bio in bios] == [b"0" * 512, b"1" * 512]
    assert written.result == 512
    # It goes on, with the next buffer.
    reads(batch, 1)
    (cqe,) = batch.ring.reap()
    assert (cqe.result, cqe.flags >> CQE_BUFFER_SHIFT) == (2, 1)


def test_a_write_that_does_not_fit() -> None:
    """One that fits in part says how much, and the next request on the tag its own length; one that fits nowhere is not delivered."""
    batch = batch_server(depth=1)
    memory = batch.server.process.memory
    batch.provide(batch.ring, [64] * 4)
    batch.fetch()

    def next_from(address: int, result: int) -> None:
        batch.server.buffers[0][0] = address
        assert batch.send(COMMIT, [(0, 0, result)]) == 16

    reads(batch, 1)
    assert len(batch.ring.reap()) == 1
    assert batch.server.descriptor(0).op == IoOp.READ
    next_from(memory.map(512), 512)
    batch.server.disk.submit(IoOp.WRITE, 0, bytes(1024))
    assert len(batch.ring.reap()) == 1
    assert batch.server.descriptor(0).nr_sectors == 1
    next_from(memory.map(1024), 1024)
    batch.server.disk.submit(IoOp.READ, 0, 1024)
    assert len(batch.ring.reap()) == 1
    assert batch.server.descriptor(0).nr_sectors == 2
    gone = memory.map(1024)
    next_from(gone, 1024)
    memory.unmap(gone)
    lost = batch.server.disk.submit(IoOp.WRITE, 0, b"w" * 512)
    for _ in range(3):
        assert batch.ring.reap() == []
    assert not lost.done


def test_a_write_that_fits_nowhere_comes_again() -> None:
    """It is tried anew behind what comes meanwhile, and for that needs a provided buffer, like any other."""
    batch = batch_server(depth=2)
    memory = batch.server.process.memory
    batch.provide(batch.ring, [64, 64])
    batch.fetch()
    reads(batch, 1)
    batch.ring.reap()
    gone = memory.map(512)
    batch.server.buffers[0][0] = gone
    assert batch.send(COMMIT, [(0, 0, 512)]) == 16
    memory.unmap(gone)
    # Both tags, so that the first one's turn comes: the READ goes through with the last of the buffers.
    lost = batch.server.disk.submit(IoOp.WRITE, 0, b"w" * 512)
    bios = reads(batch, 1)
    found = [cqe.result for _ in range(3) for cqe in batch.ring.reap()]
    assert found == [2, -errno.ENOBUFS]
    assert not lost.done
    assert not bios[0].done


def test_a_tag_belongs_to_no_task() -> None:
    """A copy by the task that prepared the tag keeps the request like anybody else's: a commit does not end it."""
    batch = batch_server(flags=Feature.USER_COPY)
    batch.provide(batch.ring, [64])
    batch.fetch()
    (bio,) = reads(batch, 1)
    batch.ring.reap()
    place = user_copy_offset(queue_id=0, tag=0, offset=0)
    copy = batch.server.char.start_pwrite(place, task=batch.server.tasks[0])
    assert batch.send(COMMIT, [(0, 0, 512)]) == 8
    assert not bio.done
    assert copy.write(b"c" * 512) == 512
    assert bytes(bio.data) == b"c" * 512


def test_prepare_is_all_or_nothing() -> None:
    """A wrong element undoes those before it; the checks come in the driver's order."""
    batch = batch_server(live=False)
    for elements, number in [
        ([(0,), (4,)], errno.EINVAL),
        ([(0,), (0,)], errno.EINVAL),
        ([(0,), (1,), (2,), (3,), (0,)], errno.E2BIG),
    ]:
        assert batch.send(PREP, elements) == -number
    assert batch.send(PREP, [(0,), (1,)], addr=8) == -errno.EFAULT
    assert batch.send(PREP, []) == 0
    assert batch.send(PREP, [(0,), (1,), (2,)]) == 0
    assert batch.send(PREP, [(2,)]) == -errno.EINVAL
    # The last tag makes the device ready for a moment, but the element after it spoils that.
    assert batch.send(PREP, [(3,), (3,)]) == -errno.EBUSY
    batch.fetch()
    assert batch.ring.reap() == [Cqe(1, -errno.ENODEV)]
    assert batch.server.control.start() is None
    assert batch.send(PREP, [(3,)]) == 0
    assert [cqe.result for cqe in batch.server.control.ring.reap()] == [0]
    assert batch.send(PREP, [(3,)]) == -errno.EBUSY
    # Ready for good, it takes FETCH_IO_CMDS again, and delivers: a refusal of the first element has undone nothing.
    batch.provide(batch.ring, [64])
    (bio,) = reads(batch, 1)
    batch.fetch()
    assert batch.ring.reap()[0].result > 0
    assert bio.result is None
    zero = Batch(batch_server(live=False).server, BatchFlag(0))
    assert zero.send(PREP, [(0,)]) == -errno.EINVAL


def test_a_commit_may_be_partial() -> None:
    """What precedes a wrong element counts; the error is told only when nothing does."""
    batch = batch_server()
    batch.provide(batch.ring, [64])
    bios = reads(batch, 3)
    batch.fetch()
    batch.ring.reap()
    assert batch.send(COMMIT, [(3, 0, 512)]) == -errno.EBUSY
    for tag in (4, 9):
        assert batch.send(COMMIT, [(tag, 0, 512)]) == -errno.EINVAL
    assert batch.send(COMMIT, [(0, 0, 512), (3, 0, 512), (1, 0, 512)]) == 16
    assert [bio.done for bio in bios] == [True, False, False]
    assert batch.send(COMMIT, [(1, 0, 512)], addr=8) == -errno.EFAULT
    zero = attrs.evolve(batch, flags=BatchFlag(0))
    assert zero.send(COMMIT, [(1, 0, 512)]) == -errno.EINVAL
    # 480 bytes are read at a time: a fault behind them leaves them done.
    big = batch_server(depth=40)
    big.provide(big.ring, [80])
    reads(big, 31)
    big.fetch()
    big.ring.reap()
    layout = batch_elem_layout(BatchFlag.HAS_BUF_ADDR)
    data = bytearray(b"".join(layout.pack(tag, 0, 512, big.server.buffers[0][tag]) for tag in range(30)))
    address = big.server.process.memory.map(data)
    assert big.send(COMMIT, [(tag,) for tag in range(31)], addr=address) == 480


def test_a_commit_longer_than_is_read_at_a_time() -> None:
    """Elements beyond the first 480 bytes are read from where they stand, and no byte behind the last one."""
    batch = batch_server(depth=40)
    batch.provide(batch.ring, [80])
    bios = reads(batch, 40)
    batch.fetch()
    batch.ring.reap()
    assert batch.send(COMMIT, [(tag, 0, 512) for tag in range(31)]) == 31 * 16
    assert [bio.done for bio in bios] == [True] * 31 + [False] * 9


def test_a_refused_prepare_is_no_end_of_the_server() -> None:
    """Only one that made the queue ready for a moment keeps FETCH_IO_CMDS out; any other leaves the queue as it was."""
    batch = batch_server(live=False)
    assert batch.send(PREP, [(0,), (9,)]) == -errno.EINVAL
    batch.fetch()
    assert batch.ring.reap() == []


def test_prepare_with_two_queues() -> None:
    """EBUSY once all queues of the device are ready; until then a tag is refused for being prepared already."""
    server = raw_server(raw_kernel(), queues=2, depth=2, flags=Feature.BATCH_IO, live=False)
    batch = Batch(server, BatchFlag.HAS_BUF_ADDR)
    assert batch.send(PREP, [(0,), (1,)]) == 0
    assert batch.send(PREP, [(1,)]) == -errno.EINVAL
    assert batch.send(PREP, [(0,)], queue=1) == 0
    assert batch.send(PREP, [(1,), (1,)], queue=1) == -errno.EBUSY
    assert batch.send(PREP, [(1,)], queue=1) == 0
    for queue in range(2):
        assert batch.send(PREP, [(1,)], queue=queue) == -errno.EBUSY


def test_a_prepare_during_a_stop_is_noted() -> None:
    """PREP_IO_CMDS while STOP_DEV holds the device: on Linux both may sleep for ever, and `notes` says so."""
    batch = batch_server()
    reads(batch, 1)
    assert batch.send(PREP, [(0,)]) == -errno.EBUSY
    assert batch.server.process.kernel.notes == []
    assert batch.server.control.stop() is None
    batch.send(PREP, [(0,)])
    (note,) = batch.server.process.kernel.notes
    assert "PREP_IO_CMDS waits for the control command" in note


@pytest.mark.parametrize("has_lba", [True, False])
def test_where_an_append_went(has_lba: bool) -> None:
    """HAS_ZONE_LBA: the element says where a ZONE_APPEND went. Without it the driver takes the largest number there is."""
    kernel = raw_kernel()
    params = Params(
        basic=basic_params(chunk_sectors=64).basic,
        zoned=ParamsZoned(max_open_zones=2, max_active_zones=2, max_zone_append_sectors=16),
    )
    flags = Feature.BATCH_IO | Feature.ZONED | Feature.USER_COPY
    server = raw_server(kernel, depth=2, flags=flags, params=params, copies=False, live=False)
    batch = Batch(server, BatchFlag.HAS_ZONE_LBA if has_lba else BatchFlag(0))
    addresses = batch.provide(batch.ring, [2] * 80)
    assert batch.send(PREP, [(0,), (1,)]) == 0
    batch.fetch()
    assert server.control.start() is None

    def commit(tag: int, result: int, lba: int = 0) -> None:
        batch.ring.submit([batch.sqe(COMMIT, [(tag, 0, result, lba)], user_data=77)])

    while server.control.ring.reap() == []:
        for cqe in batch.ring.reap():
            if cqe.user_data == 77:
                assert cqe.result == batch_elem_layout(batch.flags).size
                continue
            (tag,) = batch.tags(addresses[cqe.flags >> CQE_BUFFER_SHIFT], cqe.result)
            descriptor = server.descriptor(tag)
            assert descriptor.op == IoOp.REPORT_ZONES
            zones = [
                BlkZone(
                    start=start, len=64, wp=start, type=ZoneType.SEQWRITE_REQ, cond=ZoneCondition.EMPTY, capacity=64
                ).pack()
                for start in range(descriptor.start_sector, 2048, 64)
            ][: descriptor.nr_sectors]
            server.char.pwrite(b"".join(zones), user_copy_offset(queue_id=0, tag=tag, offset=0))
            commit(tag, 64 * len(zones))
    batch.ring.reap()
    bio = server.disk.submit(IoOp.ZONE_APPEND, 64 * 512, b"a" * 512)
    (cqe,) = batch.ring.reap()
    (tag,) = batch.tags(addresses[cqe.flags >> CQE_BUFFER_SHIFT], cqe.result)
    assert server.char.pread(512, user_copy_offset(queue_id=0, tag=tag, offset=0)) == b"a" * 512
    commit(tag, 512, 72)
    assert bio.done
    assert bio.offset == (72 if has_lba else (1 << 64) - 1) * 512


@pytest.mark.parametrize(
    ("more", "number"),
    [
        ({"queue": 1}, errno.EINVAL),
        ({"flags": 8 | 2}, errno.EINVAL),
        ({"flags": 0}, errno.EINVAL),
        ({"elem_bytes": 8}, errno.EINVAL),
        ({"elem_bytes": 24, "flags": 3}, errno.EINVAL),
        ({"elem_bytes": 16, "flags": 6}, errno.EINVAL),
        ({"count": 5, "flags": 8}, errno.E2BIG),
    ],
)
def test_the_command_itself_is_checked(more: dict[str, Any], number: int) -> None:
    """PREP and COMMIT: queue, number of elements, flags that the device has no use for, an element's size."""
    batch = batch_server(live=False)
    for command in (PREP, COMMIT):
        assert batch.send(command, [(0,)], **more) == -number


def test_flags_of_elements_that_fit_another_device() -> None:
    """EINVAL: buffers' addresses where nothing is copied; FALLBACK where nothing is registered."""
    batch = batch_server(flags=Feature.USER_COPY, live=False)
    for flags, elem_bytes in ((BatchFlag.HAS_BUF_ADDR, 16), (BatchFlag.AUTO_BUF_REG_FALLBACK, 8)):
        for command in (PREP, COMMIT):
            assert batch.send(command, [], count=1, flags=int(flags), elem_bytes=elem_bytes) == -errno.EINVAL
    assert batch.send(PREP, [(0,)]) == 0


@pytest.mark.parametrize("more", [{"queue": 1}, {"elem_bytes": 4}, {"flags": 2}, {"flags": 8}])
def test_fetches_are_checked(more: dict[str, Any]) -> None:
    """FETCH_IO_CMDS: queue, two bytes a tag, no flags, multishot."""
    batch = batch_server()
    arguments: dict[str, Any] = {"elem_bytes": 2, "flags": 0} | more
    assert batch.send(FETCH_BATCH, **arguments) == -errno.EINVAL
    assert batch.send(FETCH_BATCH, elem_bytes=2, flags=0, more=False) == -errno.EINVAL


def test_other_commands() -> None:
    """Per-tag commands EOPNOTSUPP behind a check of the tag; opcodes must be right in every bit."""
    batch = batch_server()
    server = batch.server
    assert server.io(FETCH, 0) == -errno.EOPNOTSUPP
    assert server.io(FETCH, 4) == -errno.EINVAL
    assert server.io(FETCH, 0, queue=1) == -errno.EINVAL
    assert server.io(0x21, 0, cmd_op=0x21) == -errno.EOPNOTSUPP
    assert server.io(PREP, 0, cmd_op=0x25) == -errno.EOPNOTSUPP
    assert server.io(UNREGISTER, 9, addr=0) == -errno.EINVAL


def test_no_buffer_ends_a_fetch() -> None:
    """ENOBUFS, and what came waits for the next fetch; buffers too small for a tag are none."""
    batch = batch_server()
    addresses = batch.provide(batch.ring, [2])
    batch.fetch()
    reads(batch, 2)
    assert batch.ring.reap() == [Cqe(1, 2, CQE_MORE | CQE_BUFFER), Cqe(1, -errno.ENOBUFS)]
    batch.ring.provide_buffer(GROUP, 7, addresses[0], 1)
    batch.fetch()
    assert batch.ring.reap() == [Cqe(1, -errno.ENOBUFS)]
    other = SimUring(batch.server.process.task())
    batch.fetch(other)
    assert other.reap() == [Cqe(1, -errno.ENOBUFS)]
    addresses = batch.provide(other, [64])
    batch.fetch(other)
    assert other.reap() == [Cqe(1, 2, CQE_MORE | CQE_BUFFER)]
    assert batch.tags(addresses[0], 2) == [1]
    with pytest.raises(KernelError) as caught:
        other.register_buffer_ring(GROUP, [])
    assert caught.value.errno == errno.EEXIST


def test_another_fetch_takes_over() -> None:
    """What a fetch without buffers leaves behind is delivered at once by one that waits behind it."""
    batch = batch_server()
    other = SimUring(batch.server.process.task())
    batch.provide(other, [64])
    batch.fetch()
    batch.fetch(other)
    reads(batch, 2)
    assert other.reap() == []
    assert batch.ring.reap() == [Cqe(1, -errno.ENOBUFS)]
    assert other.reap() == [Cqe(1, 4, CQE_MORE | CQE_BUFFER)]


def test_a_full_completion_queue_ends_a_fetch() -> None:
    """The tags are taken back, with their registered buffers, and delivered by another command."""
    batch = batch_server(flags=Feature.AUTO_BUF_REG)
    ring = SimUring(batch.server.tasks[0], sq_entries=1, cq_entries=1)
    ring.register_buffers(4)
    batch.provide(ring, [64])
    ring.submit([Sqe(opcode=UringOp.NOP, user_data=3)])
    batch.fetch(ring)
    reads(batch, 1)
    assert ring.reap(0) == []
    assert ring.buffer(0) is None
    assert ring.reap() == [Cqe(3, 0)]
    assert ring.reap() == [Cqe(1, -errno.ENOBUFS)]
    batch.fetch(ring)
    assert ring.reap() == [Cqe(1, 2, CQE_MORE | CQE_BUFFER)]
    assert ring.buffer(0) is not None


def test_what_is_taken_back_is_the_drivers() -> None:
    """A tag whose completion found no room: EBUSY for a commit, and its own registered buffer is gone, but no other."""
    batch = batch_server(flags=Feature.AUTO_BUF_REG, live=False)
    ring = SimUring(batch.server.tasks[0], sq_entries=1, cq_entries=1)
    ring.register_buffers(4)
    batch.provide(ring, [64, 64, 64])
    # The buffer of the last tag's request would be the first one's: but a FLUSH has none.
    assert batch.send(PREP, [(0, 3), (1, 1), (2, 2), (3, 3)]) == 0
    assert batch.server.control.start() == 0
    batch.fetch(ring)
    reads(batch, 1)
    assert len(ring.reap()) == 1
    assert ring.buffer(3) is not None
    reads(batch, 2)
    batch.server.disk.submit(IoOp.FLUSH)
    ring.submit([Sqe(opcode=UringOp.NOP, user_data=3)])
    assert [ring.buffer(index) is not None for index in range(4)] == [False, False, False, True]
    assert batch.send(COMMIT, [(1, 1, 512)]) == -errno.EBUSY
    assert ring.reap() == [Cqe(3, 0)]
    assert ring.reap() == [Cqe(1, -errno.ENOBUFS)]
    batch.fetch(ring)
    assert ring.reap() == [Cqe(1, 6, 1 << CQE_BUFFER_SHIFT | CQE_MORE | CQE_BUFFER)]


def test_a_provided_buffer_that_is_not_mapped() -> None:
    """ENOBUFS, and the tags wait for the next fetch."""
    batch = batch_server()
    (address,) = batch.provide(batch.ring, [64])
    batch.server.process.memory.unmap(address)
    batch.fetch()
    reads(batch, 1)
    assert batch.ring.reap() == [Cqe(1, -errno.ENOBUFS)]
    other = SimUring(batch.server.process.task())
    (address,) = batch.provide(other, [64])
    batch.fetch(other)
    assert other.reap() == [Cqe(1, 2, CQE_MORE | CQE_BUFFER)]
    assert batch.tags(address, 2) == [0]


def test_at_most_128_tags_at_a_time() -> None:
    """However large the buffer is."""
    batch = batch_server(depth=200)
    batch.provide(batch.ring, [4096, 4096])
    reads(batch, 200)
    batch.fetch()
    assert [cqe.result for cqe in batch.ring.reap()] == [256, 144]


def test_stop_ends_fetches() -> None:
    """STOP_DEV: ENODEV for those that wait, and for those that come."""
    batch = batch_server()
    batch.provide(batch.ring, [64])
    batch.fetch(user_data=1)
    batch.fetch(user_data=2)
    assert batch.server.control.stop() == 0
    assert batch.ring.reap() == [Cqe(1, -errno.ENODEV), Cqe(2, -errno.ENODEV)]
    batch.fetch(user_data=3)
    assert batch.ring.reap() == [Cqe(3, -errno.ENODEV)]
    assert batch.send(PREP, [(0,)]) == -errno.ENODEV
    batch.server.char.close()
    assert batch.server.control.delete() == 0


def test_a_ring_with_fetches_takes_the_server_along() -> None:
    """Its end cancels every queue; what nobody fetched fails with the last close, like what the server held."""
    batch = batch_server()
    batch.provide(batch.ring, [2])
    other = SimUring(batch.server.process.task())
    batch.fetch(other)
    batch.fetch()
    bios = reads(batch, 3)
    batch.ring.reap()
    other.close()
    late = batch.server.disk.submit(IoOp.READ, 0, 512)
    assert late.result == -errno.EIO
    batch.fetch()
    assert batch.ring.reap()[-1] == Cqe(1, -errno.ENODEV)
    assert not any(bio.done for bio in bios)
    batch.server.process.exit()
    assert [bio.result for bio in bios] == [-errno.EIO] * 3
    again = batch_server(batch.server.process.kernel)
    assert again.server.info.dev_id == 1


def test_one_of_two_rings_with_fetches_goes() -> None:
    """The other's commands stay: one that was about to deliver does, and STOP_DEV ends them."""
    batch = batch_server()
    other = SimUring(batch.server.process.task())
    batch.provide(batch.ring, [64])
    batch.fetch()
    batch.fetch(other)
    bios = reads(batch, 2)
    other.close()
    assert batch.ring.reap() == [Cqe(1, 4, CQE_MORE | CQE_BUFFER)]
    assert batch.send(COMMIT, [(0, 0, 512), (1, 0, 512)]) == 32
    assert [bio.done for bio in bios] == [True, True]
    assert batch.server.control.stop() == 0
    assert batch.ring.reap() == [Cqe(1, -errno.ENODEV)]
    assert batch.server.control.delete() is None
    batch.server.char.close()
    assert [cqe.result for cqe in batch.server.control.ring.reap()] == [0]


@pytest.mark.parametrize("quiesced", [False, True])
def test_what_nobody_fetched_goes_to_the_next_server(quiesced: bool) -> None:
    """A command that is cancelled on its way delivers nothing; the next server's gets the request, and only that."""
    flags = Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE | Feature.QUIESCE
    server = raw_server(raw_kernel(), flags=Feature.BATCH_IO | flags, live=False)
    batch = Batch(server, BatchFlag.HAS_BUF_ADDR)
    kernel, control = server.process.kernel, server.control
    assert batch.send(PREP, [(0,), (1,)]) == 0
    assert control.start() == 0
    batch.provide(batch.ring, [64])
    batch.fetch()
    bio = server.disk.submit(IoOp.READ, 4096, 512)
    if quiesced:
        assert control.command(ControlCommand.QUIESCE_DEV) == 0
        assert batch.ring.reap() == [Cqe(1, -errno.ENODEV)]
        assert not bio.done
    batch.ring.close()
    server.char.close()
    assert not bio.done
    assert control.command(ControlCommand.START_USER_RECOVERY) == 0
    char = server.process.open(kernel.char_path(0))
    assert isinstance(char, CharFile)
    server.char = char
    server.rings[0] = SimUring(server.tasks[0])
    (address,) = batch.provide(batch.ring, [64])
    assert batch.send(PREP, [(0,), (1,)]) == 0
    batch.fetch()
    assert control.command(ControlCommand.END_USER_RECOVERY, data=server.process.pid) == 0
    assert batch.ring.reap() == [Cqe(1, 2, CQE_MORE | CQE_BUFFER)]
    (tag,) = batch.tags(address, 2)
    assert server.descriptor(tag).start_sector == 8
    assert batch.send(COMMIT, [(tag, 0, 512)]) == 16
    assert bio.result == 512


def test_registered_buffers_in_batches() -> None:
    """AUTO_BUF_REG with FALLBACK by the elements' index; REGISTER_IO_BUF and UNREGISTER_IO_BUF by whoever likes."""
    batch = batch_server(
        flags=Feature.AUTO_BUF_REG | Feature.SUPPORT_ZERO_COPY, batch_flags=BatchFlag.AUTO_BUF_REG_FALLBACK
    )
    server = batch.server
    batch.ring.register_buffers(2)
    addresses = batch.provide(batch.ring, [64])
    file = ByteFile(server.process, bytearray(b"b" * 512))
    bios = reads(batch, 3)
    batch.fetch()
    assert [cqe.result for cqe in batch.ring.reap()] == [6]
    assert batch.tags(addresses[0], 6) == [0, 1, 2]
    assert [IoFlag.NEED_REG_BUF in server.descriptor(tag).flags for tag in range(3)] == [False, False, True]
    fixed = Sqe(opcode=UringOp.READ_FIXED, file=file, buf_index=0, length=512)
    batch.ring.submit([fixed])
    assert batch.ring.reap() == [Cqe(0, 512)]
    assert batch.send(COMMIT, [(0, 0, 512), (1, 1, 512)]) == 16
    assert bytes(bios[0].data) == b"b" * 512
    assert [bio.done for bio in bios] == [True, True, False]
    assert batch.ring.buffer(0) is None
    ring = SimUring(server.process.task())
    ring.register_buffers(1)
    assert server.io(REGISTER, 2, addr=0, ring=ring) == 0
    assert server.io(REGISTER, 2, addr=0, ring=ring) == -errno.EBUSY
    assert batch.send(COMMIT, [(2, 0, 512)]) == 8
    assert not bios[2].done
    assert server.io(UNREGISTER, 0, addr=0, ring=ring) == 0
    assert bios[2].result == 512


def test_all_of_a_buffer_can_fail() -> None:
    """Requests whose buffers do not go in fail without a completion, and the provided buffer is used for the next."""
    batch = batch_server(flags=Feature.AUTO_BUF_REG)
    batch.provide(batch.ring, [64])
    batch.fetch()
    bios = reads(batch, 2)
    assert batch.ring.reap() == []
    assert [bio.result for bio in bios] == [-errno.EIO] * 2
    batch.server.disk.submit(IoOp.FLUSH)
    assert [cqe.result for cqe in batch.ring.reap()] == [2]


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_lost_or_doubled(seed: int) -> None:
    """Under any choices, with two rings and few buffers, every request is delivered once."""
    kernel = raw_kernel()
    batch = batch_server(kernel)
    kernel.choices = SeededChoices(seed)
    rings = [batch.ring, SimUring(batch.server.process.task())]

    def submit(ring: SimUring, sqe: Sqe) -> None:
        while True:
            try:
                if ring.submit([sqe]):
                    return
            except KernelError:
                continue

    addresses = {ring: batch.provide(ring, [4]) for ring in rings}
    bios = reads(batch, 30)
    running = dict.fromkeys(rings, False)
    for _ in range(2000):
        for ring in rings:
            if not running[ring]:
                submit(ring, batch.sqe(FETCH_BATCH, elem_bytes=2, flags=0))
                running[ring] = True
            for cqe in ring.reap():
                if cqe.user_data == 1 and cqe.result > 0 and cqe.flags & CQE_BUFFER:
                    tags = batch.tags(addresses[ring][0], cqe.result)
                    submit(ring, batch.sqe(COMMIT, [(tag, 0, 512) for tag in tags], user_data=2))
                    ring.provide_buffer(GROUP, 0, addresses[ring][0], 4)
                elif cqe.user_data == 1 and not cqe.flags & CQE_MORE and cqe.result < 0:
                    assert cqe.result == -errno.ENOBUFS
                    running[ring] = False
        if all(bio.done for bio in bios):
            break
    assert [bio.result for bio in bios] == [512] * 30
