"""A device's parameters, from what its backend is and can do.

Facts: without VOLATILE_CACHE the kernel never sends FLUSH, and it honours FUA only together with VOLATILE_CACHE; so a
backend that has a cache to flush must be advertised as one. Ranges of discard and write-zeroes are capped at 1 GiB: a
larger result would not fit the commit's signed 32 bits, and kernels before 6.11 truncate zeroing of 4 GiB and more.
"""

from __future__ import annotations

from ublk_trio.backends import Backend
from ublk_trio.handlers import Handlers
from ublk_trio.uapi import SECTOR_SHIFT, BasicAttr, Params, ParamsBasic, ParamsDiscard

#: Bytes: the largest range of one DISCARD or WRITE_ZEROES.
RANGE_BYTES_MAX = 1 << 30


def _shift(size: int) -> int:
    return size.bit_length() - 1


def _attributes(handlers: Handlers) -> BasicAttr:
    attributes = BasicAttr(0)
    if handlers.read_only:
        attributes |= BasicAttr.READ_ONLY
    if handlers.backend.rotational:
        attributes |= BasicAttr.ROTATIONAL
    if "flush" in handlers.offered:
        attributes |= BasicAttr.VOLATILE_CACHE | BasicAttr.FUA
    return attributes


def _discard(backend: Backend, offered: frozenset[str]) -> ParamsDiscard | None:
    can_discard, can_zero = "discard" in offered, "write_zeroes" in offered
    if not can_discard and not can_zero:
        return None
    granularity = backend.discard_granularity
    sectors_max = (RANGE_BYTES_MAX - RANGE_BYTES_MAX % granularity) >> SECTOR_SHIFT
    return ParamsDiscard(
        # The driver wants one even where nothing can be discarded.
        discard_granularity=granularity,
        max_discard_sectors=sectors_max if can_discard else 0,
        max_discard_segments=1 if can_discard else 0,
        max_write_zeroes_sectors=sectors_max if can_zero else 0,
    )


def params_of(handlers: Handlers, *, max_io_bytes: int) -> Params:
    """SET_PARAMS' argument for a backend. ``max_io_bytes`` as the kernel returned it from ADD_DEV."""
    backend = handlers.backend
    physical = backend.physical_block_size
    return Params(
        basic=ParamsBasic(
            attrs=_attributes(handlers),
            logical_bs_shift=_shift(backend.block_size),
            physical_bs_shift=_shift(physical),
            io_min_shift=_shift(physical),
            io_opt_shift=_shift(backend.optimal_io_size or physical),
            max_sectors=max_io_bytes >> SECTOR_SHIFT,
            dev_sectors=backend.size >> SECTOR_SHIFT,
        ),
        discard=_discard(backend, handlers.offered),
    )
