"""What a started disk's limits are, and where they cut operations."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import attrs
import pytest

from tests.sim.mini import Started, basic_params, live, machine, opened
from ublk_trio.kernel_sim import KernelVersion, SimKernel
from ublk_trio.kernel_sim.block import split
from ublk_trio.kernel_sim.block.limits import Limits, limits_of
from ublk_trio.uapi import (
    IntegrityChecksum,
    IoOp,
    Params,
    ParamsBasic,
    ParamsDiscard,
    ParamsIntegrity,
    ParamsSegment,
    ParamsZoned,
)

READ, WRITE, DISCARD, WRITE_ZEROES = IoOp.READ, IoOp.WRITE, IoOp.DISCARD, IoOp.WRITE_ZEROES
KIB, MIB = 1 << 10, 1 << 20
V7 = KernelVersion(7, 3)


def limits(version: KernelVersion = V7, **sections: object) -> Limits:
    found = limits_of(Params(**sections), version)  # type: ignore[arg-type]
    assert found is not None
    return found


@asynccontextmanager
async def answering(params: Params) -> AsyncIterator[Started]:
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, live(m, params=params, depth=64) as device:
        yield device


@asynccontextmanager
async def writing_zeroes(params: Params) -> AsyncIterator[Started]:
    """As `answering`, with buffers as large as the largest request."""
    kernel = SimKernel(partition_scan=False, paranoid=False)
    assert params.basic is not None
    async with machine(kernel) as m:
        largest = params.basic.max_sectors * 512
        async with live(m, params=params, depth=8, max_io_bytes=largest) as device:
            yield device


def places(device: Started) -> list[tuple[IoOp, int, int]]:
    return [(event.op, event.start_sector, event.nr_sectors) for event in device.queue.events()]


@pytest.mark.parametrize(
    ("version", "io_opt_shift", "io_min_shift", "expected"),
    [
        ((6, 1), 9, 9, 1280 * KIB),
        ((6, 12), 9, 9, 1280 * KIB),
        ((6, 16), 9, 9, 1280 * KIB),
        ((7, 3), 9, 9, 4 * MIB),
        ((6, 1), 23, 9, 1280 * KIB),
        ((6, 12), 23, 9, 8 * MIB),
        ((6, 12), 9, 22, 4 * MIB),
        ((7, 3), 24, 9, 16 * MIB),
    ],
)
def test_linuxs_own_cap(version: tuple[int, int], io_opt_shift: int, io_min_shift: int, expected: int) -> None:
    """However much the server takes, a request is no longer than the release's cap, or the optimal I/O size above it."""
    basic = ParamsBasic(
        dev_sectors=1 << 20, max_sectors=64 * MIB >> 9, io_opt_shift=io_opt_shift, io_min_shift=io_min_shift
    )
    assert limits(KernelVersion(*version), basic=basic).max_request == expected


def test_segments_limit_a_request() -> None:
    """With one segment a page, max_segments pages are the most; 0 means Linux's 128."""
    basic = ParamsBasic(dev_sectors=1 << 20, max_sectors=8 * MIB >> 9)
    for segments, expected in ((16, 64 * KIB), (0, 512 * KIB)):
        segment = ParamsSegment(seg_boundary_mask=4095, max_segment_size=4096, max_segments=segments)
        assert limits(basic=basic, segment=segment).max_request == expected


def test_limits_that_start_dev_refuses() -> None:
    """Integrity tuples that do not fit, intervals out of range, more open zones than active ones."""
    basic = ParamsBasic(dev_sectors=1 << 10, max_sectors=128, chunk_sectors=128, logical_bs_shift=12)
    for integrity in (
        ParamsIntegrity(metadata_size=4, interval_exp=0, csum_type=IntegrityChecksum.IP),
        ParamsIntegrity(metadata_size=8, interval_exp=8),
        ParamsIntegrity(metadata_size=8, interval_exp=13),
    ):
        assert limits_of(Params(basic=basic, integrity=integrity), V7) is None
    fitting = ParamsIntegrity(metadata_size=8, interval_exp=9)
    assert limits(basic=basic, integrity=fitting).metadata_of(4096) == 64
    zoned = ParamsZoned(max_open_zones=2, max_active_zones=1, max_zone_append_sectors=8)
    assert limits_of(Params(basic=basic, zoned=zoned), V7) is None


async def test_start_dev_refuses_them() -> None:
    """START_DEV is EINVAL, and the device can be mended and started."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, opened(m) as device:
        device.queue.fetch_all()
        sim = kernel.devices[0]
        good = sim.params
        sim.params = attrs.evolve(good, integrity=ParamsIntegrity(metadata_size=8, interval_exp=30))
        assert await m.start() == -errno.EINVAL
        assert not device.disk.exists
        sim.params = good
        assert await m.start() == 0


def test_every_cut_covers_the_whole_within_the_limits() -> None:
    """Whatever the limits: the pieces are the whole, in order, none is too long, and none crosses a chunk."""
    for shift in (9, 12):
        for chunk in (0, 24, 64):
            params = basic_params(max_sectors=24, chunk_sectors=chunk, logical_bs_shift=shift)
            found = limits(basic=params.basic)
            step = found.logical_block
            for begin in range(0, 80 * 512, step):
                for length in (step, 3 * step, 61 * 512 // step * step):
                    pieces = list(split.reads_and_writes(found, begin, length))
                    assert [offset for offset, _ in pieces] == [
                        begin + sum(piece for _, piece in pieces[:index]) for index in range(len(pieces))
                    ]
                    assert sum(piece for _, piece in pieces) == length
                    for offset, piece in pieces:
                        assert 0 < piece <= found.max_request
                        assert piece % step == 0
                        assert not chunk or offset // found.chunk == (offset + piece - 1) // found.chunk


async def test_cuts_fall_on_physical_blocks() -> None:
    """A read that begins inside a physical block is cut at the end of one."""
    params = basic_params(max_sectors=16)
    assert params.basic is not None
    for physical_shift, expected in ((12, [(3, 13), (16, 16), (32, 11)]), (9, [(3, 16), (19, 16), (35, 8)])):
        basic = attrs.evolve(params.basic, physical_bs_shift=physical_shift)
        async with answering(Params(basic=basic)) as device:
            device.disk.submit(READ, 3 * 512, 40 * 512)
            assert places(device) == [(READ, sector, sectors) for sector, sectors in expected]


async def test_discards_keep_to_their_granularity() -> None:
    """The first request ends where the granularity is met; the others are as long as the limit has whole multiples."""
    discard = ParamsDiscard(discard_granularity=4096, max_discard_sectors=20, max_discard_segments=1)
    async with answering(basic_params(discard=discard)) as device:
        device.disk.submit(DISCARD, 3 * 512, 50 * 512)
        assert places(device) == [
            (DISCARD, 3, 5),
            (DISCARD, 8, 16),
            (DISCARD, 24, 16),
            (DISCARD, 40, 13),
        ]


async def test_a_discard_within_the_limit_is_one_request() -> None:
    """It is cut where the granularity is met, and the parts are merged again: the limit alone decides."""
    discard = ParamsDiscard(discard_granularity=4096, max_discard_sectors=64, max_discard_segments=1)
    async with answering(basic_params(discard=discard)) as device:
        bio = device.disk.submit(DISCARD, 512, 8192)
        event = device.queue.event()
        assert (event.op, event.start_sector, event.nr_sectors) == (DISCARD, 1, 16)
        device.queue.commit(event.tag, 0)
        assert bio.result == 8192
        device.disk.submit(DISCARD, 512, 64 * 512)
        assert places(device) == [(DISCARD, 1, 64)]
        device.disk.submit(DISCARD, 512, 65 * 512)
        assert places(device) == [(DISCARD, 1, 7), (DISCARD, 8, 58)]


async def test_a_discard_smaller_than_the_granularity_is_sent() -> None:
    """Nothing is rounded away: the server hears of a sector in the middle of a granule."""
    discard = ParamsDiscard(discard_granularity=65536, max_discard_sectors=1024, max_discard_segments=1)
    async with answering(basic_params(discard=discard)) as device:
        device.disk.submit(DISCARD, 512, 512)
        assert places(device) == [(DISCARD, 1, 1)]


async def test_a_server_that_does_not_know_discard() -> None:
    """BLKDISCARD succeeds when the server answers EOPNOTSUPP."""
    discard = ParamsDiscard(discard_granularity=512, max_discard_sectors=64, max_discard_segments=1)
    async with answering(basic_params(discard=discard)) as device:
        bio = device.disk.submit(DISCARD, 0, 512)
        device.queue.commit(device.queue.event().tag, -errno.EOPNOTSUPP)
        assert bio.result == 512


async def test_write_zeroes_without_fallback() -> None:
    """PUNCH_HOLE: EOPNOTSUPP where zeroing is not offered, or refused; nothing is written instead."""
    async with answering(basic_params()) as device:
        bio = device.disk.submit(WRITE_ZEROES, 0, 4096, no_fallback=True)
        assert bio.result == -errno.EOPNOTSUPP
        assert places(device) == []
    async with answering(
        basic_params(discard=ParamsDiscard(discard_granularity=512, max_write_zeroes_sectors=64))
    ) as device:
        bio = device.disk.submit(WRITE_ZEROES, 0, 4096, no_fallback=True)
        device.queue.commit(device.queue.event().tag, -errno.EOPNOTSUPP)
        assert bio.result == -errno.EOPNOTSUPP
        assert places(device) == []


async def test_write_zeroes_is_cut_at_its_own_limit() -> None:
    """Where it begins inside a physical block each piece of its limit's length is cut in two."""
    discard = ParamsDiscard(discard_granularity=512, max_write_zeroes_sectors=16)
    async with answering(basic_params(discard=discard)) as device:
        device.disk.submit(WRITE_ZEROES, 4 * 512, 32 * 512)
        assert places(device) == [(WRITE_ZEROES, sector, n) for sector, n in ((4, 12), (16, 4), (20, 12), (32, 4))]


async def test_zeroes_are_written_a_mebibyte_at_a_time() -> None:
    """Without an offer each MiB from the beginning is a bio; its last request may be merged with the next bio."""
    params = basic_params(size=4 * MIB, max_sectors=1536)
    found = limits(basic=params.basic)
    assert list(split.zero_pages(found, 0, 2 * MIB)) == [
        (0, 768 * KIB, True),
        (768 * KIB, 256 * KIB, False),
        (1024 * KIB, 768 * KIB, True),
        (1792 * KIB, 256 * KIB, False),
    ]
    async with writing_zeroes(params) as device:
        device.disk.submit(WRITE_ZEROES, 0, 2 * MIB + 512)
        # The rest of 512 bytes is merged with the end of the second bio: what is cut off a bio is merged with nothing.
        sectors = [0, 1536, 2048, 3584, 4097]
        assert places(device) == [(WRITE, begin, end - begin) for begin, end in pairwise(sectors)]


@pytest.mark.parametrize(
    ("max_mib", "length_mib", "requests"), [(2, 5, [2, 2, 1]), (4, 4, [4]), (1, 2, [1, 1]), (3, 4, [3, 1])]
)
async def test_zeroes_of_one_call_are_merged(max_mib: int, length_mib: int, requests: list[int]) -> None:
    """The bios of a BLKZEROOUT become one request again, up to the largest."""
    async with writing_zeroes(basic_params(size=8 * MIB, max_sectors=max_mib * MIB // 512)) as device:
        bio = device.disk.submit(WRITE_ZEROES, 0, length_mib * MIB)
        events = device.queue.events()
        assert [event.length // MIB for event in events] == requests
        for event in events:
            assert event.op is WRITE
            assert not any(device.queue.buffer(event.tag))
            device.queue.commit(event.tag, event.length)
        assert bio.result == length_mib * MIB
