"""Merging: adjacent operations become one request.

**Supported.** An application's plug: what it submits between starting and letting go of it is held back, and each
operation is merged with the request submitted last where the two touch, up to the queue's limits; 32 requests, or one of
128 KiB, let it go, and so does waiting. Where an operation waits for a tag Choices may merge it with another that waits.
**Rejected.** Nothing. **Differs from Linux.** Requests without data but discards are never merged, nor are those with
FUA, preflush or part of a split other than its last: as there. Before 6.13 a plug was let go in reverse order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ublk_trio.kernel_sim.block.request import MergedRequest
from ublk_trio.uapi import SECTOR_SHIFT, IoFlag, IoOp

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.block.limits import Limits
    from ublk_trio.kernel_sim.block.request import Request
    from ublk_trio.kernel_sim.block.tags import HardwareQueue

_MERGEABLE: Final = frozenset({IoOp.READ, IoOp.WRITE, IoOp.DISCARD})
_FUA: Final = int(IoFlag.FUA)
_DISCARD: Final = int(IoOp.DISCARD)
_PLUG_REQUESTS_MAX: Final = 32
_PLUG_BYTES: Final = 128 << 10


def merged(request: Request, new: Request, limits: Limits) -> Request | None:
    """The two as one request, if they touch and one request may be so long; None otherwise."""
    op = request.op
    if (
        op != new.op
        or op not in _MERGEABLE
        or (request.op_flags | new.op_flags) & _FUA
        or request.keeps_tag
        or new.keeps_tag
        or request.no_merge
        or new.no_merge
        or (request.metadata is None) != (new.metadata is None)
    ):
        return None
    if request.start_sector + request.nr_sectors == new.start_sector:
        first, parts = request, [*request.parts, *new.parts]
    elif new.start_sector + new.nr_sectors == request.start_sector:
        first, parts = new, [*new.parts, *request.parts]
    else:
        return None
    longest = limits.max_discard if op == _DISCARD else limits.max_request
    if limits.chunk and op != _DISCARD:
        longest = min(longest, limits.chunk - (first.start_sector << SECTOR_SHIFT) % limits.chunk)
    if request.length + new.length > longest:
        return None
    whole = MergedRequest(parts, op_flags=request.op_flags)
    whole.tag = request.tag
    return whole


class Plug:
    """What an application holds back; see `SimBlockDevice.plugged`."""

    def __init__(self, queue: HardwareQueue) -> None:
        self.queue = queue
        self._requests: list[Request] = []

    def add(self, request: Request) -> None:
        """Hold it back, as a part of the last one if they touch."""
        requests = self._requests
        limits = self.queue.limits
        assert limits is not None
        if requests:
            whole = merged(requests[-1], request, limits)
            if whole is not None:
                requests[-1] = whole
                return
            if len(requests) >= _PLUG_REQUESTS_MAX or requests[-1].length >= _PLUG_BYTES:
                self.let_go()
        self._requests.append(request)

    def let_go(self) -> None:
        """Submit what is held back."""
        requests, self._requests = self._requests, []
        for request in requests:
            self.queue.submit(request)
