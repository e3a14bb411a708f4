"""What a disk is made of: the `Backend` class, and the backends that come with the package."""

from __future__ import annotations

from ublk_trio.backends.asynchronous import as_async
from ublk_trio.backends.base import (
    Backend,
    CanDiscard,
    CanFlush,
    CanWrite,
    CanWriteZeroes,
    Done,
    Result,
    capabilities,
    check_geometry,
    fill_zeroes,
    is_async,
)
from ublk_trio.backends.ceph import CephCluster
from ublk_trio.backends.concat import Concat
from ublk_trio.backends.delay import Delay, LatencyKind
from ublk_trio.backends.error_injection import ErrorInjection, ErrorType, IoType
from ublk_trio.backends.file import File, ThreadedFile
from ublk_trio.backends.limits import Limited, Limits
from ublk_trio.backends.memory import Memory
from ublk_trio.backends.null import Null
from ublk_trio.backends.passthru import Passthru
from ublk_trio.backends.raid0 import Raid0
from ublk_trio.backends.raid1 import MemberState, MemberStatus, Raid1, Raid1Status
from ublk_trio.backends.rbd import Rbd
from ublk_trio.backends.sizes import format_size, parse_size
from ublk_trio.backends.spec import KINDS, Kind, Option, parse_backend, register
from ublk_trio.backends.stacked import Base, Stacked

__all__ = [
    "KINDS",
    "Backend",
    "Base",
    "CanDiscard",
    "CanFlush",
    "CanWrite",
    "CanWriteZeroes",
    "CephCluster",
    "Concat",
    "Delay",
    "Done",
    "ErrorInjection",
    "ErrorType",
    "File",
    "IoType",
    "Kind",
    "LatencyKind",
    "Limited",
    "Limits",
    "MemberState",
    "MemberStatus",
    "Memory",
    "Null",
    "Option",
    "Passthru",
    "Raid0",
    "Raid1",
    "Raid1Status",
    "Rbd",
    "Result",
    "Stacked",
    "ThreadedFile",
    "as_async",
    "capabilities",
    "check_geometry",
    "fill_zeroes",
    "format_size",
    "is_async",
    "parse_backend",
    "parse_size",
    "register",
]
