"""What a committed result makes of a request, by release, over the raw interface."""

from __future__ import annotations

import errno

import pytest

from tests.sim.mini import basic_params
from tests.sim.raw import RawServer, raw_kernel, raw_server
from ublk_trio.uapi import BasicAttr, Feature, IoOp, ParamsDiscard

#: The request comes again, from this sector on.
AGAIN = "again from sector {}".format

_OLD, _NEW = (6, 12), (7, 3)


def server_of(version: tuple[int, int], flags: Feature) -> RawServer:
    discard = ParamsDiscard(
        discard_granularity=512, max_discard_sectors=64, max_write_zeroes_sectors=64, max_discard_segments=1
    )
    params = basic_params(attrs=BasicAttr.VOLATILE_CACHE, discard=discard)
    return raw_server(raw_kernel(version), flags=flags, params=params, copies=not flags)


def outcome(version: tuple[int, int], op: IoOp, result: int, flags: Feature) -> int | str | None:
    """Commit ``result`` for a request of 4 KiB at sector 8: what the application sees, or that it comes again."""
    server = server_of(version, flags)
    bio = (
        server.disk.submit(op, 4096, bytes(4096) if op is IoOp.WRITE else 4096)
        if op is not IoOp.FLUSH
        else (server.disk.submit(op))
    )
    server.commit(server.delivered().user_data, result)
    if bio.result is not None:
        return bio.result
    return AGAIN(server.descriptor(server.delivered().user_data).start_sector)


@pytest.mark.parametrize(
    ("op", "result", "old", "new"),
    [
        (IoOp.READ, 4096, 4096, 4096),
        (IoOp.READ, 0, -errno.EIO, -errno.EIO),
        (IoOp.READ, 1024, AGAIN(10), AGAIN(10)),
        (IoOp.READ, 700, AGAIN(9), AGAIN(9)),
        (IoOp.READ, 1 << 20, 4096, 4096),
        (IoOp.READ, -errno.ENOSPC, -errno.ENOSPC, -errno.ENOSPC),
        (IoOp.READ, -errno.EPERM, -errno.EIO, -errno.EIO),
        # 2 GiB as an unsigned result.
        (IoOp.READ, -(1 << 31), -errno.EIO, -errno.EIO),
        (IoOp.WRITE, 4096, 4096, 4096),
        (IoOp.WRITE, 0, AGAIN(8), 4096),
        (IoOp.WRITE, 1024, AGAIN(10), 4096),
        (IoOp.WRITE, 1 << 20, 4096, 4096),
        (IoOp.WRITE, -errno.EIO, -errno.EIO, -errno.EIO),
        (IoOp.FLUSH, 0, 0, 0),
        (IoOp.FLUSH, 77, 0, 0),
        (IoOp.FLUSH, -errno.ENODATA, -errno.ENODATA, -errno.ENODATA),
        (IoOp.DISCARD, 0, 4096, 4096),
        (IoOp.DISCARD, 512, 4096, 4096),
        (IoOp.WRITE_ZEROES, 0, 4096, 4096),
        (IoOp.WRITE_ZEROES, -(1 << 31), -errno.EIO, -errno.EIO),
    ],
)
def test_results_of_copied_requests(op: IoOp, result: int, old: int | str, new: int | str) -> None:
    """Short READs come again; short WRITEs do so to 7.1; ranges and flushes are done with any result of 0 or more."""
    assert outcome(_OLD, op, result, Feature(0)) == old
    assert outcome(_NEW, op, result, Feature(0)) == new


@pytest.mark.parametrize(
    ("op", "result", "old", "new"),
    [
        (IoOp.READ, 1024, AGAIN(10), 4096),
        (IoOp.READ, 0, -errno.EIO, -errno.EIO),
        (IoOp.WRITE, 1024, AGAIN(10), 4096),
        (IoOp.WRITE, 0, AGAIN(8), 4096),
        (IoOp.READ, 1 << 20, 4096, 4096),
    ],
)
def test_results_without_copies(op: IoOp, result: int, old: int | str, new: int | str) -> None:
    """Where the server moves the data, a short READ is whole since 7.2, too."""
    assert outcome(_OLD, op, result, Feature.USER_COPY) == old
    assert outcome(_NEW, op, result, Feature.USER_COPY) == new
