"""Time limits: an unprivileged server that does not answer is killed, a privileged one is left alone."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs

from tests.sim.mini import Started, machine, opened
from ublk_trio.kernel_sim import SimKernel
from ublk_trio.uapi import ControlCommand, Feature, IoOp

READ = IoOp.READ


@asynccontextmanager
async def answering(*, unprivileged: bool = True, depth: int = 4) -> AsyncIterator[Started]:
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m, opened(m, depth=depth) as device:
        if unprivileged:
            sim = kernel.devices[0]
            sim.info = attrs.evolve(sim.info, flags=sim.info.flags | Feature.UNPRIVILEGED_DEV)
        device.queue.fetch_all()
        path = bytearray(b"/dev/ublkc0\0")
        start = m.control.submit(
            ControlCommand.START_DEV, dev_id=0, data=kernel.server_pid, buffer=path, dev_path_length=len(path)
        )
        assert await start == 0
        yield device


async def test_after_thirty_seconds_the_server_is_killed() -> None:
    """Not a moment before; the operation fails then, and all others with it."""
    async with answering() as device:
        kernel = device.machine.kernel
        first = device.disk.submit(READ, 0, 512)
        kernel.let_time_pass(10)
        second = device.disk.submit(READ, 0, 512)
        kernel.let_time_pass(19.9)
        assert not first.done
        assert not second.done
        kernel.let_time_pass(0.1)
        assert (first.result, second.result) == (-errno.EIO, -errno.EIO)
        assert kernel.devices[0].char is None


async def test_whoever_answers_in_time_lives() -> None:
    """The limit is each request's own: a busy server is not killed, and waiting for a tag does not count."""
    async with answering(depth=1) as device:
        kernel = device.machine.kernel
        bios = [device.disk.submit(READ, 0, 512) for _ in range(4)]
        for _ in bios:
            event = device.queue.event()
            kernel.let_time_pass(29)
            device.queue.commit(event.tag, 512)
        assert [bio.result for bio in bios] == [512] * 4
        kernel.let_time_pass(1000)
        assert kernel.devices[0].char is not None


async def test_a_privileged_server_has_all_the_time() -> None:
    """Its requests wait for ever."""
    async with answering(unprivileged=False) as device:
        bio = device.disk.submit(READ, 0, 512)
        event = device.queue.event()
        device.machine.kernel.let_time_pass(1e6)
        assert not bio.done
        device.queue.commit(event.tag, 512)
        assert bio.result == 512
