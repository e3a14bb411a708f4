"""`Expected`: a bdev that is not there, but has its name, and claims what there is of what it stands on.

It was asked for before all of that was there, or it was there and went with a part of it. SPDK's modules keep what was asked for in the
same way, until it is deleted by call, and look at each new bdev.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import attrs

from ublk_trio.bdev import Descriptor, Registry
from ublk_trio.errors import BackendError

if TYPE_CHECKING:
    from ublk_trio.service.service import Call


def _nothing() -> None:
    """Nobody needs to know."""


@attrs.define(kw_only=True, eq=False)
class Expected:
    """A bdev that is made when all that it stands on is there."""

    #: What asked for it.
    call: Call
    #: Names or UUIDs of what it stands on.
    bases: Sequence[str]
    #: Who has these.
    claim: str
    make: Callable[[], Awaitable[None]]
    #: It was there, and went with a base.
    lost: bool = False
    #: A raid that lost a member for which there is no substitute: it is not made again, and goes with the last base.
    offline: bool = False
    #: Called when the last base that it held is about to go.
    on_bare: Callable[[], None] = _nothing
    #: The bases that it has claimed, each in its place.
    held: list[Descriptor | None] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.held = [None] * len(self.bases)

    def hold(self, registry: Registry) -> None:
        """Claim the bases that are there. Raises `BackendError` (EPERM) when somebody else has one; then it holds the others."""
        refused: BackendError | None = None
        for place, base in enumerate(self.bases):
            if self.held[place] is not None:
                continue
            try:
                descriptor = registry.descriptor(base, claim=self.claim)
            except BackendError:
                continue  # it is not there
            try:
                descriptor.bdev.attach(descriptor)
            except BackendError as error:
                refused = error
                continue
            descriptor.on_removed = partial(self._let_go, place)
            self.held[place] = descriptor
        if refused is not None:
            raise refused

    def release(self) -> None:
        """Give back what it claimed."""
        for descriptor in self.held:
            if descriptor is not None:
                descriptor.bdev.detach(descriptor)
        self.held = [None] * len(self.bases)

    def _let_go(self, place: int) -> None:
        descriptor = self.held[place]
        assert descriptor is not None
        self.held[place] = None
        descriptor.bdev.detach(descriptor)
        if not any(self.held):
            self.on_bare()
