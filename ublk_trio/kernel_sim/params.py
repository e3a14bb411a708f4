"""SET_PARAMS' and GET_PARAMS' view of a device's parameters.

**Supported.** Every section's rules, by the release that knows the section.
**Rejected.** With EINVAL: no BASIC, DEVT set by the server, a rule below broken.
**Differs from Linux.** ZONED and INTEGRITY are refused as on a kernel built without them, because the features are not
modelled. GET_PARAMS accepts a header with no types, as the driver's source does.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from ublk_trio.kernel_sim.version import KernelVersion
from ublk_trio.uapi import (
    MIN_SEGMENT_SIZE,
    SECTOR_SHIFT,
    BasicAttr,
    DevInfo,
    Feature,
    Params,
    ParamsBasic,
    ParamsDiscard,
    ParamsDmaAlign,
    ParamsIntegrity,
    ParamsSegment,
    ParamsZoned,
    ParamType,
)

HEADER: Final = struct.Struct("=II")
_SECTION_RELEASE: Mapping[ParamType, tuple[int, int]] = MappingProxyType(
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


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def parse(data: bytes, *, length: int, version: KernelVersion) -> Params | None:
    """The parameters of a SET_PARAMS buffer, without the sections that the release does not know; None if they cannot
    be.

    What lies past ``length`` is zero, and a section that a type bit promises but ``length`` cuts off is zero too.
    """
    _, types = HEADER.unpack_from(data)
    known = sum(kind for kind, release in _SECTION_RELEASE.items() if version >= release)
    whole = data[:length].ljust(Params.LAYOUT.size, b"\0")
    try:
        return Params.unpack(HEADER.pack(Params.LAYOUT.size, types & known) + whole[HEADER.size : Params.LAYOUT.size])
    except ValueError:  # an enum's value that no kernel knows: a checksum of 3
        return None


def is_valid(params: Params, info: DevInfo, *, page_size: int) -> bool:
    """Whether the driver takes them."""
    if params.basic is None or not _basic_ok(params.basic, info, page_size=page_size):
        return False
    if params.devt is not None:
        return False
    if (params.zoned is not None) != bool(info.flags & Feature.ZONED):
        return False
    if params.integrity is not None and not info.flags & Feature.INTEGRITY:
        return False
    return (
        (params.discard is None or _discard_ok(params.discard))
        and (params.zoned is None or _zoned_ok(params.zoned, params.basic))
        and (params.dma_align is None or _dma_ok(params.dma_align, page_size=page_size))
        and (params.segment is None or _segment_ok(params.segment))
        and (params.integrity is None or _integrity_ok(params.integrity))
    )


def _basic_ok(basic: ParamsBasic, info: DevInfo, *, page_size: int) -> bool:
    page_shift = page_size.bit_length() - 1
    return (
        SECTOR_SHIFT <= basic.logical_bs_shift <= page_shift
        and basic.logical_bs_shift <= basic.physical_bs_shift <= _MAX_SHIFT
        and basic.io_opt_shift <= _MAX_SHIFT
        and basic.io_min_shift <= _MAX_SHIFT
        and _MIN_SECTORS <= basic.max_sectors <= info.max_io_buf_bytes >> SECTOR_SHIFT
    )


def _discard_ok(discard: ParamsDiscard) -> bool:
    return not discard.max_discard_sectors or (discard.max_discard_segments == 1 and discard.discard_granularity != 0)


def _zoned_ok(zoned: ParamsZoned, basic: ParamsBasic) -> bool:
    if not _is_power_of_two(basic.chunk_sectors) or not zoned.max_zone_append_sectors:
        return False
    zones = basic.dev_sectors // basic.chunk_sectors
    return zoned.max_open_zones <= zones and zoned.max_active_zones <= zones


def _dma_ok(dma_align: ParamsDmaAlign, *, page_size: int) -> bool:
    return dma_align.alignment < page_size and _is_power_of_two(dma_align.alignment + 1)


def _segment_ok(segment: ParamsSegment) -> bool:
    boundary = segment.seg_boundary_mask + 1
    return _is_power_of_two(boundary) and boundary >= MIN_SEGMENT_SIZE and segment.max_segment_size >= MIN_SEGMENT_SIZE


def _integrity_ok(integrity: ParamsIntegrity) -> bool:
    return integrity.metadata_size != 0


def has_attr(params: Params, attr: BasicAttr) -> bool:
    """Whether BASIC has the attribute; FUA counts only together with VOLATILE_CACHE."""
    assert params.basic is not None
    attrs = params.basic.attrs
    if attr is BasicAttr.FUA and not attrs & BasicAttr.VOLATILE_CACHE:
        return False
    return bool(attrs & attr)
