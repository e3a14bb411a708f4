"""The simulator's tags, covered: every per-tag command in every state of a tag that the driver knows.

A server without any sense sends commands at random, reaps at random, and now and then is stopped or begins anew. What the driver
thought of each command is counted where it decides, by the tag's flags at that moment.

A mode joins with its feature: once the simulator offers it, `LEGAL` demands its cells, and flags that `ROWS` does not name are an error.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any
from unittest import mock

import trio
from trio.testing import wait_all_tasks_blocked

from tests.proof.coverage_table import Table
from tests.sim.mini import Machine, basic_params, machine
from ublk_trio.kernel_sim import FirstChoice, SimKernel, scheduled_by
from ublk_trio.kernel_sim.queue import SimQueue
from ublk_trio.kernel_sim.ring import SimCharDevice, SimQueueRing
from ublk_trio.kernel_sim.tag import TagFlag
from ublk_trio.kernel_sim.version import MODELLED
from ublk_trio.ring import NO_SLOT, pack_answer
from ublk_trio.uapi import Feature, IoCommand, IoOp

SEEDS = range(120)
STEPS = 150
DEPTH = 2
BLOCK = 512

NOT_FETCHED = TagFlag(0)
ROWS = MappingProxyType(
    {
        NOT_FETCHED: "no flag: not fetched",
        TagFlag.ACTIVE: "ACTIVE: a command is pending",
        TagFlag.OWNED_BY_SRV: "OWNED_BY_SRV: a request was delivered",
        TagFlag.OWNED_BY_SRV | TagFlag.NEED_GET_DATA: "OWNED_BY_SRV, NEED_GET_DATA: a WRITE was announced",
        TagFlag.ACTIVE | TagFlag.NEED_GET_DATA: "ACTIVE, NEED_GET_DATA: its data is on its way",
        TagFlag.ACTIVE | TagFlag.CANCELED: "ACTIVE, CANCELED: it ended with ABORT",
    }
)
COLUMNS = (
    IoCommand.FETCH_REQ,
    IoCommand.COMMIT_AND_FETCH_REQ,
    IoCommand.NEED_GET_DATA,
    IoCommand.REGISTER_IO_BUF,
    IoCommand.UNREGISTER_IO_BUF,
)
#: What a server may send, and the feature that it takes.
LEGAL = MappingProxyType(
    {
        (NOT_FETCHED, IoCommand.FETCH_REQ): Feature(0),
        (TagFlag.OWNED_BY_SRV, IoCommand.COMMIT_AND_FETCH_REQ): Feature(0),
        (TagFlag.OWNED_BY_SRV | TagFlag.NEED_GET_DATA, IoCommand.NEED_GET_DATA): Feature.NEED_GET_DATA,
        (TagFlag.OWNED_BY_SRV, IoCommand.REGISTER_IO_BUF): Feature.SUPPORT_ZERO_COPY,
        # Unregistering asks for an index of the ring's, whatever becomes of the tag.
        **{(row, IoCommand.UNREGISTER_IO_BUF): Feature.SUPPORT_ZERO_COPY for row in ROWS},
    }
)
#: The ways of moving data that the server tries, as far as the simulator has them.
MODES = tuple(mode for mode in (Feature(0), Feature.NEED_GET_DATA, Feature.SUPPORT_ZERO_COPY) if not mode & ~MODELLED)


def table() -> Table[TagFlag, IoCommand]:
    """The table, empty."""
    legal = {cell for cell, feature in LEGAL.items() if not feature & ~MODELLED}
    return Table(rows=list(ROWS), columns=COLUMNS, legal=legal)


@contextmanager
def _counting(counted: Table[TagFlag, IoCommand]) -> Iterator[None]:
    command = SimQueue.command

    def counted_command(queue: SimQueue, ring: SimQueueRing, number: int, tag: int, *rest: Any) -> int:
        before = queue.tags[tag].flags
        result = command(queue, ring, number, tag, *rest)
        assert not result or queue.tags[tag].flags == before, "a refused command changes nothing"
        counted.count_result(TagFlag(before), IoCommand(number), result)
        return result

    with mock.patch.object(SimQueue, "command", counted_command):
        yield


class _Server:
    """One device, and a server of it without any sense."""

    def __init__(self, machine: Machine, generator: random.Random) -> None:
        self.machine = machine
        self.random = generator
        self.char: SimCharDevice | None = None
        self.ring: SimQueueRing | None = None

    async def live(self) -> None:
        self.info = await self.machine.add(depth=DEPTH, flags=self.random.choice(MODES))
        assert await self.machine.set_params(self.info.dev_id, basic_params()) == 0
        await self.open()
        for _ in range(STEPS):
            await self.step()
        self.close()
        assert await self.machine.delete(self.info.dev_id) == 0

    async def open(self) -> None:
        self.char = await self.machine.kernel.open_char_device(self.info, ioctl_encoded=True)
        self.ring = self.char.open_queue(0, buffers=DEPTH)

    def close(self) -> None:
        assert self.ring is not None
        assert self.char is not None
        self.ring.close()
        self.char.close()

    async def step(self) -> None:
        assert self.ring is not None
        what = self.random.randrange(40)
        if what < 20:
            self.send(self.random.choice(COLUMNS), self.random.randrange(DEPTH))
        elif what < 28:
            self.ring.reap()
        elif what < 36:
            self.submit()
        elif what < 38:
            await self.start()
        elif what < 39:
            self.finish()
            await self.machine.stop(self.info.dev_id)
        else:
            self.close()
            await self.open()

    def send(self, command: IoCommand, tag: int) -> None:
        assert self.ring is not None
        self.ring.slots[tag] = self.random.choice((tag, tag, NO_SLOT))
        self.ring.commit([pack_answer(command, tag, BLOCK if command is IoCommand.COMMIT_AND_FETCH_REQ else 0)])

    def submit(self) -> None:
        disk = self.machine.kernel.block_device(self.info.dev_id)
        if self.random.randrange(2):
            disk.submit(IoOp.WRITE, 0, bytes(BLOCK))
        else:
            disk.submit(IoOp.READ, 0, BLOCK)

    async def start(self) -> None:
        """START_DEV, interrupted if it waits for tags."""
        async with trio.open_nursery() as nursery, machine(self.machine.kernel) as other:
            nursery.start_soon(other.start, self.info.dev_id)
            await wait_all_tasks_blocked()

    def finish(self) -> None:
        """Answer everything, or STOP_DEV would wait."""
        assert self.ring is not None
        disk = self.machine.kernel.block_device(self.info.dev_id)
        while disk.exists and self.machine.kernel.devices[self.info.dev_id].unanswered:
            for tag in range(DEPTH):
                self.ring.reap()
                self.ring.slots[tag] = tag
                self.ring.commit([pack_answer(command, tag, BLOCK) for command in COLUMNS[1:3]])


def covered() -> Table[TagFlag, IoCommand]:
    """The table after all runs."""
    counted = table()

    async def serve(seed: int) -> None:
        async with machine(SimKernel(partition_scan=False)) as m:
            await _Server(m, random.Random(seed)).live()

    with _counting(counted), scheduled_by(FirstChoice()):
        for seed in SEEDS:
            trio.run(serve, seed)
    return counted
