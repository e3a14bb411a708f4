"""`run_together`: several calls of bases side by side, each to its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from ublk_trio.nursery import open_plain_nursery

#: A call of a base, not made yet.
Call = Callable[[], Awaitable[None]]


async def run_together(calls: Sequence[Call]) -> None:
    """Makes all calls at once, and returns when all have ended.

    A failure does not cancel the others: a write that is cut off leaves its base with who knows what. Of several
    failures the one of the first call is raised. Only when the caller is cancelled, the calls are.
    """
    if len(calls) == 1:
        await calls[0]()
        return
    failures: dict[int, Exception] = {}

    async def make(number: int) -> None:
        try:
            await calls[number]()
        except Exception as failure:
            failures[number] = failure

    async with open_plain_nursery() as nursery:
        for number in range(len(calls)):
            nursery.start_soon(make, number)
    if failures:
        raise failures[min(failures)]
