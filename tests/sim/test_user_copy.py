"""User copy: pread and pwrite on the char device, their checks, and the references that they keep."""

from __future__ import annotations

import errno
from collections.abc import Callable

import attrs
import pytest

from tests.sim.mini import basic_params
from tests.sim.raw import COMMIT, RawControl, RawServer, raw_kernel, raw_server
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import Bio
from ublk_trio.kernel_sim.process import SimTask
from ublk_trio.kernel_sim.uring import Sqe, UringOp
from ublk_trio.uapi import BasicAttr, Feature, IoFlag, IoOp, ParamsIntegrity, user_copy_offset


def user_copy_server(version: tuple[int, int] = (7, 3), flags: Feature = Feature.USER_COPY) -> RawServer:
    cached = basic_params(attrs=BasicAttr.VOLATILE_CACHE)
    return raw_server(raw_kernel(version), flags=flags, copies=False, params=cached)


def place(tag: int, offset: int = 0, *, queue_id: int = 0, integrity: bool = False) -> int:
    return user_copy_offset(queue_id=queue_id, tag=tag, offset=offset, integrity=integrity)


def refused(call: Callable[..., object], *args: object, task: SimTask | None = None) -> int | None:
    with pytest.raises(KernelError) as caught:
        call(*args, task=task)
    return caught.value.errno


@pytest.mark.parametrize("version", [(6, 12), (6, 17), (7, 3)])
def test_data_moves_by_pread_and_pwrite(version: tuple[int, int]) -> None:
    """A WRITE's data is read in pieces, a READ's is written in pieces, and nothing behind the end."""
    server = user_copy_server(version)
    char, task = server.char, server.tasks[0]
    bio = server.disk.submit(IoOp.WRITE, 0, bytes(range(256)) * 4)
    tag = server.delivered().user_data
    assert server.descriptor(tag).addr == 0
    assert char.pread(256, place(tag, 256), task=task) == bytes(range(256))
    assert char.pread(4096, place(tag, 1000), task=task) == (bytes(range(256)) * 4)[1000:]
    assert char.pread(10, place(tag, 1024), task=task) == b""
    assert refused(char.pread, 10, place(tag, 1025), task=task) == errno.EINVAL
    server.commit(tag, 1024)
    assert bio.result == 1024
    bio = server.disk.submit(IoOp.READ, 0, 1024)
    tag = server.delivered().user_data
    assert char.pwrite(b"a" * 512, place(tag), task=task) == 512
    assert char.pwrite(b"b" * 4096, place(tag, 512), task=task) == 512
    server.commit(tag, 1024)
    assert bytes(bio.data) == b"a" * 512 + b"b" * 512


@pytest.mark.parametrize("version", [(6, 12), (7, 3)])
def test_a_merged_read_reaches_each_of_its_parts(version: tuple[int, int]) -> None:
    """Adjacent READs that became one request each get their own bytes of what the server moved."""
    server = user_copy_server(version)
    with server.disk.plugged():
        parts = [server.disk.submit(IoOp.READ, number * 512, 512) for number in range(3)]
    tag = server.delivered().user_data
    assert server.char.pwrite(b"a" * 512 + b"b" * 512 + b"c" * 512, place(tag), task=server.tasks[0]) == 1536
    server.commit(tag, 1536)
    assert [bytes(part.data) for part in parts] == [b"a" * 512, b"b" * 512, b"c" * 512]


def test_refusals() -> None:
    """Queue, tag and ownership EINVAL; direction EACCES, for the daemon and for others."""
    server = user_copy_server()
    char = server.char
    for task in (server.tasks[0], server.process.task()):
        assert refused(char.pread, 1, place(0, queue_id=1), task=task) == errno.EINVAL
        assert refused(char.pread, 1, place(2), task=task) == errno.EINVAL
        assert refused(char.pread, 1, place(0), task=task) == errno.EINVAL
        assert refused(char.pread, 1, -1, task=task) == errno.EINVAL
        assert refused(char.pread, 1, place(0, integrity=True), task=task) == errno.EINVAL
        flush = server.disk.submit(IoOp.FLUSH)
        tag = server.delivered().user_data
        assert refused(char.pread, 1, place(tag), task=task) == errno.EINVAL
        server.commit(tag, 0)
        assert flush.result == 0
        read = server.disk.submit(IoOp.READ, 0, 512)
        # It is on its way.
        for tag in range(2):
            assert refused(char.pwrite, b"x", place(tag), task=task) == errno.EINVAL
        tag = server.delivered().user_data
        assert refused(char.pread, 1, place(tag), task=task) == errno.EACCES
        server.commit(tag, 512)
        write = server.disk.submit(IoOp.WRITE, 0, bytes(512))
        tag = server.delivered().user_data
        assert refused(char.pwrite, b"x", place(tag), task=task) == errno.EACCES
        assert refused(char.pwrite, b"x", place(tag, 513), task=task) == errno.EINVAL
        server.commit(tag, 512)
        assert (read.result, write.result) == (512, 512)


@pytest.mark.parametrize(("version", "number"), [((6, 12), errno.EINVAL), ((7, 3), errno.EACCES)])
def test_it_needs_its_feature_and_a_live_device(version: tuple[int, int], number: int) -> None:
    """Without USER_COPY it is EACCES (before 6.18 EINVAL); a dead device EACCES."""
    server = raw_server(raw_kernel(version), live=False)
    assert refused(server.char.pread, 1, place(0)) == errno.EACCES
    server.fetch_all()
    assert server.control.start() == 0
    server.disk.submit(IoOp.WRITE, 0, bytes(512))
    tag = server.delivered().user_data
    assert refused(server.char.pread, 1, place(tag)) == number


def test_addresses_must_be_zero() -> None:
    """FETCH_REQ and COMMIT_AND_FETCH_REQ carry no address; a refused commit changes nothing."""
    server = user_copy_server()
    bio = server.disk.submit(IoOp.WRITE, 0, bytes(512))
    tag = server.delivered().user_data
    assert server.io(COMMIT, tag, result=512, addr=4096) == -errno.EINVAL
    assert bio.result is None
    server.commit(tag, 512)
    assert server.control.stop() == 0
    fresh = raw_server(raw_kernel(), flags=Feature.USER_COPY, copies=False, live=False)
    assert fresh.io(0x20, 0, addr=4096) == -errno.EINVAL
    assert fresh.io(0x20, 0) is None


def test_a_copy_under_way_keeps_the_request() -> None:
    """A request ends with the last copy of another task, not with its commit; further copies may begin until then."""
    server = user_copy_server()
    other = server.process.task()
    bio = server.disk.submit(IoOp.READ, 0, 512)
    tag = server.delivered().user_data
    copy = server.char.start_pwrite(place(tag), task=other)
    server.commit(tag, 512)
    assert not bio.done
    # It is not the server's any more, but the data is still there.
    assert refused(server.char.pwrite, b"y", place(tag), task=server.tasks[0]) == errno.EINVAL
    late = server.char.start_pwrite(place(tag, 256), task=other)
    assert copy.write(b"1" * 256) == 256
    assert not bio.done
    assert late.write(b"2" * 256) == 256
    assert bytes(bio.data) == b"1" * 256 + b"2" * 256
    assert refused(server.char.pwrite, b"y", place(tag), task=other) == errno.EINVAL
    # The tag is free for the next request.
    assert [server.disk.submit(IoOp.READ, 0, 512).done for _ in range(2)] == [False, False]
    assert len(server.ring.reap()) == 2


def test_the_end_of_a_server_waits_for_copies() -> None:
    """What the server held fails only when no copy uses its data any more."""
    server = user_copy_server()
    bio = server.disk.submit(IoOp.READ, 0, 512)
    tag = server.delivered().user_data
    copy = server.char.start_pwrite(place(tag), task=server.process.task())
    server.process.exit()
    assert not bio.done
    copy.write(b"z")
    assert bio.result == -errno.EIO


def test_there_is_no_data_once_the_server_has_lost_its_requests() -> None:
    """Before 6.15 the end of a ring takes the server's requests, while the char device is open: EINVAL."""
    server = user_copy_server((6, 12), Feature.USER_COPY | Feature.USER_RECOVERY)
    bio = server.disk.submit(IoOp.READ, 0, 512)
    tag = server.delivered().user_data
    server.ring.close()
    assert bio.result == -errno.EIO
    assert refused(server.char.pwrite, b"x", place(tag), task=server.tasks[0]) == errno.EINVAL


@pytest.mark.parametrize("flags", [Feature(0), Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE])
def test_a_copy_ends_what_a_lost_server_had(flags: Feature) -> None:
    """Before 6.15 nobody waits for a copy: it goes on, and with its end the request fails, though others go to the next server."""
    server = user_copy_server((6, 12), Feature.USER_COPY | flags)
    bio = server.disk.submit(IoOp.READ, 0, 512)
    tag = server.delivered().user_data
    copy = server.char.start_pwrite(place(tag), task=server.process.task())
    server.ring.close()
    assert bio.result is None
    assert copy.write(b"z") == 1
    assert bio.result == -errno.EIO


def test_a_deleted_device_goes_with_the_last_copy() -> None:
    """DEL_DEV of a device whose server is dead waits for a copy under way, however long; root's requests have no time limit."""
    server = user_copy_server()
    kernel = server.process.kernel
    control = RawControl(kernel.process())
    # On every tag, so that no command is pending whose end would tell.
    for number in range(2):
        server.disk.submit(IoOp.READ, 4096 * number, 512)
    tag = server.ring.reap()[0].user_data
    copy = server.char.start_pwrite(place(tag), task=server.process.task())
    server.process.exit()
    assert control.delete() is None
    held = kernel.held_commands()
    assert sorted(held) == [
        "DEL_DEV of device 0, waiting for 2 operations on /dev/ublkb0",
        "release of /dev/ublkc0, waiting for references to the data of requests of device 0",
    ]
    kernel.let_time_pass(3600)
    assert kernel.held_commands() == held
    copy.write(b"z")
    assert [cqe.result for cqe in control.ring.reap()] == [0]
    assert kernel.devices == {}


@pytest.mark.parametrize(("version", "rest"), [((7, 3), None), ((7, 1), 8)])
def test_short_results_by_release(version: tuple[int, int], rest: int | None) -> None:
    """In user copy, too, a short result is whole since 7.2; before, the rest comes again."""
    for op, data in ((IoOp.WRITE, bytes(8192)), (IoOp.READ, 8192)):
        server = user_copy_server(version)
        bio = server.disk.submit(op, 0, data)
        server.commit(server.delivered().user_data, 4096)
        if rest is None:
            assert bio.result == 8192
        else:
            assert not bio.done
            assert server.descriptor(server.delivered().user_data).start_sector == rest


def test_integrity_data() -> None:
    """Bit 62 selects the request's integrity data: as much as its intervals have."""
    params = attrs.evolve(basic_params(), integrity=ParamsIntegrity(interval_exp=9, metadata_size=8))
    server = raw_server(raw_kernel(), flags=Feature.USER_COPY | Feature.INTEGRITY, params=params, copies=False)
    disk = server.process.kernel.devices[0].disk
    assert disk is not None
    bio: Bio = server.disk.submit(IoOp.WRITE, 0, bytes(2048), metadata=bytes(range(32)))
    tag = server.delivered().user_data
    assert IoFlag.INTEGRITY in server.descriptor(tag).flags
    task = server.tasks[0]
    assert server.char.pread(100, place(tag, 8, integrity=True), task=task) == bytes(range(8, 32))
    assert server.char.pread(100, place(tag, 32, integrity=True), task=task) == b""
    assert refused(server.char.pread, 1, place(tag, 33, integrity=True), task=task) == errno.EINVAL
    server.commit(tag, 2048)
    assert bio.result == 2048
    # Another operation without any gets as much of zeroes.
    server.disk.submit(IoOp.WRITE, 0, bytes(2048))
    tag = server.delivered().user_data
    assert IoFlag.INTEGRITY in server.descriptor(tag).flags
    assert server.char.pread(100, place(tag, integrity=True), task=task) == bytes(32)


def test_fixed_reads_cannot_copy() -> None:
    """A registered buffer is not the program's own memory: EACCES, after the buffer's own EFAULT."""
    server = raw_server(raw_kernel(), flags=Feature.USER_COPY | Feature.SUPPORT_ZERO_COPY, copies=False)
    server.ring.register_buffers(1)
    server.disk.submit(IoOp.READ, 0, 512)
    tag = server.delivered().user_data
    sqe = Sqe(opcode=UringOp.READ_FIXED, file=server.char, offset=place(tag), length=512, buf_index=0)
    server.ring.submit([sqe])
    assert server.delivered().result == -errno.EFAULT
    assert server.io(0x23, tag, addr=0) == 0
    server.ring.submit([sqe])
    assert server.delivered().result == -errno.EACCES
