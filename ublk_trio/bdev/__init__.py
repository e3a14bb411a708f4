"""Named backends, as SPDK's bdevs: who may use which, what they did, and what happens when one goes away."""

from __future__ import annotations

from ublk_trio.bdev.bdev import Bdev
from ublk_trio.bdev.counters import Counters, IoStatistics, OperationStatistics
from ublk_trio.bdev.descriptor import Descriptor
from ublk_trio.bdev.registry import Registry, open_registry

__all__ = [
    "Bdev",
    "Counters",
    "Descriptor",
    "IoStatistics",
    "OperationStatistics",
    "Registry",
    "open_registry",
]
