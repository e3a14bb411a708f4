"""What the kernel is told of a disk is what its backend can do: no field overflows, and each is in its own unit."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest

import ublk_trio.params
from ublk_trio import Backend, DeviceOptions, SimKernel, open_target
from ublk_trio.handlers import Handlers
from ublk_trio.params import RANGE_BYTES_MAX, params_of
from ublk_trio.uapi import SECTOR_SHIFT, BasicAttr, Params

GIB = 1 << 30
TIB = 1 << 40


class Vast(Backend):
    """Of any size, since it keeps nothing; says what was discarded and zeroed."""

    block_size = 4096

    def __init__(self, size: int, *, granularity: int = 4096) -> None:
        self.size = size
        self.discard_granularity = granularity
        self.ranges: dict[str, list[tuple[int, int]]] = {"discard": [], "write_zeroes": []}

    def read(self, offset: int, buffer: memoryview) -> None: ...

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None: ...

    def flush(self) -> None: ...

    def discard(self, offset: int, length: int) -> None:
        self.ranges["discard"].append((offset, length))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.ranges["write_zeroes"].append((offset, length))


def told(backend: Backend, *, max_io_bytes: int = 512 * 1024, read_only: bool = False) -> Params:
    return params_of(Handlers(backend, read_only=read_only), max_io_bytes=max_io_bytes)


def check(size: int, granularity: int) -> None:
    params = told(Vast(size, granularity=granularity))
    assert params.basic is not None
    assert params.basic.dev_sectors << SECTOR_SHIFT == size
    assert params.basic.max_sectors << SECTOR_SHIFT == 512 * 1024
    assert (params.basic.logical_bs_shift, params.basic.physical_bs_shift) == (12, 12)
    assert BasicAttr.VOLATILE_CACHE | BasicAttr.FUA in params.basic.attrs
    discard = params.discard
    assert discard is not None
    assert (discard.discard_alignment, discard.discard_granularity, discard.max_discard_segments) == (0, granularity, 1)
    for sectors in (discard.max_discard_sectors, discard.max_write_zeroes_sectors):
        length = sectors << SECTOR_SHIFT
        assert 0 < length <= RANGE_BYTES_MAX < 1 << 31, "its length fits a result, which is a signed int"
        assert length % granularity == 0
    assert Params.unpack(params.pack()) == params


@pytest.mark.parametrize("granularity", [4096, 65536, GIB])
@pytest.mark.parametrize("size", [GIB, 2 * TIB, 2 * TIB + 4096, 64 * TIB, (1 << 63) - 4096])
def test_every_size(size: int, granularity: int) -> None:
    """Beyond 2 TiB as below it: sizes in sectors, granularities in bytes, an alignment of 0, and what comes fits a result."""
    check(size, granularity)


@pytest.mark.parametrize("missing", ["discard", "write_zeroes", "flush"])
def test_what_a_backend_cannot_do(missing: str) -> None:
    """Neither discards nor zeroing nor a cache is promised that it does not have."""
    backend = Vast(GIB)
    backend.unsupported = frozenset({missing})
    params = told(backend)
    assert params.basic is not None
    assert params.discard is not None
    assert (BasicAttr.VOLATILE_CACHE in params.basic.attrs) == (missing != "flush")
    assert bool(params.discard.max_discard_sectors) == (missing != "discard")
    assert bool(params.discard.max_write_zeroes_sectors) == (missing != "write_zeroes")
    backend.unsupported = frozenset({"discard", "write_zeroes"})
    assert told(backend).discard is None
    read_only = told(Vast(GIB), read_only=True)
    assert read_only.basic is not None
    assert BasicAttr.READ_ONLY in read_only.basic.attrs
    assert read_only.discard is None


async def test_a_vast_disk_is_discarded_and_zeroed() -> None:
    """5 TiB in one call: the backend gets all of it, once, in ranges none of which overflows; and the application no error."""
    backend = Vast(5 * TIB)
    kernel = SimKernel(paranoid=True)
    async with open_target(kernel) as target:
        device = await target.start_device(backend, DeviceOptions())
        disk = kernel.block_device(device.dev_id)
        await disk.discard(0, backend.size)
        await disk.write_zeroes(0, backend.size)
    for ranges in backend.ranges.values():
        end = 0
        for offset, length in sorted(ranges):
            assert offset == end
            assert 0 < length <= RANGE_BYTES_MAX
            end += length
        assert end == backend.size
    assert not kernel.leftovers()


# Planted bugs -----------------------------------------------------------------------------------------------------------


def _changed(**fields: int) -> Callable[[pytest.MonkeyPatch], None]:
    discard = ublk_trio.params._discard

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        def planted(backend: Backend, offered: frozenset[str]) -> object:
            right = discard(backend, offered)
            assert right is not None
            return attrs.evolve(right, **fields)

        monkeypatch.setattr(ublk_trio.params, "_discard", planted)

    return plant


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(_changed(max_discard_sectors=2 * TIB >> SECTOR_SHIFT & 0xFFFFFFFF), id="truncated"),
        pytest.param(_changed(max_write_zeroes_sectors=GIB >> SECTOR_SHIFT << 2), id="overflows a result"),
        pytest.param(_changed(discard_alignment=8), id="alignment in sectors"),
        pytest.param(_changed(discard_granularity=8), id="granularity in sectors"),
    ],
)
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these was made in earnest elsewhere."""
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(2 * TIB, 4096)
