"""Plugging and merging: what a server sees of adjacent operations."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.sim.mini import Started, basic_params, live, machine
from ublk_trio.kernel_sim import Choices, DrawnChoices, SimKernel
from ublk_trio.uapi import BasicAttr, IoOp, Params, ParamsDiscard

READ, WRITE, DISCARD = IoOp.READ, IoOp.WRITE, IoOp.DISCARD
SECTOR = 512
RANGES = ParamsDiscard(discard_granularity=512, max_discard_sectors=64, max_discard_segments=1)


@asynccontextmanager
async def answering(
    params: Params | None = None, *, depth: int = 4, choices: Choices | None = None, version: tuple[int, int] = (7, 3)
) -> AsyncIterator[Started]:
    kernel = SimKernel(choices, version=version, partition_scan=False)
    async with machine(kernel) as m, live(m, params=params, depth=depth) as device:
        yield device


def places(device: Started) -> list[tuple[IoOp, int, int]]:
    return [(event.op, event.start_sector, event.nr_sectors) for event in device.queue.events()]


async def test_adjacent_operations_in_a_plug_are_one_request() -> None:
    """Back and front merges; the application of each gets its own data and its own end."""
    async with answering() as device:
        with device.disk.plugged():
            second = device.disk.submit(READ, 8 * SECTOR, 8 * SECTOR)
            third = device.disk.submit(READ, 16 * SECTOR, 8 * SECTOR)
            first = device.disk.submit(READ, 0, 8 * SECTOR)
            assert device.queue.events() == []
        event = device.queue.event()
        assert (event.op, event.start_sector, event.nr_sectors) == (READ, 0, 24)
        data = b"".join(bytes([number]) * 8 * SECTOR for number in (1, 2, 3))
        device.queue.buffer(event.tag)[: len(data)] = data
        device.queue.commit(event.tag, len(data))
        for number, bio in enumerate((first, second, third), 1):
            assert bio.result == 8 * SECTOR
            assert bytes(bio.data) == bytes([number]) * 8 * SECTOR


async def test_merged_writes_carry_their_data_in_order() -> None:
    """What the server gets of a merged WRITE is the data of its parts, by place on the disk."""
    async with answering() as device:
        with device.disk.plugged():
            device.disk.submit(WRITE, SECTOR, b"b" * SECTOR)
            device.disk.submit(WRITE, 0, b"a" * SECTOR)
        event = device.queue.event()
        assert bytes(device.queue.buffer(event.tag)[: 2 * SECTOR]) == b"a" * SECTOR + b"b" * SECTOR
        device.queue.commit(event.tag, 2 * SECTOR)


@pytest.mark.parametrize("done", [1, 8, 9, 16, 23])
async def test_a_short_read_ends_the_parts_that_are_whole(done: int) -> None:
    """After a short answer the applications whose bytes have come have their result; the rest is delivered again."""
    async with answering() as device:
        with device.disk.plugged():
            bios = [device.disk.submit(READ, index * 8 * SECTOR, 8 * SECTOR) for index in range(3)]
        event = device.queue.event()
        device.queue.buffer(event.tag)[: done * SECTOR] = b"1" * done * SECTOR
        device.queue.commit(event.tag, done * SECTOR)
        assert [bio.done for bio in bios] == [done >= 8 * (index + 1) for index in range(3)]
        rest = device.queue.event()
        assert (rest.start_sector, rest.nr_sectors) == (done, 24 - done)
        device.queue.buffer(rest.tag)[: rest.length] = b"2" * rest.length
        device.queue.commit(rest.tag, rest.length)
        assert [bio.result for bio in bios] == [8 * SECTOR] * 3
        assert b"".join(bio.data for bio in bios) == b"1" * done * SECTOR + b"2" * (24 - done) * SECTOR


async def test_an_error_fails_all_parts() -> None:
    """Every application of a merged request gets the request's error."""
    async with answering() as device:
        with device.disk.plugged():
            bios = [device.disk.submit(READ, index * SECTOR, SECTOR) for index in range(3)]
        device.queue.commit(device.queue.event().tag, -errno.ENOSPC)
        assert [bio.result for bio in bios] == [-errno.ENOSPC] * 3


async def test_the_rest_of_a_merged_short_write_comes_again_on_old_kernels() -> None:
    """To 7.1: the parts that are whole have ended, the rest has its own data."""
    async with answering(version=(7, 1)) as device:
        with device.disk.plugged():
            bios = [device.disk.submit(WRITE, index * SECTOR, bytes([65 + index]) * SECTOR) for index in range(3)]
        device.queue.commit(device.queue.event().tag, SECTOR)
        assert [bio.done for bio in bios] == [True, False, False]
        rest = device.queue.event()
        assert (rest.start_sector, rest.nr_sectors) == (1, 2)
        assert bytes(device.queue.buffer(rest.tag)[: 2 * SECTOR]) == b"B" * SECTOR + b"C" * SECTOR
        device.queue.commit(rest.tag, 2 * SECTOR)
        assert all(bio.done for bio in bios)


@pytest.mark.parametrize(
    ("params", "first", "second"),
    [
        (basic_params(), (READ, 0, 8), (READ, 16, 8)),  # a gap
        (basic_params(), (READ, 0, 8), (WRITE, 8, 8)),  # another operation
        (basic_params(max_sectors=15), (READ, 0, 8), (READ, 8, 8)),  # too long
        (basic_params(chunk_sectors=8), (READ, 0, 8), (READ, 8, 8)),  # across a chunk
        (basic_params(discard=RANGES), (DISCARD, 0, 40), (DISCARD, 40, 40)),  # too long a discard
    ],
)
async def test_what_is_not_merged(params: Params, first: tuple[IoOp, int, int], second: tuple[IoOp, int, int]) -> None:
    """Two requests stay two where one would break a limit, or where they do not touch."""
    async with answering(params) as device:
        with device.disk.plugged():
            for op, sector, sectors in (first, second):
                device.disk.submit(op, sector * SECTOR, bytes(sectors * SECTOR) if op is WRITE else sectors * SECTOR)
        assert places(device) == [first, second]


async def test_discards_are_merged() -> None:
    """Adjacent discards are one, up to their limit."""
    async with answering(basic_params(discard=RANGES)) as device:
        with device.disk.plugged():
            device.disk.submit(DISCARD, 0, 8 * SECTOR)
            device.disk.submit(DISCARD, 8 * SECTOR, 8 * SECTOR)
        assert places(device) == [(DISCARD, 0, 16)]


async def test_fua_writes_are_not_merged() -> None:
    """A write with FUA is a request of its own."""
    async with answering(basic_params(attrs=BasicAttr.VOLATILE_CACHE | BasicAttr.FUA)) as device:
        with device.disk.plugged():
            device.disk.submit(WRITE, 0, bytes(SECTOR))
            device.disk.submit(WRITE, SECTOR, bytes(SECTOR), fua=True)
        assert places(device) == [(WRITE, 0, 1), (WRITE, 1, 1)]


async def test_a_full_plug_lets_go() -> None:
    """After 32 requests, and after one of 128 KiB, a plug holds back no longer."""
    async with answering(depth=64) as device:
        with device.disk.plugged():
            for index in range(32):
                device.disk.submit(READ, index * 2 * SECTOR, SECTOR)
            assert device.queue.events() == []
            device.disk.submit(READ, 100 * SECTOR, SECTOR)
            assert len(device.queue.events()) == 32
        assert places(device) == [(READ, 100, 1)]
    async with answering(basic_params(max_sectors=128)) as device:
        with device.disk.plugged():
            device.disk.submit(READ, 0, 64 << 10)
            device.disk.submit(READ, 64 << 10, 64 << 10)
        assert places(device) == [(READ, 0, 128), (READ, 128, 128)]


async def test_who_waits_lets_go() -> None:
    """Waiting for an operation sends what is held back: nobody waits for ever."""
    async with answering() as device, trio.open_nursery() as nursery:
        with device.disk.plugged():
            bio = device.disk.submit(READ, 0, SECTOR)
            nursery.start_soon(bio.wait)
            await wait_all_tasks_blocked()
            device.queue.commit(device.queue.event().tag, SECTOR)
        assert bio.result == SECTOR


@pytest.mark.parametrize("merge", [0, 1])
async def test_waiting_operations_may_be_merged(merge: int) -> None:
    """Where Choices say so, two that wait for a tag become one request; a calm machine leaves them two."""
    choices = DrawnChoices(lambda what, options: merge if what == "merge-waiting" else 0)
    async with answering(depth=1, choices=choices) as device:
        device.disk.submit(READ, 0, SECTOR)
        bios = [device.disk.submit(READ, sector * SECTOR, SECTOR) for sector in (8, 9)]
        device.queue.commit(device.queue.event().tag, SECTOR)
        event = device.queue.event()
        assert (event.start_sector, event.nr_sectors) == (8, 2 if merge else 1)
        device.queue.commit(event.tag, event.length)
        assert [bio.done for bio in bios] == [True, bool(merge)]
