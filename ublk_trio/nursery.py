"""Nurseries that raise a single plain error plainly.

Trio's nurseries raise an `ExceptionGroup` always. A user of ``async with open_target(...)`` does not see our
nurseries and must not have to know of them: if there is one error, that is what comes out; a group comes out only
when there really are several.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


def single_error(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The one exception that a group is about, or None when it holds several.

    `trio.Cancelled` beside an error is only the noise of the nursery's unwinding and does not count; a group of
    nothing else is one `Cancelled`.
    """
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        exception = pending.pop()
        if isinstance(exception, BaseExceptionGroup):
            pending.extend(exception.exceptions)
        else:
            leaves.append(exception)
    errors = [leaf for leaf in leaves if not isinstance(leaf, trio.Cancelled)]
    if not errors:
        return leaves[0]
    return errors[0] if len(errors) == 1 else None


@asynccontextmanager
async def open_plain_nursery() -> AsyncIterator[trio.Nursery]:
    """`trio.open_nursery`, but a group that is about one error comes out as that error."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        error = single_error(group)
        if error is None:
            raise
        # The group says nothing that the error does not: drop it from the traceback, keep the error's own history.
        cause, context, quiet = error.__cause__, error.__context__, error.__suppress_context__
        try:
            raise error
        finally:
            error.__cause__, error.__context__, error.__suppress_context__ = cause, context, quiet
            del error, group
