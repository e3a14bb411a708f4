"""Signals tell a running server what to do: there is no other way. SIGINT and SIGTERM stop the disks, SIGUSR2 lets go of them."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import trio

logger = logging.getLogger("ublk_trio.cli")


@attrs.frozen(kw_only=True)
class Signals:
    """What was asked for so far."""

    #: Cancelled at SIGINT or SIGTERM; around the block that serves.
    stop: trio.CancelScope
    #: Set at SIGUSR2.
    release: trio.Event
    #: For what waits for it; cancelled when the block has ended.
    waiting: trio.Nursery


@asynccontextmanager
async def until_signal() -> AsyncIterator[Signals]:
    """A block that is cancelled at SIGINT or SIGTERM; what is around it goes on then."""
    async with trio.open_nursery() as nursery:
        signals = Signals(stop=trio.CancelScope(), release=trio.Event(), waiting=nursery)
        await nursery.start(_receive, signals)
        with signals.stop:
            yield signals
        nursery.cancel_scope.cancel()


async def _receive(signals: Signals, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGUSR2) as received:
        task_status.started()
        async for number in received:
            if number == signal.SIGUSR2:
                signals.release.set()
            else:
                logger.info("%s: stopping", signal.Signals(number).name)
                signals.stop.cancel()
