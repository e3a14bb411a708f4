"""Zoned disks: the report at START_DEV, managing zones, appending, and writes one at a time.

The data of a zoned device does not go through its buffers; here the test moves it, as a server does with pread and pwrite.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.sim.mini import Started, basic_params, machine, opened
from ublk_trio.kernel_sim import SimKernel
from ublk_trio.uapi import BlkZone, IoOp, Params, ParamsZoned, ZoneCondition, ZoneType

READ, WRITE, APPEND, REPORT = IoOp.READ, IoOp.WRITE, IoOp.ZONE_APPEND, IoOp.REPORT_ZONES
OPEN, CLOSE, FINISH, RESET, RESET_ALL = (
    IoOp.ZONE_OPEN,
    IoOp.ZONE_CLOSE,
    IoOp.ZONE_FINISH,
    IoOp.ZONE_RESET,
    IoOp.ZONE_RESET_ALL,
)
ZONE = 64
ZONE_BYTES = ZONE * 512


def zoned_params(*, zones: int = 4, max_sectors: int = 128) -> Params:
    basic = basic_params(size=zones * ZONE_BYTES, chunk_sectors=ZONE, max_sectors=max_sectors).basic
    return Params(basic=basic, zoned=ParamsZoned(max_open_zones=2, max_active_zones=2, max_zone_append_sectors=16))


def zone(number: int, *, kind: ZoneType = ZoneType.SEQWRITE_REQ, length: int = ZONE) -> BlkZone:
    start = number * ZONE
    return BlkZone(start=start, len=length, wp=start, type=kind, cond=ZoneCondition.EMPTY, capacity=length)


def answer_report(device: Started, zones: list[BlkZone]) -> tuple[int, int]:
    """Answer the REPORT_ZONES that is ready with those of its zones that there are; its sector and number of zones."""
    event = device.queue.event()
    assert event.op is REPORT
    request = device.machine.kernel.devices[0].queues[0].tags[event.tag].request
    assert request is not None
    wanted = [zone for zone in zones if zone.start >= event.start_sector][: event.nr_sectors]
    for index, entry in enumerate(wanted):
        request.view[64 * index : 64 * index + 64] = entry.pack()
    device.queue.commit(event.tag, 64 * len(wanted))
    return event.start_sector, event.nr_sectors


@asynccontextmanager
async def answering(
    zones: list[BlkZone] | None = None, params: Params | None = None, *, start_result: int = 0
) -> AsyncIterator[Started]:
    """A zoned device of which the test is the server."""
    kernel = SimKernel(partition_scan=False)
    params = params if params is not None else zoned_params()
    zones = zones if zones is not None else [zone(number) for number in range(4)]
    results = []
    async with machine(kernel) as m, opened(m, depth=8) as device:
        # The device itself is not made zoned: that needs one of the modes in which the server moves the data.
        kernel.devices[0].params = params
        device.queue.fetch_all()

        async def start() -> None:
            results.append(await m.start())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(start)
            await wait_all_tasks_blocked()
            while not results:
                answer_report(device, zones)
                await wait_all_tasks_blocked()
        assert results == [start_result]
        yield device


async def test_start_asks_for_all_zones() -> None:
    """Before the disk appears every zone was reported, in requests of as many as the largest request has room for."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, opened(m) as device, trio.open_nursery() as nursery:
        kernel.devices[0].params = zoned_params(zones=150, max_sectors=8)
        device.queue.fetch_all()
        nursery.start_soon(m.start)
        await wait_all_tasks_blocked()
        zones = [zone(number) for number in range(150)]
        asked = [answer_report(device, zones) for _ in range(3)]
        assert asked == [(0, 64), (64 * ZONE, 64), (128 * ZONE, 22)]


@pytest.mark.parametrize(
    "zones",
    [
        [zone(0), zone(2), zone(3), zone(4)],  # a gap
        [zone(0), zone(1, length=32), zone(2), zone(3)],  # a short one in the middle
        [zone(1), zone(2), zone(3), zone(4)],
    ],
)
async def test_a_wrong_report_is_no_disk(zones: list[BlkZone]) -> None:
    """START_DEV fails with ENODEV when the zones are not the disk."""
    async with answering(zones, start_result=-errno.ENODEV) as device:
        assert not device.disk.exists


async def test_a_refused_report_is_no_disk() -> None:
    """START_DEV fails with the server's error."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, opened(m) as device, trio.open_nursery() as nursery:
        kernel.devices[0].params = zoned_params()
        device.queue.fetch_all()
        nursery.start_soon(m.start)
        await wait_all_tasks_blocked()
        device.queue.commit(device.queue.event().tag, -errno.ENOSPC)
        await wait_all_tasks_blocked()
        assert not device.disk.exists


async def test_managing_zones() -> None:
    """One request a zone, without length; the last zone may be asked for up to the disk's end."""
    async with answering() as device:
        for op in (OPEN, CLOSE, FINISH, RESET):
            bio = device.disk.submit(op, ZONE_BYTES, 2 * ZONE_BYTES)
            events = device.queue.events()
            assert [(e.op, e.start_sector, e.nr_sectors) for e in events] == [(op, ZONE, 0), (op, 2 * ZONE, 0)]
            for event in events:
                assert not bio.done
                device.queue.commit(event.tag, 0)
            assert bio.result == 2 * ZONE_BYTES


async def test_resetting_the_whole_disk_is_one_request() -> None:
    """RESET_ALL; the other operations go zone by zone even then."""
    async with answering() as device:
        device.disk.submit(RESET, 0, 4 * ZONE_BYTES)
        event = device.queue.event()
        assert (event.op, event.start_sector, event.nr_sectors) == (RESET_ALL, 0, 0)
        device.disk.submit(FINISH, 0, 4 * ZONE_BYTES)
        assert [event.op for event in device.queue.events()] == [FINISH] * 4


async def test_what_is_refused() -> None:
    """Ranges that are no zones are EINVAL, conventional zones EIO, disks without zones ENOTTY."""
    kinds = [ZoneType.CONVENTIONAL, *[ZoneType.SEQWRITE_REQ] * 3]
    async with answering([zone(number, kind=kind) for number, kind in enumerate(kinds)]) as device:
        for offset, length in ((512, ZONE_BYTES), (0, 512), (0, 0), (0, 5 * ZONE_BYTES), (-ZONE_BYTES, ZONE_BYTES)):
            assert device.disk.submit(RESET, offset, length).result == -errno.EINVAL
        assert device.disk.submit(OPEN, 0, ZONE_BYTES).result == -errno.EIO
        assert device.disk.submit(APPEND, 0, bytes(512)).result == -errno.EIO
        assert device.disk.submit(APPEND, ZONE_BYTES + 512, bytes(512)).result == -errno.EIO
        assert device.disk.submit(APPEND, ZONE_BYTES, bytes(17 * 512)).result == -errno.EIO
        assert device.queue.events() == []
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, opened(m) as device:
        device.queue.fetch_all()
        assert await m.start() == 0
        assert device.disk.submit(RESET, 0, ZONE_BYTES).result == -errno.ENOTTY
        assert device.disk.submit(APPEND, 0, bytes(512)).result == -errno.EOPNOTSUPP
        with pytest.raises(OSError, check=lambda error: error.errno == errno.ENOTTY):
            await device.disk.report_zones()


async def test_append_says_where() -> None:
    """An append is never split, and its result is the place that the server chose."""
    async with answering() as device:
        places = []

        async def append() -> None:
            places.append(await device.disk.append(ZONE_BYTES, bytes(16 * 512)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(append)
            await wait_all_tasks_blocked()
            event = device.queue.event()
            assert (event.op, event.start_sector, event.nr_sectors) == (APPEND, ZONE, 16)
            request = device.machine.kernel.devices[0].queues[0].tags[event.tag].request
            assert request is not None
            request.start_sector = ZONE + 24
            device.queue.commit(event.tag, event.length)
        assert places == [(ZONE + 24) * 512]


async def test_one_write_to_a_zone_at_a_time() -> None:
    """Writes to one sequential zone go out one after the other, in order; other zones and reads do not wait."""
    kinds = [ZoneType.CONVENTIONAL, *[ZoneType.SEQWRITE_REQ] * 3]
    async with answering([zone(number, kind=kind) for number, kind in enumerate(kinds)]) as device:
        for place in (ZONE, ZONE + 1, ZONE + 2, 2 * ZONE, 0, 1):
            device.disk.submit(WRITE, place * 512, bytes(512))
        device.disk.submit(READ, ZONE * 512, 512)
        first, *others = device.queue.events()
        assert [(event.op, event.start_sector) for event in (first, *others)] == [
            (WRITE, ZONE),
            (WRITE, 2 * ZONE),
            (WRITE, 0),
            (WRITE, 1),
            (READ, ZONE),
        ]
        device.queue.commit(first.tag, 512)
        second = device.queue.event()
        assert second.start_sector == ZONE + 1
        device.queue.commit(second.tag, -errno.EIO)
        assert device.queue.event().start_sector == ZONE + 2


@pytest.mark.parametrize("op", [WRITE, IoOp.WRITE_ZEROES])
async def test_what_is_held_back_goes_to_a_zone_one_at_a_time(op: IoOp) -> None:
    """A plug changes nothing, neither an application's nor that of the zeroes of one call."""
    async with answering(params=zoned_params(max_sectors=16)) as device:
        with device.disk.plugged():
            what = 32 * 512 if op is IoOp.WRITE_ZEROES else bytes(32 * 512)
            bio = device.disk.submit(op, 0, what)
        for sector in (0, 16):
            event = device.queue.event()
            assert (event.op, event.start_sector, event.nr_sectors) == (WRITE, sector, 16)
            device.queue.commit(event.tag, event.length)
        assert bio.result == 32 * 512


async def test_reporting_to_an_application() -> None:
    """BLKREPORTZONE gets the server's own words, from the zone of the sector on."""
    zones = [attrs.evolve(zone(number), wp=number * ZONE + number) for number in range(4)]
    async with answering(zones) as device:
        reported: list[list[BlkZone]] = []

        async def report() -> None:
            reported.append(await device.disk.report_zones(ZONE, 2))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(report)
            await wait_all_tasks_blocked()
            assert answer_report(device, zones) == (ZONE, 2)
        assert reported == [zones[1:3]]
        assert await device.disk.report_zones(4 * ZONE) == []
