"""Hypothesis strategies: what applications ask of a disk, how a device is made, and what a kernel decides."""

from __future__ import annotations

from typing import Literal

import attrs
import hypothesis.strategies as st

from ublk_trio.kernel_sim.choices import Choices
from ublk_trio.options import DataMode, DeviceOptions
from ublk_trio.testing.storage import SECTOR_BYTES

_Kind = tuple[Literal["read", "write", "flush", "discard", "write_zeroes"], bool]
#: What a range is used for; bool: with FUA.
_KINDS: tuple[_Kind, ...] = (
    ("write", False),
    ("read", False),
    ("write", False),
    ("write", True),
    ("discard", False),
    ("write_zeroes", False),
)
#: How many operations are in flight together.
GROUP_MAX = 6


@attrs.frozen(kw_only=True)
class Operation:
    """One operation of an application; offset and length in bytes."""

    name: Literal["read", "write", "flush", "discard", "write_zeroes"]
    offset: int = 0
    length: int = 0
    fua: bool = False


def operations(size: int, *, block_size: int = SECTOR_BYTES) -> st.SearchStrategy[Operation]:
    """Operations within a disk of ``size`` bytes. Many of them near its beginning, so that they meet."""
    blocks = size // block_size
    flush = st.just(Operation(name="flush"))
    first = st.integers(0, min(blocks, 12) - 1) | st.integers(0, blocks - 1)
    length = st.sampled_from([1, 2, 8, 9, 24])

    # Not map: Hypothesis would show the function's arguments.
    @st.composite
    def ranged(draw: st.DrawFn) -> Operation:
        block, count, (name, fua) = draw(st.tuples(first, length, st.sampled_from(_KINDS)))
        return Operation(name=name, offset=block * block_size, length=min(count, blocks - block) * block_size, fua=fua)

    return ranged() | flush


def operation_groups(size: int, *, block_size: int = SECTOR_BYTES) -> st.SearchStrategy[list[list[Operation]]]:
    """Groups of operations: those of a group are in flight together, the next group begins when they have ended."""
    return st.lists(
        st.lists(operations(size, block_size=block_size), min_size=1, max_size=GROUP_MAX), min_size=1, max_size=6
    )


def device_options() -> st.SearchStrategy[DeviceOptions]:
    """Devices with few and with many queues, tags and buffers, in each data mode that every backend works in."""
    return st.builds(
        DeviceOptions,
        queues=st.integers(1, 3),
        depth=st.integers(1, 8),
        mode=st.sampled_from(DataMode),
        pool_buffers=st.integers(1, 3),
        max_io_bytes=st.sampled_from([4096, 16384]),
    )


class TapeChoices(Choices):
    """Decisions out of a few bytes, calm when they are used up. Shrinks well, and can be written down."""

    def __init__(self, tape: bytes) -> None:
        super().__init__()
        self.tape = tape
        self._left = iter(tape)

    def pick(self, what: str, options: int) -> int:
        return next(self._left, 0) % options

    def __repr__(self) -> str:
        return f"TapeChoices({self.tape!r})"


def kernel_choices() -> st.SearchStrategy[TapeChoices]:
    """For `SimKernel` or `Storage`: what it is free to decide, and what may go wrong."""
    return (st.binary(max_size=200) | st.binary(min_size=60, max_size=200)).map(TapeChoices)
