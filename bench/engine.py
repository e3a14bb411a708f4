"""CPU nanoseconds a request of the engine alone: ``python bench/engine.py``. Needs no kernel and no root.

A ring that always has a whole batch ready takes the kernel's place, so that what is measured is a queue's own work: taking in an event, calling the
backend, answering. Compare rows of one run as ratios.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import trio

from ublk_trio.backends import Backend, Memory, Null, as_async
from ublk_trio.handlers import Handlers, Serve
from ublk_trio.options import DataMode
from ublk_trio.queue import Queue
from ublk_trio.ring import EVENT, NO_SLOT, RingStatistics
from ublk_trio.uapi import IO_RES_ABORT, IoOp

BUFFER_BYTES = 4096


class EndlessRing:
    """A queue ring whose kernel answers each commit with the next batch of reads, ``batches`` times, then aborts every tag."""

    def __init__(self, *, depth: int, batches: int) -> None:
        self.queue_id = 0
        self.depth = depth
        self.worker = None
        self.untaken = 0
        arena = memoryview(bytearray(depth * BUFFER_BYTES))
        self.buffers: Sequence[memoryview] = [
            arena[tag * BUFFER_BYTES : (tag + 1) * BUFFER_BYTES] for tag in range(depth)
        ]
        self.slots = memoryview(bytearray(2 * depth)).cast("H")
        self.slots[:] = memoryview(bytearray(NO_SLOT.to_bytes(2, "little") * depth)).cast("H")
        reads = (EVENT.pack(tag, 0, 0, IoOp.READ, BUFFER_BYTES >> 9, tag * 8) for tag in range(depth))
        aborts = (EVENT.pack(tag, 0, IO_RES_ABORT, 0, 0, 0) for tag in range(depth))
        self._reads = memoryview(b"".join(reads))
        self._aborts = memoryview(b"".join(aborts))
        self._left = batches

    def reap(self) -> memoryview:
        self._left -= 1
        if self._left >= 0:
            return self._reads
        return self._aborts if self._left == -1 else self._aborts[:0]

    def commit(self, answers: list[int]) -> None:
        assert len(answers) == self.depth, "a batch is answered whole"

    def copy_in(self, tag: int) -> int:
        raise AssertionError("user copy is not measured here")

    async def wait(self) -> None:
        await trio.lowlevel.checkpoint()

    def statistics(self) -> RingStatistics:
        return RingStatistics(reaps=0, events=0, commits=0, answers=0, waits=0)

    def close(self) -> None:
        pass


def nanoseconds(backend: Backend, serve: Serve, *, depth: int, batches: int) -> float:
    """CPU time of one request."""
    served = as_async(backend) if serve == "async" else backend
    trio.run(served.open)
    queue = Queue(
        EndlessRing(depth=depth, batches=batches), Handlers(served, read_only=False), serve=serve, mode=DataMode.COPY
    )

    def fail(queue: Queue, error: BaseException) -> None:
        raise error

    begin = time.process_time_ns()
    trio.run(queue.run, fail)
    return (time.process_time_ns() - begin) / (depth * batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=128)
    parser.add_argument("--batches", type=int, default=2000)
    arguments = parser.parse_args()
    ways: tuple[Serve, ...] = ("inline", "async")
    first = 0.0
    print(f"{'backend':<10} {'serve':<8} {'ns/request':>10} {'ratio':>6}")
    for backend in (Null(1 << 20), Memory(1 << 20)):
        for serve in ways:
            best = min(nanoseconds(backend, serve, depth=arguments.depth, batches=arguments.batches) for _ in range(3))
            first = first or best
            print(f"{type(backend).__name__:<10} {serve:<8} {best:>10.0f} {best / first:>6.2f}")


if __name__ == "__main__":
    main()
