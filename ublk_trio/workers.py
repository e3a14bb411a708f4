"""The workers of a target, and which of them gets the next queue: one after the other, on and on across devices."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

from ublk_trio.errors import UsageError
from ublk_trio.ring import Kernel, Worker


class Workers:
    """Made by `open_workers`, never directly."""

    def __init__(self, workers: tuple[Worker, ...]) -> None:
        assert workers
        self.all = workers
        self._placed = 0

    def next(self) -> Worker:
        """Whose turn it is. Every call is a queue that was placed, whatever becomes of it."""
        worker = self.all[self._placed % len(self.all)]
        self._placed += 1
        return worker


@contextmanager
def open_workers(kernel: Kernel, cpus: Collection[int] | None) -> Iterator[Workers | None]:
    """A worker on each of the CPUs, by number; None without any. Their queues must be closed before the end of the block.

    Raises `UsageError` for an empty set and negative numbers, `KernelError` (EINVAL) for a CPU on which this process may not run or that is offline.
    """
    if cpus is None:
        yield None
        return
    if not cpus or min(cpus) < 0:
        raise UsageError(f"workers need CPUs, by number: {cpus!r} is none; without workers give None")
    with ExitStack() as stack:
        workers = []
        for cpu in sorted(frozenset(cpus)):
            worker = kernel.open_worker(cpu)
            stack.callback(worker.close)
            workers.append(worker)
        yield Workers(tuple(workers))
