"""The flush machinery: which FLUSHes a server sees, when, on which tag, and whom they serve."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.sim.mini import Started, basic_params, live, machine
from ublk_trio.kernel_sim import SimKernel
from ublk_trio.kernel_sim.linux_errno import number
from ublk_trio.uapi import BasicAttr, IoFlag, IoOp

READ, WRITE, FLUSH = IoOp.READ, IoOp.WRITE, IoOp.FLUSH
CACHE = BasicAttr.VOLATILE_CACHE
CACHE_AND_FUA = BasicAttr.VOLATILE_CACHE | BasicAttr.FUA
BLOCK = bytes(512)


@asynccontextmanager
async def answering(attrs: BasicAttr, *, depth: int = 4, max_sectors: int = 128) -> AsyncIterator[Started]:
    kernel = SimKernel(partition_scan=False)
    params = basic_params(attrs=attrs, max_sectors=max_sectors)
    async with machine(kernel) as m, live(m, params=params, depth=depth) as device:
        yield device
    kernel.check()


async def test_one_flush_serves_all_that_came_meanwhile() -> None:
    """The first flush goes out; all that come while it is on its way wait for one more, not one each."""
    async with answering(CACHE) as device:
        bios = [device.disk.submit(FLUSH) for _ in range(4)]
        first = device.queue.event()
        device.queue.commit(first.tag, 0)
        assert [bio.done for bio in bios] == [True, False, False, False]
        second = device.queue.event()
        assert second.op is FLUSH
        device.queue.commit(second.tag, 0)
        assert [bio.result for bio in bios] == [0] * 4
        assert device.queue.events() == []


async def test_waiting_for_a_flush_takes_a_tag() -> None:
    """A flush that waits for another keeps a tag meanwhile: on a queue of depth 2 a third operation must wait."""
    async with answering(CACHE, depth=2) as device:
        for _ in range(2):
            device.disk.submit(FLUSH)
        read = device.disk.submit(READ, 0, 512)
        first = device.queue.event()
        assert first.op is FLUSH
        device.queue.commit(first.tag, 0)
        flush, data = sorted(device.queue.events(), key=lambda event: event.op, reverse=True)
        assert (flush.op, data.op) == (FLUSH, READ)
        assert flush.tag != data.tag
        device.queue.commit(data.tag, 512)
        assert read.done


async def test_a_failed_flush_fails_all_that_it_serves() -> None:
    """Its error goes to each, and the next FLUSH starts afresh."""
    async with answering(CACHE) as device:
        bios = [device.disk.submit(FLUSH) for _ in range(3)]
        device.queue.commit(device.queue.event().tag, 0)
        device.queue.commit(device.queue.event().tag, -errno.EIO)
        assert [bio.result for bio in bios] == [0, -errno.EIO, -errno.EIO]
        again = device.disk.submit(FLUSH)
        device.queue.commit(device.queue.event().tag, 0)
        assert again.result == 0


async def test_a_server_that_does_not_know_flush() -> None:
    """fsync succeeds when the server answers FLUSH with EOPNOTSUPP."""
    async with answering(CACHE) as device:
        bio = device.disk.submit(FLUSH)
        device.queue.commit(device.queue.event().tag, -number("EOPNOTSUPP"))
        assert bio.result == 0


@pytest.mark.parametrize("attrs", [CACHE, CACHE_AND_FUA])
@pytest.mark.parametrize("preflush", [False, True])
@pytest.mark.parametrize("fua", [False, True])
async def test_the_steps_of_a_write(attrs: BasicAttr, preflush: bool, fua: bool) -> None:
    """A flush before for preflush, FUA as a flag where the disk has it and as a flush after where not, all on one tag."""
    async with answering(attrs) as device:
        bio = device.disk.submit(WRITE, 0, BLOCK, fua=fua, preflush=preflush)
        seen = []
        while not bio.done:
            event = device.queue.event()
            seen.append((event.tag, event.op, bool(event.op_flags & IoFlag.FUA)))
            device.queue.commit(event.tag, event.length)
        native = bool(attrs & BasicAttr.FUA)
        expected = [(FLUSH, False)] * preflush + [(WRITE, fua and native)] + [(FLUSH, False)] * (fua and not native)
        assert [(op, flag) for _, op, flag in seen] == expected
        assert len({tag for tag, _, _ in seen}) == 1
        assert bio.result == 512


async def test_one_flush_follows_all_parts_of_a_long_write() -> None:
    """Without FUA of its own the disk is flushed once, after the last part's data: not while any is being written."""
    async with answering(CACHE, max_sectors=8) as device:
        bio = device.disk.submit(WRITE, 0, bytes(3 * 4096), fua=True)
        events = device.queue.events()
        assert [event.op for event in events] == [WRITE] * 3
        for event in events:
            assert device.queue.events() == []
            device.queue.commit(event.tag, event.length)
        flush = device.queue.event()
        assert flush.op is FLUSH
        device.queue.commit(flush.tag, 0)
        assert bio.result == 3 * 4096


async def test_a_flush_waits_for_data_of_sequences_but_not_for_ever() -> None:
    """It waits while such data is written; once it has waited for five seconds the next event sends it all the same."""
    async with answering(CACHE) as device:
        slow = device.disk.submit(WRITE, 0, BLOCK, fua=True)
        write = device.queue.event()
        flush = device.disk.submit(FLUSH)
        assert device.queue.events() == []
        device.machine.kernel.let_time_pass(5)
        assert device.queue.events() == []
        device.disk.submit(FLUSH)
        event = device.queue.event()
        assert event.op is FLUSH
        device.queue.commit(event.tag, 0)
        assert flush.done
        assert not slow.done
        device.queue.commit(write.tag, 512)
        device.queue.commit(device.queue.event().tag, 0)
        assert slow.done


async def test_a_plain_write_needs_no_flush_and_waits_for_none() -> None:
    """Writes without FUA go past the machinery."""
    async with answering(CACHE) as device:
        device.disk.submit(FLUSH)
        device.disk.submit(WRITE, 0, BLOCK)
        assert sorted(event.op for event in device.queue.events()) == [WRITE, FLUSH]


@pytest.mark.parametrize("result", [-errno.EIO, 512])
async def test_a_failed_preflush_writes_nothing(result: int) -> None:
    """After a failed preflush the data is not written, and the tag is free again."""
    async with answering(CACHE, depth=1) as device:
        bio = device.disk.submit(WRITE, 0, BLOCK, preflush=True)
        device.queue.commit(device.queue.event().tag, min(result, 0))
        if result < 0:
            assert bio.result == result
        else:
            device.queue.commit(device.queue.event().tag, result)
            assert bio.result == 512
        device.disk.submit(READ, 0, 512)
        assert device.queue.event().op is READ


async def test_the_servers_death_ends_every_sequence() -> None:
    """Without recovery all that waits for a flush, in whichever list, fails with EIO and leaves nothing."""
    async with answering(CACHE, depth=8) as device:
        bios = [device.disk.submit(FLUSH) for _ in range(3)]
        bios += [device.disk.submit(WRITE, 0, BLOCK, fua=True, preflush=preflush) for preflush in (False, True)]
        device.queue.events()
        device.machine.kernel.crash_server(0)
        assert [bio.result for bio in bios] == [-errno.EIO] * 5
        assert not [left for left in device.machine.kernel.leftovers() if "unfinished" in left]
