"""`RangeLock`: whoever holds a range of a disk is alone on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio


@attrs.define(eq=False)
class _Claim:
    start: int
    end: int
    ended: trio.Event = attrs.Factory(trio.Event)


class RangeLock:
    """Exclusive claims on ranges of bytes, served in the order in which they were made.

    A claim waits for every earlier one that it meets, held or waiting, so none is overtaken for ever; and only for
    earlier ones, so two can't wait for each other as long as nobody who holds one makes another. There are as many
    claims as requests in flight: that bounds the search.
    """

    def __init__(self) -> None:
        self._claims: list[_Claim] = []

    @asynccontextmanager
    async def hold(self, start: int, end: int) -> AsyncIterator[None]:
        """Alone on the bytes from `start` up to `end`, until the block ends. A checkpoint only if it has to wait."""
        earlier = [claim for claim in self._claims if claim.start < end and start < claim.end]
        mine = _Claim(start, end)
        self._claims.append(mine)
        try:
            for claim in earlier:
                await claim.ended.wait()
            yield
        finally:
            self._claims.remove(mine)
            mine.ended.set()
