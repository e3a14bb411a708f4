"""Simulated requests a second: ``python bench/simulator.py``. Needs no kernel and no root.

Applications read 4 KiB each at the given depth, from a null disk, on a calm simulated machine. The first row is the simulator alone, with a server
of ten lines straight on the ring; the second goes through the whole engine, served inline. Compare rows, and runs of one machine, as ratios.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

import trio

from ublk_trio import DeviceOptions, Null, SimKernel, open_target
from ublk_trio.kernel_sim import SimBlockDevice
from ublk_trio.ring import EVENT, QueueRing, pack_answer
from ublk_trio.uapi import (
    ANY_DEVICE_ID,
    ControlCommand,
    DevInfo,
    IoCommand,
    IoOp,
    Params,
    ParamsBasic,
)

SIZE = 1 << 30
READ_BYTES = 4096


async def serve_null(ring: QueueRing) -> None:
    """Answers every request as a null disk would, until the kernel has ended every tag."""
    commit = pack_answer(IoCommand.COMMIT_AND_FETCH_REQ, 0)
    ring.commit([pack_answer(IoCommand.FETCH_REQ, tag) for tag in range(ring.depth)])
    alive = ring.depth
    while alive:
        events = ring.reap()
        answers = []
        for tag, _, result, _, nr_sectors, _ in EVENT.iter_unpack(events):
            if result < 0:
                alive -= 1
            else:
                answers.append((nr_sectors << 41) | commit | tag)
        ring.commit(answers)
        if events:
            await trio.lowlevel.checkpoint()
        else:
            await ring.wait()


@asynccontextmanager
async def bare(depth: int) -> AsyncIterator[SimBlockDevice]:
    """A disk without an engine."""
    kernel = SimKernel(partition_scan=False)
    async with kernel.open_control() as control:
        info = DevInfo(dev_id=ANY_DEVICE_ID, nr_hw_queues=1, queue_depth=depth, max_io_buf_bytes=1 << 19)
        buffer = bytearray(info.pack())
        assert await control.submit(ControlCommand.ADD_DEV, dev_id=ANY_DEVICE_ID, buffer=buffer) == 0
        info = DevInfo.unpack(buffer)
        params = Params(basic=ParamsBasic(dev_sectors=SIZE >> 9, max_sectors=1 << 10))
        assert await control.submit(ControlCommand.SET_PARAMS, dev_id=0, buffer=bytearray(params.pack())) == 0
        char = await kernel.open_char_device(info, ioctl_encoded=True)
        ring = char.open_queue(0, buffers=depth)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_null, ring)
            assert await control.submit(ControlCommand.START_DEV, dev_id=0, data=kernel.server_pid) == 0
            yield kernel.block_device(0)
            assert await control.submit(ControlCommand.STOP_DEV, dev_id=0) == 0
        ring.close()
        char.close()


@asynccontextmanager
async def engine(depth: int) -> AsyncIterator[SimBlockDevice]:
    """A disk of the whole engine, served inline."""
    kernel = SimKernel(partition_scan=False)
    async with open_target(kernel) as target:
        device = await target.start_device(Null(SIZE), DeviceOptions(serve="inline", depth=depth))
        yield kernel.block_device(device.dev_id)


async def rate(
    disk_of: Callable[[int], AbstractAsyncContextManager[SimBlockDevice]], *, depth: int, requests: int
) -> float:
    """Requests per second of CPU time."""
    async with disk_of(depth) as disk:
        blocks = SIZE // READ_BYTES
        begin = time.process_time()
        for batch in range(requests // depth):
            bios = [
                disk.submit(IoOp.READ, (batch * depth + i) * 7919 % blocks * READ_BYTES, READ_BYTES)
                for i in range(depth)
            ]
            for bio in bios:
                if not bio.done:
                    await bio.wait()
            assert all(bio.result == READ_BYTES for bio in bios)
        return requests // depth * depth / (time.process_time() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=128)
    parser.add_argument("--requests", type=int, default=50_000)
    arguments = parser.parse_args()
    first = 0.0
    print(f"{'server':<8} {'requests/s':>11} {'µs/request':>11} {'ratio':>6}")
    for disk_of in (bare, engine):
        run = partial(rate, disk_of, depth=arguments.depth, requests=arguments.requests)
        best = max(trio.run(run) for _ in range(3))
        first = first or best
        print(f"{disk_of.__name__:<8} {best:>11.0f} {1e6 / best:>11.1f} {best / first:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
