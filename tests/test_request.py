"""A request in words, as it stands in the log."""

from __future__ import annotations

from ublk_trio.request import Request
from ublk_trio.uapi import IoOp


def test_flush_has_no_range() -> None:
    """A flush is of the whole disk: the sector that the kernel sends with it, all ones, is not shown as a place."""
    request = Request(0)
    request.load(IoOp.FLUSH, 0, (1 << 64) - 1)
    assert str(request) == "FLUSH"


def test_range_is_in_bytes() -> None:
    """Every other request is named with its range in bytes, one of an unknown operation, too."""
    request = Request(0)
    request.load(IoOp.WRITE, 16, 8)
    assert str(request) == "WRITE of 8192 bytes at 4096"
    request.load(99, 1, 2)
    assert str(request) == "op 99 of 512 bytes at 1024"
