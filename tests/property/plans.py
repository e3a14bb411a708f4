"""What a run of the state machine is made of: how disks are made, what applications ask, which faults there are."""

from __future__ import annotations

import itertools
from typing import Any

import attrs
import hypothesis.strategies as st

from tests.property.model import Name
from ublk_trio import DataMode
from ublk_trio.handlers import Serve
from ublk_trio.kernel_sim.faults import FAULTS, Layer

#: The faults that a run may have, in the order of their bits; those of storage are tests/property/test_durability.py's, and where
#: there are workers (tests/property/test_with_workers.py) they are always late.
FAULT_NAMES = tuple(fault.name for fault in FAULTS if fault.layer is not Layer.STORAGE and fault.name != "worker-late")
#: What the target's owner may do besides letting it run.
DEEDS = ("start", "stop", "leave", "cancel start", "cancel stop", "kill")


@attrs.frozen(kw_only=True)
class DiskPlan:
    """How a disk is made and served."""

    kind: str = "plain"
    serve: Serve | None = None
    mode: DataMode = DataMode.COPY
    queues: int = 1
    depth: int = 1
    pool_buffers: int = 1
    max_io_bytes: int = 4096
    blocks: int = 16
    troubles: bool = False
    suspensions_max: int = 0
    fails_to_open: bool = False
    unsupported: frozenset[str] = frozenset()
    read_only: bool = False


#: What each field of a plan may be; which is one byte of what is drawn. The first is what it shrinks to.
_FIELDS: dict[str, tuple[object, ...]] = {
    "kind": ("async", "plain", "async"),
    "serve": (None, None, "async"),
    "mode": tuple(DataMode),
    "queues": (1, 2, 3),
    "depth": (1, 2, 3, 4, 5, 6, 7, 8),
    "pool_buffers": (1, 2, 3),
    "max_io_bytes": (4096, 8192, 16384),
    "blocks": (16, 64, 129),
    "troubles": (False, True),
    "suspensions_max": (0, 1, 2, 3),
    "fails_to_open": (False,) * 9 + (True,),
    "unsupported": (frozenset(),) * 4 + (frozenset({"flush"}), frozenset({"discard"}), frozenset({"write_zeroes"})),
    "read_only": (False,) * 9 + (True,),
}


def _plan(drawn: bytes) -> DiskPlan:
    fields: dict[str, Any] = {
        name: values[byte % len(values)] for (name, values), byte in zip(_FIELDS.items(), drawn, strict=True)
    }
    return DiskPlan(**fields)


#: Like every strategy here one draw, of a few bytes: that is what makes the machine fast.
disk_plans = st.binary(min_size=len(_FIELDS), max_size=len(_FIELDS)).map(_plan)


@attrs.frozen(kw_only=True)
class Ask:
    """One operation of an application; range in blocks, cut to the disk."""

    name: Name
    block: int
    blocks: int
    fua: bool


#: How an operation is chosen, by one byte: reads and writes are what disks are for.
_KINDS: tuple[tuple[Name, bool], ...] = (
    *(("read", False), ("write", False)) * 2,
    ("read", False),
    ("write", True),
    ("flush", False),
    ("discard", False),
    ("write_zeroes", False),
)
#: And its range, by another: (first block, blocks). They lie close together, so that operations overlap.
_RANGES = tuple(itertools.product((0, 1, 7, 8, 15, 40), (1, 2, 8, 9, 1, 2, 40)))
BATCH_MAX = 6


def _batch(drawn: bytes) -> list[Ask]:
    asks = []
    for kind, place in zip(drawn[1 : 2 + drawn[0] % BATCH_MAX], drawn[1 + BATCH_MAX :], strict=False):
        name, fua = _KINDS[kind % len(_KINDS)]
        block, blocks = _RANGES[place % len(_RANGES)]
        asks.append(Ask(name=name, block=block, blocks=blocks, fua=fua))
    return asks


batches = st.binary(min_size=1 + 2 * BATCH_MAX, max_size=1 + 2 * BATCH_MAX).map(_batch)


def _chosen(mask: int) -> tuple[frozenset[str], frozenset[str]]:
    faults = frozenset(name for bit, name in enumerate(FAULT_NAMES) if mask >> bit & 1)
    deeds = frozenset(deed for bit, deed in enumerate(DEEDS, len(FAULT_NAMES)) if not mask >> bit & 1)
    return faults, deeds


#: A swarm: which faults may happen in a run, and which deeds are left out of it. Shrinks to no faults, every deed.
swarms = st.integers(0, (1 << len(FAULT_NAMES) + len(DEEDS)) - 1).map(_chosen)
