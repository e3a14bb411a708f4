"""SHMEM_ZC: REG_BUF, UNREG_BUF, and requests whose data lies in registered memory."""

from __future__ import annotations

import errno

import pytest

from tests.sim.mini import basic_params
from tests.sim.raw import COMMIT, FETCH, GET_DATA, RawControl, RawServer, control_sqe, raw_kernel, raw_server
from ublk_trio.kernel_sim import Bio
from ublk_trio.uapi import ControlCommand, Feature, IoFlag, IoOp, ShmemBufReg, split_shmem_zc_addr

PAGE = 4096


def reg_buf(control: RawControl, address: int, length: int, *, flags: int = 0, reserved: int = 0) -> int | None:
    buffer = bytearray(ShmemBufReg.LAYOUT.pack(address, length, flags, reserved))
    return control.command(ControlCommand.REG_BUF, buffer=buffer)


def unreg_buf(control: RawControl, index: int) -> int | None:
    return control.command(ControlCommand.UNREG_BUF, data=index)


def shared_server(flags: Feature = Feature(0), version: tuple[int, int] = (7, 3)) -> RawServer:  # noqa: B008
    copies = not flags & Feature.USER_COPY
    return raw_server(raw_kernel(version), flags=Feature.SHMEM_ZC | flags, copies=copies)


def submit(server: RawServer, op: IoOp, view: memoryview) -> Bio:
    """An operation with an application's own memory."""
    return server.disk.submit(op, 0, view)


def test_registering_is_checked() -> None:
    """In the driver's order: the feature, the record, the memory; indexes are the lowest free ones."""
    plain = raw_server(raw_kernel())
    assert reg_buf(plain.control, 0, 0) == -errno.EOPNOTSUPP
    assert unreg_buf(plain.control, 0) == -errno.EOPNOTSUPP
    server = shared_server()
    control, memory = server.control, server.process.memory
    address = memory.map(8 * PAGE)
    control.ring.submit([control_sqe(control.file, ControlCommand.REG_BUF, addr=64, length=24, user_data=5)])
    assert [cqe.result for cqe in control.ring.reap()] == [-errno.EFAULT]
    for bad in [
        {"flags": 2},
        {"reserved": 1},
        {"length": 0},
        {"length": (1 << 32) + PAGE},
        {"length": 512},
        {"address": address + 512},
    ]:
        assert reg_buf(control, **({"address": address, "length": PAGE} | bad)) == -errno.EINVAL
    assert reg_buf(control, address, 9 * PAGE) == -errno.EFAULT
    assert reg_buf(control, 1 << 40, PAGE) == -errno.EFAULT
    assert reg_buf(control, address, 2 * PAGE) == 0
    assert reg_buf(control, address + PAGE, PAGE) == -errno.EEXIST
    assert reg_buf(control, address + 2 * PAGE, PAGE) == 1
    assert unreg_buf(control, 0) == 0
    assert unreg_buf(control, 0) == -errno.ENOENT
    for index in (-1 & 0xFFFF_FFFF, 1 << 16):
        assert unreg_buf(control, index) == -errno.EINVAL
    assert reg_buf(control, address, PAGE, flags=1) == 0


def test_older_releases_do_not_know_it() -> None:
    """Before 7.1 the feature is dropped and the commands unknown."""
    server = shared_server(version=(7, 0))
    assert not server.info.flags & Feature.SHMEM_ZC
    assert reg_buf(server.control, 0, 0) == -errno.EOPNOTSUPP


@pytest.mark.parametrize("flags", [Feature(0), Feature.USER_COPY])
def test_requests_in_registered_memory(flags: Feature) -> None:
    """They come with the flag, index and offset; nothing is copied, and what the server writes the application sees."""
    server = shared_server(flags)
    memory = server.process.memory
    shared = bytearray(4 * PAGE)
    reg_buf(server.control, memory.map(PAGE), PAGE)
    assert reg_buf(server.control, memory.map(shared), 4 * PAGE) == 1
    view = memoryview(shared)
    bio = submit(server, IoOp.READ, view[PAGE + 512 : PAGE + 1536])
    tag = server.delivered().user_data
    descriptor = server.descriptor(tag)
    assert IoFlag.SHMEM_ZC in descriptor.flags
    assert split_shmem_zc_addr(descriptor.addr) == (1, PAGE + 512)
    view[PAGE + 512 : PAGE + 516] = b"here"
    server.commit(tag, 1024)
    assert bytes(bio.data[:4]) == b"here"
    assert bio.result == 1024

    view[:4] = b"data"
    bio = submit(server, IoOp.WRITE, view[:512])
    tag = server.delivered().user_data
    assert split_shmem_zc_addr(server.descriptor(tag).addr) == (1, 0)
    if server.buffers:
        assert server.buffer(tag, 4) == bytes(4)
    server.commit(tag, 512)
    assert bio.result == 512


def test_requests_that_do_not_lie_in_it_whole() -> None:
    """Across its end, elsewhere, a constant, a READ of read-only memory, after UNREG_BUF: an ordinary delivery."""
    server = shared_server()
    shared = bytearray(4 * PAGE)
    address = server.process.memory.map(shared)
    assert reg_buf(server.control, address, 2 * PAGE, flags=1) == 0
    view = memoryview(shared)

    def delivered_plainly(op: IoOp, data: memoryview) -> bool:
        bio = submit(server, op, data)
        tag = server.delivered().user_data
        descriptor = server.descriptor(tag)
        plain = descriptor.addr == server.buffers[0][tag]
        assert plain != (IoFlag.SHMEM_ZC in descriptor.flags)
        server.commit(tag, len(data))
        assert bio.result == len(data)
        return plain

    assert not delivered_plainly(IoOp.WRITE, view[:PAGE])
    assert delivered_plainly(IoOp.READ, view[:PAGE])
    assert delivered_plainly(IoOp.WRITE, view[PAGE : 3 * PAGE])
    assert delivered_plainly(IoOp.WRITE, view[2 * PAGE :])
    assert delivered_plainly(IoOp.WRITE, memoryview(bytes(512)))
    assert delivered_plainly(IoOp.WRITE, memoryview(bytearray(512)))
    assert unreg_buf(server.control, 0) == 0
    assert delivered_plainly(IoOp.WRITE, view[:PAGE])


def test_a_shared_read_is_whole_whatever_its_result() -> None:
    """There is nothing to copy, so a short result ends it; 0 is still EIO."""
    server = shared_server()
    shared = bytearray(PAGE)
    reg_buf(server.control, server.process.memory.map(shared), PAGE)
    for result, end in ((512, PAGE), (0, -errno.EIO)):
        bio = submit(server, IoOp.READ, memoryview(shared))
        server.commit(server.delivered().user_data, result)
        assert bio.result == end


def test_get_data_of_a_shared_write() -> None:
    """It is announced all the same; then the flag stays, the address is the command's, and nothing is copied."""
    server = shared_server(Feature.NEED_GET_DATA)
    shared = bytearray(b"s" * PAGE)
    reg_buf(server.control, server.process.memory.map(shared), PAGE)
    submit(server, IoOp.WRITE, memoryview(shared))
    cqe = server.delivered()
    assert cqe.result == 1
    assert server.descriptor(cqe.user_data).addr == 0
    assert server.io(GET_DATA, cqe.user_data) == 0
    descriptor = server.descriptor(cqe.user_data)
    assert IoFlag.SHMEM_ZC in descriptor.flags
    assert descriptor.addr == server.buffers[0][cqe.user_data]
    assert server.buffer(cqe.user_data, 4) == bytes(4)


def test_registering_waits_until_the_disk_is_idle() -> None:
    """REG_BUF and UNREG_BUF of a live device are held while requests are unanswered; what comes meanwhile waits for them."""
    server = shared_server()
    address = server.process.memory.map(PAGE)
    server.disk.submit(IoOp.READ, 0, 512)
    tag = server.delivered().user_data
    assert reg_buf(server.control, address, PAGE) is None
    after = server.disk.submit(IoOp.READ, 0, 512)
    assert server.ring.reap() == []
    server.commit(tag, 512)
    assert [cqe.result for cqe in server.control.ring.reap()] == [0]
    tag = server.delivered().user_data
    assert not after.done
    assert unreg_buf(server.control, 0) is None
    server.commit(tag, 512)
    assert [cqe.result for cqe in server.control.ring.reap()] == [0]


def test_it_outlives_the_server() -> None:
    """The memory stays registered when its server dies, and serves the next one."""
    server = shared_server()
    shared = bytearray(PAGE)
    reg_buf(server.control, server.process.memory.map(shared), PAGE)
    kernel = server.process.kernel
    server.process.exit()
    process = kernel.process()
    control = RawControl(process)
    assert reg_buf(control, process.memory.map(shared), PAGE) == -errno.EEXIST
    assert unreg_buf(control, 0) == 0


def test_zone_appends_tell_where() -> None:
    """COMMIT_AND_FETCH_REQ's address is the place that a zone append got, and allowed for nothing else."""
    server = raw_server(raw_kernel(), flags=Feature.USER_COPY, copies=False, params=basic_params())
    server.disk.submit(IoOp.WRITE, 0, bytes(512))
    request = kernel_request(server)
    request.op = int(IoOp.ZONE_APPEND)
    tag = server.delivered().user_data
    assert server.io(COMMIT, tag, result=512, addr=4711) is None
    assert request.start_sector == 4711
    assert server.io(FETCH, 0) == -errno.EBUSY


def kernel_request(server: RawServer):  # type: ignore[no-untyped-def]
    return server.process.kernel.devices[server.info.dev_id].queues[0].tags[0].request
