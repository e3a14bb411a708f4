"""Integrity metadata: it travels with the data, is split and merged with it, and marks the request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs

from tests.sim.mini import Started, basic_params, machine, opened
from ublk_trio.kernel_sim import SimKernel
from ublk_trio.kernel_sim.block import Request
from ublk_trio.uapi import IoFlag, IoOp, Params, ParamsIntegrity

READ, WRITE = IoOp.READ, IoOp.WRITE
PARAMS = attrs.evolve(basic_params(max_sectors=8), integrity=ParamsIntegrity(metadata_size=4, interval_exp=9))


@asynccontextmanager
async def answering(params: Params = PARAMS) -> AsyncIterator[Started]:
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, opened(m) as device:
        kernel.devices[0].params = params
        device.queue.fetch_all()
        assert await m.start() == 0
        yield device


def request_on(device: Started, tag: int) -> Request:
    request = device.machine.kernel.devices[0].queues[0].tags[tag].request
    assert request is not None
    return request


async def test_metadata_is_split_with_the_data() -> None:
    """Each request carries the metadata of its own blocks, and says so."""
    async with answering() as device:
        metadata = b"".join(number.to_bytes(4, "big") for number in range(20))
        device.disk.submit(WRITE, 0, bytes(20 * 512), metadata=metadata)
        for event in device.queue.events():
            assert event.op_flags & IoFlag.INTEGRITY
            begin = event.start_sector * 4
            found = request_on(device, event.tag).metadata
            assert found is not None
            assert bytes(found) == metadata[begin : begin + event.nr_sectors * 4]


async def test_every_read_and_write_has_some() -> None:
    """An application that gives none gets a buffer of zeroes; what the server puts there can be read."""
    async with answering() as device:
        bio = device.disk.submit(READ, 0, 2 * 512)
        event = device.queue.event()
        assert event.op_flags & IoFlag.INTEGRITY
        found = request_on(device, event.tag).metadata
        assert found is not None
        found[:] = b"12345678"
        device.queue.commit(event.tag, event.length)
        assert bio.metadata is not None
        assert bytes(bio.metadata) == b"12345678"


async def test_the_rest_of_a_short_read_has_the_rest_of_the_metadata() -> None:
    """It advances with the data."""
    async with answering() as device:
        bio = device.disk.submit(READ, 0, 4 * 512)
        event = device.queue.event()
        device.queue.commit(event.tag, 512)
        rest = device.queue.event()
        found = request_on(device, rest.tag).metadata
        assert found is not None
        found[:] = b"abcdefghijkl"
        device.queue.commit(rest.tag, rest.length)
        assert bio.metadata is not None
        assert bytes(bio.metadata) == b"\0\0\0\0abcdefghijkl"


async def test_merged_requests_share_it_out() -> None:
    """Each part of a merged read gets the metadata of its own blocks."""
    async with answering() as device:
        with device.disk.plugged():
            bios = [device.disk.submit(READ, index * 512, 512) for index in range(2)]
        event = device.queue.event()
        assert event.nr_sectors == 2
        found = request_on(device, event.tag).metadata
        assert found is not None
        found[:] = b"AAAABBBB"
        device.queue.commit(event.tag, event.length)
        assert [bytes(bio.metadata or b"") for bio in bios] == [b"AAAA", b"BBBB"]


async def test_without_integrity_there_is_none() -> None:
    """A disk without an integrity profile delivers no metadata and no flag."""
    async with answering(basic_params()) as device:
        device.disk.submit(WRITE, 0, bytes(512))
        event = device.queue.event()
        assert not event.op_flags & IoFlag.INTEGRITY
        assert request_on(device, event.tag).metadata is None
