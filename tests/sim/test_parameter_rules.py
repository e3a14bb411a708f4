"""What a device's parameters may be, and how SET_PARAMS and GET_PARAMS treat the driver's structure."""

from __future__ import annotations

import errno
from typing import Any

import attrs
import pytest

from tests.sim.mini import Machine, basic_params, machine, opened
from ublk_trio.kernel_sim import KernelVersion, SimKernel
from ublk_trio.kernel_sim.params import is_valid, structure_size
from ublk_trio.uapi import (
    ControlCommand,
    DevInfo,
    Feature,
    IntegrityCap,
    IntegrityChecksum,
    Params,
    ParamsDiscard,
    ParamsDmaAlign,
    ParamsIntegrity,
    ParamsSegment,
    ParamsZoned,
    ParamType,
)

ZONED_DEVICE = Feature.ZONED | Feature.USER_COPY
INTEGRITY_DEVICE = Feature.INTEGRITY | Feature.USER_COPY
BASIC = basic_params().basic
assert BASIC is not None
DISCARD = ParamsDiscard(discard_granularity=512, max_discard_sectors=8, max_discard_segments=1)
#: Sixteen zones of 64 KiB.
ZONED_BASIC = attrs.evolve(BASIC, chunk_sectors=128)
ZONED = ParamsZoned(max_zone_append_sectors=8, max_open_zones=2, max_active_zones=4)
INTEGRITY = ParamsIntegrity(interval_exp=9, metadata_size=8, csum_type=IntegrityChecksum.CRC16_T10DIF)
SEGMENT = ParamsSegment(seg_boundary_mask=4095, max_segment_size=4096, max_segments=1)


def valid(params: Params, *, flags: Feature = Feature(0), version: tuple[int, int] = (7, 3)) -> bool:  # noqa: B008
    info = DevInfo(dev_id=0, nr_hw_queues=1, queue_depth=1, max_io_buf_bytes=65536, flags=flags)
    kernel = KernelVersion.of(version)
    return is_valid(params.pack()[: structure_size(kernel)], info, version=kernel, page_size=4096)


def test_structures_grew() -> None:
    """Each release's structure ends with the last section that it knows, at a multiple of 8."""
    sizes = [structure_size(KernelVersion(*release)) for release in ((6, 0), (6, 3), (6, 6), (6, 12), (6, 15), (7, 3))]
    assert sizes == [64, 80, 112, 112, 136, 152]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"logical_bs_shift": 12, "physical_bs_shift": 12}, True),
        ({"logical_bs_shift": 8}, False),
        ({"logical_bs_shift": 13, "physical_bs_shift": 13}, False),
        ({"logical_bs_shift": 12, "physical_bs_shift": 11}, False),
        ({"physical_bs_shift": 28, "io_opt_shift": 28, "io_min_shift": 28}, True),
        ({"physical_bs_shift": 29}, False),
        ({"io_opt_shift": 29}, False),
        ({"io_min_shift": 29}, False),
        ({"max_sectors": 128}, True),
        ({"max_sectors": 129}, False),
        ({"max_sectors": 8}, True),
        ({"max_sectors": 7}, False),
        ({"dev_sectors": 0}, True),
        ({"chunk_sectors": 3}, True),
    ],
)
def test_basic(change: dict[str, Any], expected: bool) -> None:
    """Block sizes, and what a request may carry."""
    assert BASIC is not None
    assert valid(Params(basic=attrs.evolve(BASIC, **change))) is expected


def test_large_shifts_were_accepted() -> None:
    """6.12 looks at the logical block size only."""
    assert BASIC is not None
    large = attrs.evolve(BASIC, physical_bs_shift=29, io_opt_shift=30, io_min_shift=30)
    assert valid(Params(basic=large), version=(6, 12))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"discard_granularity": 0}, False),
        ({"max_discard_segments": 2}, False),
        ({"max_discard_segments": 0}, False),
        ({"max_discard_sectors": 0, "max_discard_segments": 0}, True),
        # The granularity counts even where nothing can be discarded.
        ({"max_discard_sectors": 0, "max_discard_segments": 0, "discard_granularity": 0}, False),
    ],
)
def test_discard(change: dict[str, Any], expected: bool) -> None:
    """One segment, and a granularity."""
    params = Params(basic=BASIC, discard=attrs.evolve(DISCARD, **change))
    assert valid(params) is valid(params, version=(6, 12)) is expected


@pytest.mark.parametrize(
    ("basic", "zoned", "expected"),
    [
        ({}, {}, True),
        ({}, {"max_open_zones": 16, "max_active_zones": 16}, True),
        ({}, {"max_open_zones": 17}, False),
        ({}, {"max_active_zones": 17}, False),
        ({}, {"max_zone_append_sectors": 0}, False),
        ({"chunk_sectors": 0}, {}, False),
        ({"chunk_sectors": 96}, {}, False),
    ],
)
def test_zoned(basic: dict[str, Any], zoned: dict[str, Any], expected: bool) -> None:
    """Zones of a power of two sectors, and no more open ones than there are."""
    params = Params(basic=attrs.evolve(ZONED_BASIC, **basic), zoned=attrs.evolve(ZONED, **zoned))
    assert valid(params, flags=ZONED_DEVICE) is expected


def test_zoned_goes_with_its_flag() -> None:
    """The parameters and the feature come together, or neither does."""
    assert not valid(Params(basic=ZONED_BASIC, zoned=ZONED))
    assert not valid(Params(basic=ZONED_BASIC), flags=ZONED_DEVICE)


def test_odd_zones_were_accepted() -> None:
    """6.12 wants a zone size, and not a power of two."""
    odd = Params(basic=attrs.evolve(ZONED_BASIC, chunk_sectors=96), zoned=ZONED)
    assert valid(odd, flags=ZONED_DEVICE, version=(6, 12))
    none = Params(basic=attrs.evolve(ZONED_BASIC, chunk_sectors=0), zoned=ZONED)
    assert not valid(none, flags=ZONED_DEVICE, version=(6, 12))


def test_nothing_behind_zoned_is_looked_at() -> None:
    """With ZONED the driver returns before the sections that come after it."""
    bad = ParamsDmaAlign(alignment=2)
    assert valid(Params(basic=ZONED_BASIC, zoned=ZONED, dma_align=bad), flags=ZONED_DEVICE)
    assert not valid(Params(basic=BASIC, dma_align=bad))


@pytest.mark.parametrize(("alignment", "expected"), [(0, True), (511, True), (4095, True), (2, False), (8191, False)])
def test_dma_alignment(alignment: int, expected: bool) -> None:
    """One less than a power of two, below a page."""
    assert valid(Params(basic=BASIC, dma_align=ParamsDmaAlign(alignment=alignment))) is expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"seg_boundary_mask": 2047}, False),
        ({"seg_boundary_mask": 4096}, False),
        ({"seg_boundary_mask": (1 << 63) - 1}, True),
        # One more than this is 0, which is no power of two.
        ({"seg_boundary_mask": (1 << 64) - 1}, False),
        ({"max_segment_size": 4095}, False),
        ({"max_segments": 0}, True),
    ],
)
def test_segment(change: dict[str, Any], expected: bool) -> None:
    """Segments of 4096 bytes or more."""
    assert valid(Params(basic=BASIC, segment=attrs.evolve(SEGMENT, **change))) is expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"flags": IntegrityCap.INTEGRITY | IntegrityCap.REFTAG}, True),
        ({"flags": 4}, False),
        ({"metadata_size": 0}, False),
        ({"metadata_size": 7}, False),
        ({"pi_offset": 1}, False),
        ({"metadata_size": 9, "pi_offset": 1}, True),
        ({"csum_type": IntegrityChecksum.CRC64_NVME}, False),
        ({"csum_type": IntegrityChecksum.CRC64_NVME, "metadata_size": 16}, True),
        ({"csum_type": IntegrityChecksum.IP}, True),
        ({"csum_type": IntegrityChecksum.NONE, "metadata_size": 1}, True),
        ({"csum_type": IntegrityChecksum.NONE, "flags": IntegrityCap.REFTAG}, False),
        ({"interval_exp": 8}, False),
        ({"interval_exp": 10}, False),
    ],
)
def test_integrity(change: dict[str, Any], expected: bool) -> None:
    """Metadata that the checksum fits in, for intervals of a sector up to a block."""
    params = Params(basic=BASIC, integrity=attrs.evolve(INTEGRITY, **change))
    assert valid(params, flags=INTEGRITY_DEVICE) is expected
    assert not valid(params)


def test_a_checksum_that_there_is_not() -> None:
    """There is no checksum of type 3."""
    info = DevInfo(dev_id=0, nr_hw_queues=1, queue_depth=1, max_io_buf_bytes=65536, flags=INTEGRITY_DEVICE)
    packed = bytearray(Params(basic=BASIC, integrity=INTEGRITY).pack())
    place = Params.offsets()["integrity"] + ParamsIntegrity.offsets()["csum_type"]
    assert packed[place] == IntegrityChecksum.CRC16_T10DIF
    version = KernelVersion(7, 3)
    assert is_valid(bytes(packed), info, version=version, page_size=4096)
    packed[place] = 3
    assert not is_valid(bytes(packed), info, version=version, page_size=4096)


# ---------------------------------------------------------------------- the driver's structure


async def get(m: Machine) -> bytes:
    buffer = bytearray(Params.query())
    assert await m.command(ControlCommand.GET_PARAMS, buffer=buffer) == 0
    return bytes(buffer)


async def test_a_short_set_leaves_the_rest() -> None:
    """SET_PARAMS writes over the beginning of what is there: a section that it only names is the earlier one."""
    kernel = SimKernel()
    async with machine(kernel) as m:
        await m.add()
        assert await m.set_params(0, Params(basic=BASIC, discard=DISCARD)) == 0
        short = bytearray(Params(basic=BASIC).pack(length=40))
        short[4] |= ParamType.DISCARD
        assert await m.command(ControlCommand.SET_PARAMS, buffer=short) == 0
        got = await get(m)
        assert Params.unpack((152).to_bytes(4, "little") + got[4:]).discard == DISCARD
        # The length is the one that SET_PARAMS came with.
        assert int.from_bytes(got[:4], "little") == 40


@pytest.mark.parametrize(("version", "kept"), [((6, 12), True), ((7, 3), False)])
async def test_what_a_refused_set_leaves(version: tuple[int, int], kept: bool) -> None:
    """6.12 forgets the types of what it refused and keeps its bytes; 7.3 zeroes all. START_DEV refuses either way."""
    kernel = SimKernel(version=version)
    async with machine(kernel) as m:
        await m.add()
        assert await m.set_params(0, basic_params(max_sectors=7)) == -errno.EINVAL
        got = await get(m)
        assert int.from_bytes(got[4:8], "little") == ParamType.DEVT
        assert any(got[8:40]) is kept
        assert await m.start() == -errno.EINVAL


async def test_device_numbers_stay() -> None:
    """GET_PARAMS writes the numbers into the driver's structure, and a SET_PARAMS that stops short of them does not."""
    kernel = SimKernel()
    async with machine(kernel) as m:
        await m.add(1)
        buffer = bytearray(Params.query())
        assert await m.command(ControlCommand.GET_PARAMS, 1, buffer=buffer) == 0
        assert Params.unpack(bytes([152]) + buffer[1:]).types == ParamType.DEVT
        assert await m.start(1) == -errno.EINVAL


async def test_a_longer_structure_than_the_drivers() -> None:
    """What an older driver has no room for is neither taken nor given; nor does it know the type bits."""
    kernel = SimKernel(version=(6, 12))
    async with machine(kernel) as m:
        await m.add()
        assert await m.set_params(0, Params(basic=BASIC, segment=SEGMENT, integrity=INTEGRITY)) == 0
        got = await get(m)
        assert got[112:] == bytes(152 - 112)
        assert int.from_bytes(got[4:8], "little") == ParamType.BASIC | ParamType.DEVT


async def test_start_finds_what_set_did_not_look_at() -> None:
    """Limits that the block layer does not take make START_DEV fail, and leave no disk: more open zones than active ones."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, opened(m) as device:
        device.queue.fetch_all()
        held = kernel.devices[0]
        held.params = Params(basic=ZONED_BASIC, zoned=attrs.evolve(ZONED, max_open_zones=5))
        assert await m.start() == -errno.EINVAL
        held.params = Params(basic=BASIC, segment=attrs.evolve(SEGMENT, max_segment_size=1))
        assert await m.start() == -errno.EINVAL
        held.params = Params(basic=BASIC, dma_align=ParamsDmaAlign(alignment=8191))
        assert await m.start() == -errno.EINVAL
        assert not device.disk.exists
        held.params = Params(basic=BASIC, segment=SEGMENT)
        assert await m.start() == 0
