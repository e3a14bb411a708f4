"""The raw interface: any process' own rings, memory and files."""

from __future__ import annotations

import contextlib
import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.sim.raw import COMMIT, FETCH, GET_DATA, RawControl, control_sqe, raw_kernel, raw_server
from ublk_trio.errors import KernelError
from ublk_trio.kernel_sim import SeededChoices, SimKernel
from ublk_trio.kernel_sim.uring import RING_CHOICES, Cqe, SimUring, Sqe, UringOp
from ublk_trio.uapi import ControlCommand, Feature, IoCommand, IoOp


def nop(user_data: int) -> Sqe:
    return Sqe(opcode=UringOp.NOP, user_data=user_data)


def test_a_device_lives_and_dies_by_raw_commands() -> None:
    """ADD to DEL over a raw ring: a READ's data comes from the committed address, a WRITE's goes to it, nothing is left."""
    kernel = raw_kernel()
    server = raw_server(kernel)
    written = server.disk.submit(IoOp.WRITE, 4096, b"w" * 1024)
    cqe = server.delivered()
    descriptor = server.descriptor(cqe.user_data)
    assert (descriptor.op, descriptor.start_sector, descriptor.nr_sectors) == (IoOp.WRITE, 8, 2)
    assert descriptor.addr == server.buffers[0][cqe.user_data]
    assert server.buffer(cqe.user_data, 1024) == b"w" * 1024
    server.commit(cqe.user_data, 1024)
    assert written.result == 1024

    read = server.disk.submit(IoOp.READ, 0, 512)
    cqe = server.delivered()
    elsewhere = server.process.memory.map(bytearray(b"r" * 512))
    server.commit(cqe.user_data, 512, addr=elsewhere)
    assert bytes(read.data) == b"r" * 512

    assert server.control.stop() == 0
    assert [cqe.result for cqe in server.ring.reap()] == [-errno.ENODEV] * 2
    assert server.control.delete() is None
    server.char.close()
    assert [cqe.result for cqe in server.control.ring.reap()] == [0]
    # The server's own ring, and that of its control commands.
    assert kernel.leftovers() == [f"open raw ring of {ring.task!r}" for ring in (server.control.ring, server.ring)]
    server.process.exit()
    assert kernel.leftovers() == []


def test_another_task_gets_nowhere() -> None:
    """A ring of another task's: EEXIST; a command from another task's own ring: EINVAL, and the tag is as before."""
    kernel = raw_kernel()
    server = raw_server(kernel)
    other = server.process.task()
    with pytest.raises(KernelError) as caught:
        server.ring.submit([nop(1)], task=other)
    assert caught.value.errno == errno.EEXIST
    bio = server.disk.submit(IoOp.READ, 0, 512)
    tag = server.delivered().user_data
    ring = SimUring(other)
    assert server.io(COMMIT, tag, ring=ring, result=512) == -errno.EINVAL
    # The same task's second ring will do.
    assert server.io(COMMIT, tag, ring=SimUring(server.tasks[0]), result=512) is None
    assert bio.result == 512


@pytest.mark.parametrize("version", [(6, 12), (6, 15)])
def test_before_6_16_a_queue_has_one_task(version: tuple[int, int]) -> None:
    """The daemon is who sent the queue's last FETCH_REQ; requests on the tags that others fetched fail, and those are idle again."""
    server = raw_server(raw_kernel(version), live=False)
    second = SimUring(server.process.task())
    assert server.io(FETCH, 0) is None
    # It has no daemon yet, so it is not the task that is wrong.
    assert server.io(FETCH, 0, ring=second) == -errno.EBUSY
    assert server.io(FETCH, 1, ring=second) is None
    assert server.control.start() == 0
    bios = [server.disk.submit(IoOp.READ, 0, 512), server.disk.submit(IoOp.READ, 512, 512)]
    assert server.ring.reap() == []
    assert bios[0].result == -errno.EIO
    tag = server.delivered(second).user_data
    assert server.io(COMMIT, 1, result=512) == -errno.EINVAL
    assert server.io(COMMIT, 1, result=512, ring=second) is None
    assert (tag, bios[1].result) == (999, 512)
    assert server.control.stop() == 0
    assert [server.delivered(ring).result for ring in (server.ring, second)] == [-errno.ENODEV] * 2


def test_before_6_16_what_the_daemon_cannot_get_waits_for_the_next_one() -> None:
    """With user recovery a request on a tag that another task fetched is held, and no server has it."""
    server = raw_server(raw_kernel((6, 12)), flags=Feature.USER_RECOVERY, live=False)
    for tag, ring in enumerate([server.ring, SimUring(server.process.task())]):
        ring.submit([server.io_sqe(FETCH, tag)])
    assert server.control.start() == 0
    bio = server.disk.submit(IoOp.READ, 0, 512)
    assert server.ring.reap() == []
    assert bio.result is None
    assert server.control.stop() == 0
    assert bio.result == -errno.EIO


@pytest.mark.parametrize("version", [(6, 16), (6, 17), (7, 3)])
def test_since_6_16_each_tag_has_its_task(version: tuple[int, int]) -> None:
    """Two tasks serve a queue: each gets the requests on the tags that it fetched, and may not answer the other's."""
    server = raw_server(raw_kernel(version), live=False)
    rings = [server.ring, SimUring(server.process.task())]
    rings[0].submit([server.io_sqe(FETCH, 0)])
    assert server.io(FETCH, 0, ring=rings[1]) == -errno.EINVAL
    rings[1].submit([server.io_sqe(FETCH, 1)])
    assert server.control.start() == 0
    bios = [server.disk.submit(IoOp.READ, 4096 * number, 512) for number in range(2)]
    assert [server.delivered(ring).user_data for ring in rings] == [0, 1]
    for tag, ring in enumerate(rings):
        assert server.io(COMMIT, tag, ring=rings[1 - tag], result=512) == -errno.EINVAL
        assert server.io(COMMIT, tag, ring=ring, result=512) is None
    assert [bio.result for bio in bios] == [512] * 2


@pytest.mark.parametrize(
    ("version", "fetch_again", "commit_unfetched"),
    [((7, 3), errno.EINVAL, errno.EINVAL), ((6, 12), errno.EBUSY, errno.EINVAL)],
)
def test_refusals_by_release(version: tuple[int, int], fetch_again: int, commit_unfetched: int) -> None:
    """What is pending is EBUSY for every command to 6.16; later a second FETCH_REQ is EINVAL."""
    server = raw_server(raw_kernel(version), queues=2, live=False)
    assert server.io(COMMIT, 0) == -commit_unfetched
    assert server.io(FETCH, 0) is None
    assert server.io(FETCH, 0) == -fetch_again
    assert server.io(COMMIT, 0) == -errno.EBUSY
    assert server.io(GET_DATA, 0) == -errno.EBUSY
    assert server.io(FETCH, 2) == -errno.EINVAL
    assert server.io(FETCH, 0, queue=2) == -errno.EINVAL
    assert server.io(FETCH, 1, addr=0) == -errno.EINVAL
    # An ioctl type that is neither the driver's nor none.
    assert server.io(FETCH, 1, cmd_op=0xC0105A20) == -errno.EOPNOTSUPP
    assert server.io(FETCH, 1, cmd_op=0x20) is None
    # The queue is ready, the device is not.
    assert server.io(FETCH, 1) == -fetch_again


@pytest.mark.parametrize("version", [(6, 12), (6, 15), (6, 16)])
def test_what_a_delivered_tag_is_refused_to_6_16(version: tuple[int, int]) -> None:
    """A command that does not go with NEED_GET_DATA's state is EINVAL before all else; then the opcode, a second FETCH_REQ, the rest."""
    server = raw_server(raw_kernel(version), depth=1, flags=Feature.NEED_GET_DATA)
    bio = server.disk.submit(IoOp.WRITE, 0, b"d" * 512)
    cqe = server.delivered()
    assert (cqe.user_data, cqe.result) == (0, 1)
    for command in (FETCH, COMMIT, IoCommand.REGISTER_IO_BUF):
        assert server.io(command, 0) == -errno.EINVAL
    assert server.io(COMMIT, 0, cmd_op=0xC0105A20) == -errno.EINVAL
    assert server.io(GET_DATA, 0) == 0
    assert server.buffer(0, 512) == b"d" * 512
    assert server.io(COMMIT, 0, cmd_op=0xC0105A20) == -errno.EOPNOTSUPP
    assert server.io(FETCH, 0) == -errno.EBUSY
    for command in (GET_DATA, IoCommand.REGISTER_IO_BUF, IoCommand.UNREGISTER_IO_BUF):
        assert server.io(command, 0) == -errno.EINVAL
    assert server.io(COMMIT, 0, cmd_op=0x2F) == -errno.EINVAL
    assert bio.result is None
    server.commit(0, 512)
    assert bio.result == 512


def test_a_refused_command_leaves_the_pending_one() -> None:
    """A second FETCH_REQ is refused under its own user data; ABORT comes under the first one's."""
    server = raw_server(raw_kernel(), live=False)
    server.ring.submit([server.io_sqe(FETCH, 0, user_data=1), server.io_sqe(FETCH, 0, user_data=2)])
    assert server.ring.reap() == [Cqe(2, -errno.EINVAL)]
    assert server.control.stop() == 0
    assert server.ring.reap() == [Cqe(1, -errno.ENODEV)]


def test_bad_addresses() -> None:
    """EFAULT for a control command; a WRITE that fits in part says how much; one that does not fit comes again and again."""
    kernel = raw_kernel()
    server = raw_server(kernel)
    ring, memory = server.control.ring, server.process.memory
    sqe = control_sqe(server.control.file, ControlCommand.GET_DEV_INFO, addr=12345, length=64)
    ring.submit([sqe])
    assert ring.reap() == [Cqe(0, -errno.EFAULT)]

    half = memory.map(1024)
    server.disk.submit(IoOp.READ, 0, 512)
    server.commit(server.delivered().user_data, 512, addr=half)
    server.disk.submit(IoOp.WRITE, 0, b"x" * 4096)
    cqe = server.delivered()
    assert (cqe.result, server.descriptor(cqe.user_data).nr_sectors) == (0, 2)
    server.commit(cqe.user_data, 4096, addr=half + 1024 - 100)
    # No whole sector is one of none.
    server.disk.submit(IoOp.WRITE, 0, b"x" * 4096)
    cqe = server.delivered()
    assert (cqe.result, server.descriptor(cqe.user_data).nr_sectors) == (0, 0)
    server.commit(cqe.user_data, 4096, addr=77)
    lost = server.disk.submit(IoOp.WRITE, 0, b"y" * 512)
    for _ in range(3):
        assert server.ring.reap() == []
    assert not lost.done
    with pytest.raises(AssertionError):
        memory.map(bytearray())


def test_a_read_from_nowhere_fails() -> None:
    """A READ committed with an address that is not mapped: EIO; before 7.0 it comes again."""
    for version, fails in (((7, 0), True), ((6, 18), False)):
        server = raw_server(raw_kernel(version))
        bio = server.disk.submit(IoOp.READ, 0, 512)
        server.commit(server.delivered().user_data, 512, addr=99)
        assert bio.result == (-errno.EIO if fails else None)
        if not fails:
            server.commit(server.delivered().user_data, 512)
            assert bio.result == 512


@pytest.mark.parametrize("version", [(6, 12), (7, 3)])
def test_a_request_comes_to_the_ring_of_the_last_command(version: tuple[int, int]) -> None:
    """A task with two rings gets a tag's requests where it committed, and a WRITE's data where it asked for them."""
    server = raw_server(raw_kernel(version), flags=Feature.NEED_GET_DATA, depth=1)
    second = SimUring(server.tasks[0])
    server.disk.submit(IoOp.WRITE, 0, b"d" * 512)
    assert server.delivered().result == 1
    assert server.io(GET_DATA, 0, ring=second) == 0
    server.commit(0, 512)
    server.disk.submit(IoOp.READ, 0, 512)
    assert server.delivered().result == 0
    assert server.io(COMMIT, 0, result=512, ring=second) is None
    server.disk.submit(IoOp.READ, 0, 512)
    assert server.ring.reap() == []
    assert server.delivered(second).result == 0


def test_a_writes_data_go_with_the_ring_that_asked() -> None:
    """The end of the ring that sent NEED_GET_DATA, not of the one that got the announcement, ends a WRITE that is yet to be announced again."""
    server = raw_server(raw_kernel(), flags=Feature.NEED_GET_DATA, depth=1)
    second = SimUring(server.tasks[0])
    bio = server.disk.submit(IoOp.WRITE, 0, b"d" * 512)
    assert server.delivered().result == 1
    second.submit([server.io_sqe(GET_DATA, 0, addr=0)])
    assert bio.result is None
    second.close()
    assert bio.result == -errno.EIO


def test_a_writes_data_are_asked_for_once() -> None:
    """From NEED_GET_DATA to its completion the tag is the driver's: a second command is EBUSY."""
    server = raw_server(raw_kernel(), flags=Feature.NEED_GET_DATA, depth=1)
    server.disk.submit(IoOp.WRITE, 0, b"d" * 512)
    assert server.delivered().result == 1
    server.ring.submit([server.io_sqe(GET_DATA, 0, user_data=number) for number in (1, 2)])
    assert server.ring.reap() == [Cqe(2, -errno.EBUSY), Cqe(1, 0)]


def test_need_get_data_without_a_buffer_is_announced_again() -> None:
    """NEED_GET_DATA with nowhere to copy to: the WRITE is announced once more."""
    server = raw_server(raw_kernel(), flags=Feature.NEED_GET_DATA)
    server.disk.submit(IoOp.WRITE, 0, b"d" * 512)
    cqe = server.delivered()
    assert cqe.result == 1
    assert server.io(GET_DATA, cqe.user_data, addr=0) == 1
    assert server.io(GET_DATA, cqe.user_data) == 0
    assert server.buffer(cqe.user_data, 512) == b"d" * 512


def test_the_queues_of_a_ring_are_bounded() -> None:
    """More than the submission queue holds is not taken; a full completion queue loses nothing, keeps the order and counts."""
    ring = SimUring(raw_kernel().process().main_task, sq_entries=3, cq_entries=5)
    assert (ring.sq_entries, ring.cq_entries) == (4, 8)
    sent = 0
    for _ in range(5):
        sent += ring.submit([nop(sent + i) for i in range(6)])
    assert sent == 20
    assert ring.overflow == 12
    reaped = []
    sizes = []
    while found := ring.reap():
        sizes.append(len(found))
        reaped += [cqe.user_data for cqe in found]
    assert reaped == list(range(20))
    assert sizes == [8, 8, 4]
    ring.submit([nop(1)])
    assert ring.reap(0) == []
    assert len(ring.reap(1)) == 1
    assert ring.overflow == 12


def test_an_entry_that_cannot_be_stops_the_rest() -> None:
    """A multishot command without a group of buffers is EINVAL, and what stands behind it is not taken."""
    ring = SimUring(raw_kernel().process().main_task)
    wrong = Sqe(opcode=UringOp.URING_CMD, multishot=True, user_data=7)
    assert ring.submit([nop(1), wrong, nop(2)]) == 2
    assert ring.reap() == [Cqe(1, 0), Cqe(7, -errno.EINVAL)]
    assert ring.submit([Sqe(opcode=UringOp.URING_CMD, user_data=8)]) == 1
    assert ring.reap() == [Cqe(8, -errno.EBADF)]


def test_small_entries_carry_no_control_command() -> None:
    """Without SQE128 a control command is EINVAL."""
    process = raw_kernel().process()
    control = RawControl(process)
    ring = SimUring(process.main_task, sqe128=False)
    ring.submit([control_sqe(control.file, ControlCommand.GET_FEATURES, addr=process.memory.map(8), length=8)])
    assert ring.reap() == [Cqe(0, -errno.EINVAL)]
    buffer = bytearray(8)
    assert control.command(ControlCommand.GET_FEATURES, buffer=buffer) == 0
    assert int.from_bytes(buffer, "little") == process.kernel.features


def test_cancelling() -> None:
    """A held control command is interrupted: EALREADY, then EINTR. A fetched tag cannot be found: ENOENT."""
    kernel = raw_kernel()
    server = raw_server(kernel, live=False)
    server.io(FETCH, 0)
    server.ring.submit([Sqe(opcode=UringOp.ASYNC_CANCEL, user_data=5, cancel_user_data=999)])
    assert server.ring.reap() == [Cqe(5, -errno.ENOENT)]
    ring = server.control.ring
    start = server.control.send(ControlCommand.START_DEV, data=server.process.pid)
    assert ring.reap() == []
    ring.submit([Sqe(opcode=UringOp.ASYNC_CANCEL, user_data=1000, cancel_user_data=start)])
    assert ring.reap() == [Cqe(1000, -errno.EALREADY), Cqe(start, -errno.EINTR)]
    assert kernel.held_commands() == []


def test_an_exit_takes_everything_along() -> None:
    """SIGKILL: what the server held fails, the disk goes, and others can open the char device."""
    kernel = raw_kernel()
    server = raw_server(kernel)
    mapping = server.char.mmap(0, 4096)
    assert mapping.read(0) == bytes(24)
    bio = server.disk.submit(IoOp.READ, 0, 512)
    server.delivered()
    server.process.exit()
    server.process.exit()
    assert bio.result == -errno.EIO
    assert not server.disk.exists
    with pytest.raises(trio.ClosedResourceError):
        server.ring.reap()
    process = kernel.process()
    control = RawControl(process)
    file = process.open("/dev/ublkc0")
    with pytest.raises(KernelError) as caught:
        process.open("/dev/ublkc0")
    assert caught.value.errno == errno.EBUSY
    file.close()
    assert control.delete() == 0
    for path in ("/dev/ublkc0", "/dev/null"):
        with pytest.raises(KernelError) as caught:
            process.open(path)
        assert caught.value.errno == errno.ENOENT


def test_a_mapping_and_a_command_keep_the_char_device_open() -> None:
    """The last close is the last of descriptor, mappings and commands."""
    kernel = raw_kernel()
    server = raw_server(kernel)
    mapping = server.char.mmap(0, 4096)
    server.char.close()
    assert server.disk.exists
    mapping.unmap()
    mapping.unmap()
    assert server.disk.exists
    server.ring.close()
    assert not server.disk.exists


def test_mapping_rules() -> None:
    """Whole pages at a queue's offset, read-only, by one process."""
    server = raw_server(raw_kernel(), queues=2)
    other = server.process.kernel.process()
    per_queue = 4096 * 24
    server.char.mmap(0, 48).unmap()
    server.char.mmap(per_queue + 4096, 4096).unmap()
    for offset, length, writable, process, number in [
        (0, 4096, True, None, errno.EPERM),
        (0, 4096, False, other, errno.EINVAL),
        (0, 8192, False, None, errno.EINVAL),
        (2 * per_queue, 4096, False, None, errno.EINVAL),
        (512, 4096, False, None, errno.EINVAL),
    ]:
        with pytest.raises(KernelError) as caught:
            server.char.mmap(offset, length, writable=writable, process=process)
        assert caught.value.errno == number


def test_choices_shake_a_ring_without_losing_anything() -> None:
    """Short submits, EAGAIN, completions left behind: everything comes in the end, once and in order."""
    seen: set[str] = set()
    errnos: set[int | None] = set()
    for seed in range(20):
        kernel = SimKernel(SeededChoices(seed), partition_scan=False)
        ring = SimUring(kernel.process().main_task, sq_entries=4, cq_entries=4)
        todo = list(range(40))
        reaped: list[int] = []
        while len(reaped) < 40:
            try:
                del todo[: ring.submit([nop(i) for i in todo])]
            except KernelError as error:
                errnos.add(error.errno)
            reaped += [cqe.user_data for cqe in ring.reap()]
        assert reaped == list(range(40))
        seen |= {choice.what for choice in kernel.choices.trace if choice.chosen}
    assert errnos == {errno.EAGAIN}
    assert seen == {"submit-eagain", "submit-short", "reap-left-behind"}


def send_on(ring: SimUring, todo: list[Sqe]) -> None:
    """Submit what can be submitted now."""
    with contextlib.suppress(KernelError):
        del todo[: ring.submit(todo)]


def test_every_choice_of_a_ring_is_reached() -> None:
    """What a kernel is free to do at a ring does no harm, and the table has all of it."""
    chosen: set[str] = set()
    asked: set[str] = set()
    for seed in range(40):
        kernel = raw_kernel()
        server, waiting = raw_server(kernel), raw_server(kernel, live=False)
        control = waiting.control
        start = control.send(ControlCommand.START_DEV, 1, data=waiting.process.pid)
        kernel.choices = SeededChoices(seed)
        bios = [server.disk.submit(IoOp.READ, 512 * i, 512) for i in range(6)]
        commits: list[Sqe] = []
        cancels = [Sqe(opcode=UringOp.ASYNC_CANCEL, user_data=1000, cancel_user_data=start)]
        cancelled: list[tuple[int, int]] = []
        for _ in range(300):
            commits += [server.io_sqe(COMMIT, cqe.user_data, result=512) for cqe in server.ring.reap()]
            send_on(server.ring, commits)
            send_on(control.ring, cancels)
            cancelled += [(cqe.user_data, cqe.result) for cqe in control.ring.reap()]
        assert [bio.result for bio in bios] == [512] * 6
        assert cancelled == [(1000, -errno.EALREADY), (start, -errno.EINTR)]
        chosen |= {choice.what for choice in kernel.choices.trace if choice.chosen}
        asked |= {choice.what for choice in kernel.choices.trace}
    # Those of waiting: see there.
    assert set(RING_CHOICES) - chosen == {"wait-interrupted", "spurious-wake-up"}
    assert asked <= {*RING_CHOICES, "settle"}


async def test_waiting() -> None:
    """A wait ends when something comes, for nothing, or by EINTR; and by close."""
    kernel = raw_kernel()
    server = raw_server(kernel)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.ring.wait)
        await wait_all_tasks_blocked()
        server.disk.submit(IoOp.READ, 0, 512)
    assert server.delivered().result == 0
    endings: list[str] = []

    async def wait(ring: SimUring) -> None:
        try:
            await ring.wait()
        except KernelError as error:
            endings.append(errno.errorcode[error.errno or 0])
        else:
            endings.append("for nothing")

    for seed in range(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, SimUring(SimKernel(SeededChoices(seed)).process().main_task))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert set(endings) == {"EINTR", "for nothing"}
    assert len(endings) < 20
    async with trio.open_nursery() as nursery:

        async def wait_for_the_end() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await server.ring.wait()

        nursery.start_soon(wait_for_the_end)
        await wait_all_tasks_blocked()
        server.ring.close()


def test_a_refused_command_does_not_hold_the_char_device() -> None:
    """Only a pending command keeps the char device open: after a refused one the last close is the last."""
    kernel = raw_kernel()
    server = raw_server(kernel, live=False)
    assert server.io(FETCH, 0, addr=0) == -errno.EINVAL
    server.char.close()
    again = server.process.open(kernel.char_path(0))
    # Nor does the end of its ring close the next one.
    server.ring.close()
    with pytest.raises(KernelError) as caught:
        server.process.open(kernel.char_path(0))
    assert caught.value.errno == errno.EBUSY
    again.close()
    server.process.open(kernel.char_path(0))


def test_a_descriptor_says_the_operation() -> None:
    """The descriptor of each delivered request has its own operation and length, whatever the tag served before."""
    server = raw_server(raw_kernel(), depth=1)
    for op, data, length in ((IoOp.READ, 1024, 1024), (IoOp.WRITE, bytes(512), 512), (IoOp.READ, 512, 512)):
        server.disk.submit(op, 0, data)
        tag = server.delivered().user_data
        descriptor = server.descriptor(tag)
        assert (descriptor.op, descriptor.nr_sectors) == (op, length // 512)
        server.commit(tag, length)
