"""What a queue's limits are once its disk is started, from the device's parameters, by release.

**Supported.** Block sizes, the size of a request (max_sectors, Linux's own cap on it, and io_opt or io_min where they
raise that cap), chunks, segments, the limits and granularities of discard and write-zeroes, cache and FUA, zones,
integrity intervals.
**Rejected.** EINVAL, which START_DEV returns: a physical block size that is smaller than the logical one, integrity
intervals or tuples that do not fit, more open zones than active ones.
**Differs from Linux.** An application's buffer is a row of pages, each a segment of its own, so only the number of
segments matters, and neither their size, nor their boundary, nor DMA alignment. Limits cannot be changed through sysfs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from ublk_trio.kernel_sim.params import has_attr
from ublk_trio.uapi import MIN_SEGMENT_SIZE, SECTOR_SHIFT, BasicAttr, IntegrityChecksum, ParamsIntegrity

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.version import KernelVersion
    from ublk_trio.uapi import Params

#: Bytes of the longest bio.
BIO_BYTES_MAX: Final = (1 << 32) - 1
_PAGE_BYTES: Final = 4096
#: The metadata of one request.
_METADATA_BYTES_MAX: Final = 2 << 20
_DEFAULT_SEGMENTS: Final = 128
#: Bytes of the protection tuple that each checksum needs.
_TUPLE_BYTES: Final = {
    IntegrityChecksum.NONE: 0,
    IntegrityChecksum.IP: 8,
    IntegrityChecksum.CRC16_T10DIF: 8,
    IntegrityChecksum.CRC64_NVME: 16,
}


@attrs.frozen(kw_only=True)
class Limits:
    """All in bytes, 0 where there is none."""

    logical_block: int
    physical_block: int
    #: The longest READ or WRITE.
    max_request: int
    #: Up to this length a READ or WRITE is surely one request, wherever it starts.
    never_split: int
    #: No READ, WRITE or WRITE_ZEROES crosses a multiple of this.
    chunk: int
    max_discard: int
    discard_granularity: int
    discard_alignment: int
    max_write_zeroes: int
    volatile_cache: bool
    fua: bool
    #: The longest zone append; 0 on a disk without zones.
    max_zone_append: int
    #: Data that one piece of metadata covers, and that piece's length; 0 without integrity.
    integrity_interval: int
    integrity_metadata: int

    def metadata_of(self, length: int) -> int:
        """How much metadata goes with so much data."""
        return length // self.integrity_interval * self.integrity_metadata if self.integrity_interval else 0


def limits_of(params: Params, version: KernelVersion) -> Limits | None:
    """The limits; None when the block layer refuses them (EINVAL)."""
    basic = params.basic
    assert basic is not None
    logical = 1 << basic.logical_bs_shift
    physical = 1 << basic.physical_bs_shift
    hardware = _round_down(basic.max_sectors << SECTOR_SHIFT, logical)
    if not hardware or not _segments_ok(params):
        return None
    io_min = max(1 << basic.io_min_shift, physical)
    io_opt = _round_down(1 << basic.io_opt_shift, physical)
    cap = version.default_request_bytes_max
    if version.io_opt_raises_requests:
        cap = io_opt if io_opt > cap else io_min if io_min > cap else cap
    segments = params.segment.max_segments or _DEFAULT_SEGMENTS if params.segment is not None else 0
    if segments:
        cap = min(cap, segments * _PAGE_BYTES)
    max_request = _round_down(min(hardware, cap), logical)
    chunk = basic.chunk_sectors << SECTOR_SHIFT
    interval = metadata = 0
    if params.integrity is not None:
        fits = _interval(params.integrity, logical)
        if fits is None:
            return None
        interval, metadata = fits, params.integrity.metadata_size
        max_request = min(max_request, _round_down(_METADATA_BYTES_MAX // metadata * interval, logical))
        if not max_request:
            return None
    append = 0
    if params.zoned is not None:
        if params.zoned.max_active_zones and params.zoned.max_open_zones > params.zoned.max_active_zones:
            return None
        append = min(params.zoned.max_zone_append_sectors << SECTOR_SHIFT, chunk, hardware)
    discard = params.discard
    max_discard = discard.max_discard_sectors << SECTOR_SHIFT if discard is not None else 0
    return Limits(
        logical_block=logical,
        physical_block=physical,
        max_request=max_request,
        never_split=0 if chunk else max_request - (physical - logical),
        chunk=chunk,
        max_discard=max_discard,
        discard_granularity=max(discard.discard_granularity, physical) if discard is not None and max_discard else 0,
        discard_alignment=discard.discard_alignment if discard is not None else 0,
        max_write_zeroes=discard.max_write_zeroes_sectors << SECTOR_SHIFT if discard is not None else 0,
        volatile_cache=has_attr(params, BasicAttr.VOLATILE_CACHE),
        fua=has_attr(params, BasicAttr.FUA),
        max_zone_append=append,
        integrity_interval=interval,
        integrity_metadata=metadata,
    )


def _segments_ok(params: Params) -> bool:
    """What the driver did not look at because a zoned section came before."""
    if params.dma_align is not None and params.dma_align.alignment > _PAGE_BYTES:
        return False
    segment, basic = params.segment, params.basic
    if segment is None or basic is None:
        return True
    boundary_ok = segment.seg_boundary_mask == 0 or segment.seg_boundary_mask >= MIN_SEGMENT_SIZE - 1
    size_ok = basic.virt_boundary_mask or segment.max_segment_size == 0 or segment.max_segment_size >= MIN_SEGMENT_SIZE
    return bool(boundary_ok and size_ok)


def _interval(integrity: ParamsIntegrity, logical: int) -> int | None:
    tuple_bytes = _TUPLE_BYTES[integrity.csum_type]
    if integrity.pi_offset + tuple_bytes > integrity.metadata_size:
        return None
    if not integrity.interval_exp:
        return logical
    interval = 1 << integrity.interval_exp
    return interval if 1 << SECTOR_SHIFT <= interval <= logical else None


def _round_down(value: int, step: int) -> int:
    return value // step * step
