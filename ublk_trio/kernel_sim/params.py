"""The rules for a device's parameters: what SET_PARAMS accepts, and what only START_DEV finds out.

**Supported.** Every section's rules, by the release that knows the section; a section that nobody looked at because
ZONED came before it; the limits that the block layer refuses.
**Rejected.** With EINVAL: no BASIC, DEVT set by the server, a rule below broken.
**Differs from Linux.** The kernel is one that was built for zoned disks and for integrity data.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ublk_trio.kernel_sim.version import KernelVersion, Release
from ublk_trio.uapi import (
    MIN_SEGMENT_SIZE,
    PARAM_SECTIONS,
    SECTOR_SHIFT,
    BasicAttr,
    DevInfo,
    Feature,
    IntegrityCap,
    IntegrityChecksum,
    Params,
    ParamsBasic,
    ParamsDiscard,
    ParamsDmaAlign,
    ParamsSegment,
    ParamsZoned,
    ParamType,
)

HEADER: Final = struct.Struct("=II")
OFFSETS: Final = Params.offsets()
_SECTION_RELEASE: Mapping[ParamType, Release] = MappingProxyType(
    {
        ParamType.BASIC: (6, 0),
        ParamType.DISCARD: (6, 0),
        ParamType.DEVT: (6, 3),
        ParamType.ZONED: (6, 6),
        ParamType.DMA_ALIGN: (6, 15),
        ParamType.SEGMENT: (6, 15),
        ParamType.INTEGRITY: (7, 0),
    }
)
_MAX_SHIFT: Final = 28
_MIN_SECTORS: Final = 8
_U64_MAX: Final = (1 << 64) - 1
# A plain number, because what is not a known flag must not vanish.
_INTEGRITY_FLAGS: Final = int(IntegrityCap.INTEGRITY | IntegrityCap.REFTAG)
#: Bytes that a checksum takes of each interval's metadata.
_CHECKSUM_BYTES: Mapping[int, int] = MappingProxyType(
    {
        IntegrityChecksum.NONE: 0,
        IntegrityChecksum.IP: 8,
        IntegrityChecksum.CRC16_T10DIF: 8,
        IntegrityChecksum.CRC64_NVME: 16,
    }
)


def known_types(version: KernelVersion) -> int:
    """The type bits of the sections that a release has."""
    return sum(kind for kind, release in _SECTION_RELEASE.items() if version >= release)


def structure_size(version: KernelVersion) -> int:
    """The bytes of the release's ``ublk_params``, whose end is aligned to 8."""
    last = max(
        OFFSETS[name] + section.LAYOUT.size
        for name, (kind, section) in PARAM_SECTIONS.items()
        if version >= _SECTION_RELEASE[kind]
    )
    return -(-last // 8) * 8


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def parse(held: bytes) -> Params:
    """The parameters that a device holds, which were validated; what a release does not have is None."""
    _, types = HEADER.unpack_from(held)
    whole = held.ljust(Params.LAYOUT.size, b"\0")[HEADER.size :]
    try:
        return Params.unpack(HEADER.pack(Params.LAYOUT.size, types) + whole)
    except ValueError:  # a checksum that there is not, behind a ZONED that kept the driver from looking
        return Params.unpack(HEADER.pack(Params.LAYOUT.size, types & ~ParamType.INTEGRITY) + whole)


def is_valid(held: bytes, info: DevInfo, *, version: KernelVersion, page_size: int) -> bool:
    """Whether the driver takes what SET_PARAMS left in its structure; type bits that it does not know are gone."""
    _, types = HEADER.unpack_from(held)
    params = parse(held)
    if params.basic is None or types & ParamType.DEVT:
        return False
    if not _basic_ok(params.basic, info, version=version, page_size=page_size):
        return False
    zoned_device = bool(info.flags & Feature.ZONED)
    if zoned_device and not _zone_size_ok(params.basic, version):
        return False
    if params.discard is not None and not _discard_ok(params.discard):
        return False
    if params.zoned is not None:
        # With this section, and only then, those after it are not looked at.
        return zoned_device and _zoned_ok(params.zoned, params.basic)
    return not zoned_device and (
        (params.dma_align is None or _dma_ok(params.dma_align, page_size=page_size))
        and (params.segment is None or _segment_ok(params.segment))
        and (not types & ParamType.INTEGRITY or _integrity_ok(held, info))
    )


def _basic_ok(basic: ParamsBasic, info: DevInfo, *, version: KernelVersion, page_size: int) -> bool:
    page_shift = page_size.bit_length() - 1
    if version.checks_physical_shifts and (
        max(basic.physical_bs_shift, basic.io_opt_shift, basic.io_min_shift) > _MAX_SHIFT
    ):
        return False
    return (
        SECTOR_SHIFT <= basic.logical_bs_shift <= page_shift
        and basic.logical_bs_shift <= basic.physical_bs_shift
        and _MIN_SECTORS <= basic.max_sectors <= info.max_io_buf_bytes >> SECTOR_SHIFT
    )


def _zone_size_ok(basic: ParamsBasic, version: KernelVersion) -> bool:
    return _is_power_of_two(basic.chunk_sectors) if version.zone_size_is_power_of_two else bool(basic.chunk_sectors)


def _discard_ok(discard: ParamsDiscard) -> bool:
    single = not discard.max_discard_sectors or discard.max_discard_segments == 1
    return single and discard.discard_granularity != 0


def _zoned_ok(zoned: ParamsZoned, basic: ParamsBasic) -> bool:
    zones = basic.dev_sectors >> (basic.chunk_sectors.bit_length() - 1)
    return bool(zoned.max_zone_append_sectors) and max(zoned.max_open_zones, zoned.max_active_zones) <= zones


def _dma_ok(dma_align: ParamsDmaAlign, *, page_size: int) -> bool:
    return dma_align.alignment < page_size and _is_power_of_two(dma_align.alignment + 1)


def _segment_ok(segment: ParamsSegment) -> bool:
    boundary = segment.seg_boundary_mask + 1 & _U64_MAX
    return _is_power_of_two(boundary) and boundary >= MIN_SEGMENT_SIZE and segment.max_segment_size >= MIN_SEGMENT_SIZE


def _integrity_ok(held: bytes, info: DevInfo) -> bool:
    _, section = PARAM_SECTIONS["integrity"]
    flags, _, interval_exp, metadata, pi_offset, checksum, _ = section.LAYOUT.unpack_from(held, OFFSETS["integrity"])
    logical_bs_shift = held[OFFSETS["basic"] + ParamsBasic.offsets()["logical_bs_shift"]]
    checksum_bytes = _CHECKSUM_BYTES.get(checksum)
    return (
        bool(info.flags & Feature.INTEGRITY)
        and not flags & ~_INTEGRITY_FLAGS
        and checksum_bytes is not None
        and metadata != 0
        and not (checksum == IntegrityChecksum.NONE and flags & IntegrityCap.REFTAG)
        and pi_offset + checksum_bytes <= metadata
        and SECTOR_SHIFT <= interval_exp <= logical_bs_shift
    )


def has_attr(params: Params, attr: BasicAttr) -> bool:
    """Whether BASIC has the attribute; FUA counts only together with VOLATILE_CACHE."""
    assert params.basic is not None
    attrs = params.basic.attrs
    if attr is BasicAttr.FUA and not attrs & BasicAttr.VOLATILE_CACHE:
        return False
    return bool(attrs & attr)
