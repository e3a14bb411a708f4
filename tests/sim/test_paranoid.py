"""What a wrong server does is found, by name; what a right one does is not."""

from __future__ import annotations

import pytest

from tests.sim.mini import COMMIT, GET_DATA, basic_params, live, machine, opened
from ublk_trio.kernel_sim import SimKernel, SimulatorViolationError
from ublk_trio.kernel_sim.checks import damage, pattern, poison
from ublk_trio.ring import pack_answer
from ublk_trio.uapi import BasicAttr, Feature, IoOp, ParamsDiscard

KIB = 1 << 10


@pytest.mark.parametrize("size", [512, 4096, 4097, 8192, 64 * KIB])
@pytest.mark.parametrize("moved", [0, 512, 4096, 5000, 64 * KIB])
def test_poison_is_found_damaged(size: int, moved: int) -> None:
    """Every byte at the buffer's edges and of the transfer is guarded; undamaged poison is not reported."""
    buffer = memoryview(bytearray(size))
    head = poison(buffer, moved)
    assert head == min(size, max(moved, 4096))
    assert damage(buffer, head) is None
    guarded = {0, min(size, max(moved, 4096)) - 1, size - 1, max(0, size - 4096)}
    for offset in guarded:
        buffer[offset] ^= 1
        assert damage(buffer, head) == offset
        buffer[offset] ^= 1
    for shift in (1, 128):
        poison(buffer, moved)
        buffer[: size - shift] = bytes(buffer[shift:])
        assert damage(buffer, head) == 0


def test_poison_grows() -> None:
    """The pattern is as long as any request, and always starts the same."""
    assert pattern(1 << 20)[:100] == pattern(100)
    assert len(pattern(1 << 20)) == 1 << 20


async def test_writing_after_the_commit_is_found() -> None:
    """A server that touches a buffer that it gave to the kernel is found at the buffer's next use."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m, depth=1) as device:
        device.disk.submit(IoOp.READ, 0, 8192)
        event = device.queue.event()
        device.queue.commit(event.tag, 8192)
        device.queue.buffer(event.tag)[5000] = 0
        kernel.check()
        device.disk.submit(IoOp.READ, 0, 512)
        device.queue.event()
        with pytest.raises(
            SimulatorViolationError, match="tag 0: touched-kernel-buffer: buffer 0 was written to at byte 5000"
        ):
            kernel.check()


async def test_a_check_tells_all_violations() -> None:
    """What `check` raises has every violation, in their order."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device:
        for tag in (77, 78):
            device.queue.ring.commit([pack_answer(COMMIT, tag)])
    with pytest.raises(SimulatorViolationError) as caught:
        kernel.check()
    assert caught.value.violations == tuple(kernel.violations)
    assert [violation.tag for violation in caught.value.violations] == [77, 78]


async def test_writing_before_the_first_request_is_found_at_the_end() -> None:
    """A fetched buffer that no request ever came to is looked at when the kernel gives it back."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device:
        device.queue.buffer(2)[0] = 0
        await m.stop()
        assert [(violation.kind, violation.tag) for violation in kernel.violations] == [("touched-kernel-buffer", 2)]
    async with machine(kernel) as m, live(m) as device:
        device.queue.buffer(1)[-1] = 0
        device.queue.ring.close()
        assert [violation.tag for violation in kernel.violations] == [2, 1]


async def test_reading_after_the_commit_gives_garbage() -> None:
    """A server that still reads a committed WRITE's buffer gets poison and not the data."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device:
        device.disk.submit(IoOp.WRITE, 0, b"d" * 16384)
        event = device.queue.event()
        assert device.queue.buffer(event.tag)[:16384] == b"d" * 16384
        device.queue.commit(event.tag, 16384)
        assert b"d" * 16 not in bytes(device.queue.buffer(event.tag)[:16384])
    kernel.check()


async def test_a_buffer_in_two_hands_is_found() -> None:
    """Two tags' commands must not name one buffer at the same time."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m, flags=Feature.NEED_GET_DATA, buffers=1) as device:
        for _ in range(2):
            device.disk.submit(IoOp.WRITE, 0, bytes(512))
        for event in device.queue.events():
            device.queue.ring.slots[event.tag] = 0
            device.queue.get_data(event.tag)
        assert [violation.kind for violation in kernel.violations] == ["shared-buffer"]


async def test_buffers_that_the_kernel_does_not_get() -> None:
    """With NEED_GET_DATA neither FETCH_REQ nor COMMIT_AND_FETCH_REQ gives a buffer away: it stays as it is, and may be written to."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, opened(m, depth=1, flags=Feature.NEED_GET_DATA) as device:
        device.queue.buffer(0)[:3] = b"abc"
        device.queue.fetch_all()
        assert bytes(device.queue.buffer(0)[:3]) == b"abc"
        assert await m.start() == 0
        for _ in range(2):
            device.disk.submit(IoOp.READ, 0, 512)
            device.queue.commit(device.queue.event().tag, 512)
            assert bytes(device.queue.buffer(0)[:3]) == b"abc"
            device.queue.buffer(0)[3] = 0
    kernel.check()


async def test_a_command_without_a_buffer_takes_none() -> None:
    """NEED_GET_DATA that names no buffer takes no other one either: the WRITE is announced again, and what is there stays."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m, depth=2, flags=Feature.NEED_GET_DATA, buffers=1) as device:
        device.queue.ring.buffers[0][:3] = b"abc"
        device.disk.submit(IoOp.WRITE, 0, bytes(512))
        tag = device.queue.event().tag
        device.queue.get_data(tag)
        # A moment later.
        assert device.queue.events() == []
        event = device.queue.event()
        assert (event.tag, event.result) == (tag, 1)
        assert bytes(device.queue.ring.buffers[0][:3]) == b"abc"
    kernel.check()


RESULTS = [
    (IoOp.READ, 1024, None),
    (IoOp.READ, 512, None),
    (IoOp.READ, 0, None),
    (IoOp.READ, -5, None),
    (IoOp.READ, 1, "ragged-read"),
    (IoOp.READ, 1023, "ragged-read"),
    (IoOp.READ, 1025, "result-too-long"),
    (IoOp.WRITE, 1024, None),
    (IoOp.WRITE, -1, None),
    (IoOp.WRITE, 0, "short-write"),
    (IoOp.WRITE, 1023, "short-write"),
    (IoOp.WRITE, 1025, "result-too-long"),
    (IoOp.DISCARD, 0, None),
    (IoOp.DISCARD, 1, None),
    (IoOp.DISCARD, -1, None),
    (IoOp.DISCARD, 1025, "result-too-long"),
    (IoOp.FLUSH, 0, None),
    (IoOp.FLUSH, 1, "result-too-long"),
]


@pytest.mark.parametrize(("op", "result", "kind"), RESULTS)
async def test_committed_results_are_looked_at(op: IoOp, result: int, kind: str | None) -> None:
    """A server commits an error, or what it has done: all of a WRITE, whole sectors of a READ, never more than was asked for."""
    kernel = SimKernel(partition_scan=False)
    discard = ParamsDiscard(discard_granularity=512, max_discard_sectors=64, max_discard_segments=1)
    params = basic_params(attrs=BasicAttr.VOLATILE_CACHE, discard=discard)
    async with machine(kernel) as m, live(m, params=params) as device:
        if op is IoOp.FLUSH:
            device.disk.submit(op)
        else:
            device.disk.submit(op, 0, bytes(1024) if op is IoOp.WRITE else 1024)
        device.queue.commit(device.queue.event().tag, result)
        assert [violation.kind for violation in kernel.violations] == ([kind] if kind else [])


@pytest.mark.parametrize(
    ("op", "result", "kind"),
    [
        (IoOp.READ, 1024, None),
        (IoOp.READ, 1, "short-read"),
        (IoOp.READ, 1023, "short-read"),
        (IoOp.READ, 0, None),
        (IoOp.READ, -5, None),
        (IoOp.DISCARD, 1, None),
    ],
)
async def test_reads_that_the_server_fills_are_whole(op: IoOp, result: int, kind: str | None) -> None:
    """Where the server moves the data nobody delivers the rest of a short READ: it is committed whole, or as an error."""
    kernel = SimKernel(partition_scan=False)
    discard = ParamsDiscard(discard_granularity=512, max_discard_sectors=64, max_discard_segments=1)
    async with machine(kernel) as m, live(m, params=basic_params(discard=discard), flags=Feature.USER_COPY) as device:
        device.disk.submit(op, 0, 1024)
        device.queue.commit(device.queue.event().tag, result)
        assert [violation.kind for violation in kernel.violations] == ([kind] if kind else [])


async def test_wrong_commits_are_named() -> None:
    """Each way to commit wrongly has its name."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m) as device:
        device.disk.submit(IoOp.READ, 0, 2048)
        tag = device.queue.event().tag
        device.queue.commit(tag, 700)
        tag = device.queue.event().tag
        device.queue.ring.commit(
            [pack_answer(COMMIT, tag, 512), pack_answer(COMMIT, tag, 512), pack_answer(COMMIT, 77)]
        )
        device.queue.ring.commit([pack_answer(GET_DATA, tag)])
    assert [violation.kind for violation in kernel.violations] == [
        "ragged-read",
        "not-owned",
        "no-such-tag",
        "not-owned",
    ]


async def test_without_paranoia_buffers_are_left_alone() -> None:
    """paranoid=False leaves content alone, as a real kernel does."""
    kernel = SimKernel(partition_scan=False, paranoid=False)
    async with machine(kernel) as m, opened(m) as device:
        device.queue.buffer(0)[:3] = b"abc"
        device.queue.fetch_all()
        await m.start()
        device.disk.submit(IoOp.READ, 0, 512)
        assert bytes(device.queue.buffer(device.queue.event().tag)[:3]) == b"abc"
    kernel.check()
