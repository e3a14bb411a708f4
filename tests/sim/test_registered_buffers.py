"""Requests' buffers in the server's ring: REGISTER_IO_BUF, UNREGISTER_IO_BUF, AUTO_BUF_REG, and how long they last."""

from __future__ import annotations

import errno

import pytest

from tests.sim.mini import basic_params
from tests.sim.raw import COMMIT, FETCH, RawServer, raw_kernel, raw_server
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim.process import ByteFile
from ublk_trio.kernel_sim.uring import Cqe, SimUring, Sqe, UringOp
from ublk_trio.uapi import AutoBufReg, AutoBufRegFlag, BasicAttr, Feature, IoCommand, IoFlag, IoOp

REGISTER, UNREGISTER = IoCommand.REGISTER_IO_BUF, IoCommand.UNREGISTER_IO_BUF


def zero_copy_server(version: tuple[int, int] = (7, 3), *, live: bool = True) -> RawServer:
    server = raw_server(
        raw_kernel(version),
        flags=Feature.SUPPORT_ZERO_COPY,
        copies=False,
        params=basic_params(attrs=BasicAttr.VOLATILE_CACHE),
        live=live,
    )
    server.ring.register_buffers(4)
    return server


def fixed(op: UringOp, file: ByteFile, *, index: int, length: int, addr: int = 0, offset: int = 0) -> Sqe:
    return Sqe(opcode=op, file=file, buf_index=index, length=length, addr=addr, offset=offset, user_data=55)


def run(server: RawServer, sqe: Sqe) -> int:
    server.ring.submit([sqe])
    (cqe,) = server.ring.reap()
    return cqe.result


@pytest.mark.parametrize("version", [(6, 15), (6, 16), (6, 17), (7, 3)])
def test_data_moves_between_a_request_and_a_file(version: tuple[int, int]) -> None:
    """READ_FIXED fills a READ's buffer from a file, WRITE_FIXED takes a WRITE's to one."""
    server = zero_copy_server(version)
    file = ByteFile(server.process, bytearray(b"0123456789abcdef" * 64))
    bio = server.disk.submit(IoOp.READ, 0, 1024)
    tag = server.delivered().user_data
    assert server.io(REGISTER, tag, addr=3) == 0
    assert run(server, fixed(UringOp.READ_FIXED, file, index=3, length=512, offset=8)) == 512
    assert run(server, fixed(UringOp.READ_FIXED, file, index=3, length=512, addr=512, offset=1000)) == 24
    assert server.io(UNREGISTER, tag, addr=3) == 0
    server.commit(tag, 1024)
    assert bytes(bio.data[:512]) == bytes(file.data[8:520])
    assert bytes(bio.data[512:536]) == bytes(file.data[1000:])

    bio = server.disk.submit(IoOp.WRITE, 0, b"w" * 512)
    tag = server.delivered().user_data
    assert server.io(REGISTER, tag, addr=0) == 0
    assert run(server, fixed(UringOp.WRITE_FIXED, file, index=0, length=256, addr=256, offset=2048)) == 256
    assert bytes(file.data[1024:]) == bytes(1024) + b"w" * 256
    assert server.io(UNREGISTER, tag, addr=0) == 0
    server.commit(tag, 512)
    assert bio.result == 512


def test_fixed_operations_stay_inside() -> None:
    """EFAULT: no buffer, past its end, against its direction. Nothing at all is always possible."""
    server = zero_copy_server()
    file = ByteFile(server.process, bytearray(4096))
    server.disk.submit(IoOp.READ, 0, 512)
    server.io(REGISTER, server.delivered().user_data, addr=0)
    assert run(server, fixed(UringOp.READ_FIXED, file, index=1, length=1)) == -errno.EFAULT
    assert run(server, fixed(UringOp.READ_FIXED, file, index=9, length=1)) == -errno.EFAULT
    assert run(server, fixed(UringOp.READ_FIXED, file, index=0, length=513)) == -errno.EFAULT
    assert run(server, fixed(UringOp.READ_FIXED, file, index=0, length=1, addr=512)) == -errno.EFAULT
    assert run(server, fixed(UringOp.WRITE_FIXED, file, index=0, length=512)) == -errno.EFAULT
    assert run(server, fixed(UringOp.READ_FIXED, file, index=0, length=0, addr=512)) == 0
    control = Sqe(opcode=UringOp.READ_FIXED, file=server.control.file, length=1)
    assert run(server, control) == -errno.EINVAL


def test_registering_is_checked() -> None:
    """EINVAL: no such place, a request without data, a tag that is not held; EBUSY: the place is taken."""
    server = zero_copy_server()
    assert server.io(REGISTER, 0, addr=0) == -errno.EBUSY
    bio = server.disk.submit(IoOp.FLUSH)
    tag = server.delivered().user_data
    assert server.io(REGISTER, tag, addr=0) == -errno.EINVAL
    server.commit(tag, 0)
    assert bio.result == 0
    bio = server.disk.submit(IoOp.READ, 0, 512)
    tag = server.delivered().user_data
    assert server.io(REGISTER, tag, addr=4) == -errno.EINVAL
    assert server.io(REGISTER, tag, addr=0) == 0
    assert server.io(REGISTER, tag, addr=0) == -errno.EBUSY
    assert server.io(UNREGISTER, 99, queue=99, addr=1) == -errno.EINVAL
    assert server.io(UNREGISTER, 99, queue=99, addr=4) == -errno.EINVAL
    assert server.io(UNREGISTER, 99, queue=99, addr=0) == 0
    server.commit(tag, 512)
    assert bio.result == 512
    plain = raw_server(raw_kernel())
    plain.ring.register_buffers(1)
    plain.disk.submit(IoOp.READ, 0, 512)
    tag = plain.delivered().user_data
    assert plain.io(REGISTER, tag, addr=0) == -errno.EINVAL
    assert plain.io(UNREGISTER, tag, addr=0) == -errno.EINVAL


@pytest.mark.parametrize(("version", "result"), [((6, 16), -errno.EINVAL), ((6, 17), 0)])
def test_registering_off_the_daemon(version: tuple[int, int], result: int) -> None:
    """Since 6.17 any task may register; the ring that gets the buffer is that task's."""
    server = zero_copy_server(version)
    bio = server.disk.submit(IoOp.READ, 0, 512)
    tag = server.delivered().user_data
    ring = SimUring(server.process.task())
    ring.register_buffers(1)
    assert server.io(REGISTER, tag, addr=0, ring=ring) == result
    server.commit(tag, 512)
    if result:
        assert bio.done
        return
    assert not bio.done
    # Committed, but still held by the buffer: it can be registered once more, by others than the daemon.
    assert server.io(REGISTER, tag, addr=1) == -errno.EBUSY
    ring.unregister_buffers()
    assert bio.result == 512
    assert server.io(REGISTER, tag, addr=0, ring=ring) == -errno.EINVAL


def test_a_request_ends_with_its_last_buffer() -> None:
    """A commit waits for every registration, and for the reads and writes that use one."""
    server = zero_copy_server()
    file = ByteFile(server.process, bytearray(b"q" * 512))
    bio = server.disk.submit(IoOp.READ, 0, 512)
    tag = server.delivered().user_data
    for index in (0, 1):
        assert server.io(REGISTER, tag, addr=index) == 0
    server.commit(tag, 512)
    assert not bio.done
    assert server.io(UNREGISTER, tag, addr=0) == 0
    assert not bio.done
    slow = Sqe(opcode=UringOp.READ_FIXED, file=file, buf_index=1, length=512, user_data=7, force_async=True)
    server.ring.submit([slow, server.io_sqe(UNREGISTER, tag, addr=1, user_data=8)])
    assert not bio.done
    assert server.ring.buffer(1) is None
    assert server.ring.reap() == [Cqe(8, 0), Cqe(7, 512)]
    assert bytes(bio.data) == b"q" * 512


def test_a_buffer_ends_only_its_own_request() -> None:
    """The tag's next request does not end with its last buffer when it was not committed, though the one before it did."""
    server = zero_copy_server()
    for committed_first in (True, False):
        bio = server.disk.submit(IoOp.READ, 0, 512)
        tag = server.delivered().user_data
        assert server.io(REGISTER, tag, addr=0) == 0
        if committed_first:
            server.commit(tag, 512)
        assert server.io(UNREGISTER, tag, addr=0) == 0
        assert bio.done == committed_first
    server.commit(tag, 512)
    assert bio.result == 512


def test_stop_waits_for_buffers() -> None:
    """A committed request whose buffer is registered is still in flight."""
    server = zero_copy_server()
    server.disk.submit(IoOp.READ, 0, 512)
    tag = server.delivered().user_data
    server.io(REGISTER, tag, addr=0)
    server.commit(tag, 512)
    assert server.control.stop() is None
    server.ring.submit([server.io_sqe(UNREGISTER, tag, addr=0)])
    assert [cqe.result for cqe in server.control.ring.reap()] == [0]
    assert sorted(cqe.result for cqe in server.ring.reap()) == [-errno.ENODEV, -errno.ENODEV, 0]


@pytest.mark.parametrize("committed", [True, False])
def test_a_rings_end_gives_its_buffers_back(committed: bool) -> None:
    """SIGKILL: what was committed ends as it was, what was not fails; nothing hangs."""
    server = zero_copy_server()
    bio = server.disk.submit(IoOp.READ, 0, 512)
    tag = server.delivered().user_data
    server.io(REGISTER, tag, addr=0)
    file = ByteFile(server.process, bytearray(512))
    server.ring.submit([Sqe(opcode=UringOp.READ_FIXED, file=file, buf_index=0, length=512, force_async=True)])
    if committed:
        server.commit(tag, 512)
    server.process.exit()
    assert bio.result == (512 if committed else -errno.EIO)
    assert not server.disk.exists


def test_the_end_of_a_server_waits_for_its_buffers() -> None:
    """A buffer in a ring that outlives the char device keeps the device from losing its server, and the request from ending."""
    server = zero_copy_server()
    bio = server.disk.submit(IoOp.READ, 0, 512)
    tag = server.delivered().user_data
    other = SimUring(server.tasks[0])
    other.register_buffers(1)
    assert server.io(REGISTER, tag, addr=0, ring=other) == 0
    server.ring.close()
    server.char.close()
    kernel = server.process.kernel
    assert kernel.held_commands() == [
        "release of /dev/ublkc0, waiting for references to the data of requests of device 0"
    ]
    assert (server.disk.exists, bio.done) == (True, False)
    # Nor is there a next server before.
    with pytest.raises(KernelError) as caught:
        server.process.open(kernel.char_path(0))
    assert caught.value.errno == errno.EBUSY
    other.unregister_buffers()
    assert kernel.held_commands() == []
    assert (server.disk.exists, bio.result) == (False, -errno.EIO)
    server.process.open(kernel.char_path(0))


def test_tables() -> None:
    """One table a ring: EBUSY for a second, ENXIO for none."""
    ring = SimUring(raw_kernel().process().main_task)
    with pytest.raises(KernelError) as caught:
        ring.unregister_buffers()
    assert caught.value.errno == errno.ENXIO
    ring.register_buffers(2)
    with pytest.raises(KernelError) as caught:
        ring.register_buffers(2)
    assert caught.value.errno == errno.EBUSY
    assert ring.buffer(0) is None
    assert ring.buffer(5) is None


# ---------------------------------------------------------------------- AUTO_BUF_REG


def auto_server(*, fallback: bool = False, places: int = 2, version: tuple[int, int] = (7, 3)) -> RawServer:
    """A live device; tag n asks for place n."""
    server = raw_server(
        raw_kernel(version),
        flags=Feature.AUTO_BUF_REG | Feature.SUPPORT_ZERO_COPY,
        copies=False,
        live=False,
        params=basic_params(attrs=BasicAttr.VOLATILE_CACHE),
    )
    if places:
        server.ring.register_buffers(places)
    for tag in range(2):
        assert server.io(FETCH, tag, sqe_addr=word(tag, fallback=fallback)) is None
    assert server.control.start() == 0
    return server


def word(index: int, *, fallback: bool = False) -> int:
    flags = AutoBufRegFlag.FALLBACK if fallback else AutoBufRegFlag(0)
    return AutoBufReg(index=index, flags=flags).to_sqe_addr()


@pytest.mark.parametrize("version", [(6, 16), (7, 3)])
def test_buffers_come_registered(version: tuple[int, int]) -> None:
    """The buffer is in its place at delivery, and gone with the commit, which names the next place."""
    server = auto_server(version=version)
    file = ByteFile(server.process, bytearray(b"f" * 512))
    bio = server.disk.submit(IoOp.READ, 0, 512)
    assert server.delivered().result == 0
    buffer = server.ring.buffer(0)
    assert buffer is not None
    assert run(server, fixed(UringOp.READ_FIXED, file, index=0, length=512)) == 512
    server.commit(0, 512, sqe_addr=word(1))
    assert bytes(bio.data) == b"f" * 512
    assert server.ring.buffer(0) is None
    server.disk.submit(IoOp.WRITE, 0, bytes(512))
    assert len(server.ring.reap()) == 1
    assert server.ring.buffer(1) is not None


def test_an_operation_without_data_has_no_buffer() -> None:
    """A FLUSH is delivered, and nothing registered."""
    server = auto_server()
    server.disk.submit(IoOp.FLUSH)
    tag = server.delivered().user_data % 999
    assert server.ring.buffer(0) is server.ring.buffer(1) is None
    assert IoFlag.NEED_REG_BUF not in server.descriptor(tag).flags


def test_a_buffer_that_does_not_go_in_fails_the_request() -> None:
    """Without FALLBACK: EIO, no completion, and the tag serves the next request."""
    server = auto_server(places=1)
    bios = [server.disk.submit(IoOp.READ, 0, 512) for _ in range(2)]
    assert len(server.ring.reap()) == 1
    assert (bios[0].done, bios[1].result) == (False, -errno.EIO)
    flush = server.disk.submit(IoOp.FLUSH)
    assert len(server.ring.reap()) == 1
    assert not flush.done


def test_fallback_delivers_without_a_buffer() -> None:
    """With FALLBACK the descriptor says NEED_REG_BUF, and the server registers by itself."""
    server = auto_server(places=1, fallback=True)
    bios = [server.disk.submit(IoOp.READ, 0, 512) for _ in range(2)]
    assert len(server.ring.reap()) == 2
    assert IoFlag.NEED_REG_BUF not in server.descriptor(0).flags
    assert IoFlag.NEED_REG_BUF in server.descriptor(1).flags
    server.commit(0, 512, sqe_addr=word(0))
    assert server.io(REGISTER, 1, addr=0) == 0
    server.commit(1, 512, sqe_addr=word(0))
    assert [bio.done for bio in bios] == [True, False]
    assert server.io(UNREGISTER, 1, addr=0) == 0
    assert bios[1].result == 512


def test_auto_words_are_checked() -> None:
    """Reserved bits are EINVAL in FETCH_REQ and in COMMIT_AND_FETCH_REQ, and change nothing."""
    server = raw_server(raw_kernel(), flags=Feature.AUTO_BUF_REG, copies=False, live=False)
    server.ring.register_buffers(2)
    for bad in (1 << 17, 1 << 24, 1 << 32, 1 << 63):
        assert server.io(FETCH, 0, sqe_addr=bad) == -errno.EINVAL
    assert server.io(FETCH, 0, addr=4096) == -errno.EINVAL
    assert server.io(FETCH, 0, sqe_addr=word(0)) is None
    assert server.io(FETCH, 1, sqe_addr=word(1)) is None
    server.control.start()
    bio = server.disk.submit(IoOp.READ, 0, 512)
    server.ring.reap()
    assert server.io(COMMIT, 0, result=512, sqe_addr=1 << 32) == -errno.EINVAL
    assert server.ring.buffer(0) is not None
    assert not bio.done
    # AUTO_BUF_REG alone does not allow to do it by hand.
    assert server.io(REGISTER, 0, addr=1) == -errno.EINVAL
    assert server.io(UNREGISTER, 0, addr=0) == -errno.EINVAL


def test_without_the_feature_the_auto_word_means_nothing() -> None:
    """FETCH_REQ and COMMIT_AND_FETCH_REQ of a device without AUTO_BUF_REG may carry any word there."""
    for flags in (Feature(0), Feature.USER_COPY):
        server = raw_server(raw_kernel(), flags=flags, copies=not flags, depth=1, live=False)
        assert server.io(FETCH, 0, sqe_addr=1 << 32) is None
        assert server.control.start() == 0
        bio = server.disk.submit(IoOp.READ, 0, 512)
        server.ring.reap()
        server.commit(0, 512, sqe_addr=1 << 32)
        assert bio.result == 512


def test_a_commit_from_another_ring_leaves_the_buffer() -> None:
    """The buffer stays in the ring where it was registered, and keeps the request from ending."""
    server = auto_server()
    other = SimUring(server.tasks[0])
    other.register_buffers(1)
    bio = server.disk.submit(IoOp.READ, 0, 512)
    server.disk.submit(IoOp.READ, 512, 512)
    server.ring.reap()
    assert server.io(REGISTER, 1, addr=0, ring=other) == 0
    assert server.io(COMMIT, 0, result=512, ring=other) is None
    # Nor is another buffer taken for it.
    assert other.buffer(0) is not None
    assert server.ring.buffer(0) is not None
    assert not bio.done
    assert server.io(UNREGISTER, 0, addr=0) == 0
    assert bio.result == 512
