"""The simulator's tags, covered: every per-tag command in every state of a tag that the driver knows.

A server without any sense sends commands at random, reaps at random, and now and then is stopped or begins anew. What the driver
thought of each command is counted where it decides, by the tag's flags at that moment. The rings are raw ones, which send anything.

Flags that `ROWS` does not name are an error: a new mode must be given its row, and its cells in `LEGAL`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any
from unittest import mock

from tests.proof.coverage_table import Table
from tests.sim.raw import raw_kernel, raw_server
from ublk_trio.kernel_sim.process import CharFile
from ublk_trio.kernel_sim.queue import CommandRing, SimQueue
from ublk_trio.kernel_sim.tag import TagFlag
from ublk_trio.kernel_sim.uring import SimUring, Sqe
from ublk_trio.uapi import AutoBufRegFlag, Feature, IoCommand, IoOp

SEEDS = range(300)
STEPS = 150
DEPTH = 2
BLOCK = 512
#: Places in the ring's table of buffers.
BUFFERS = 3
#: More rounds of answering everything than there can be requests in a row.
ROUNDS_MAX = 100
#: An address, where there must be none.
_NO_BUSINESS_HERE = 1 << 12

NOT_FETCHED = TagFlag(0)
ROWS = MappingProxyType(
    {
        NOT_FETCHED: "no flag: not fetched",
        TagFlag.ACTIVE: "ACTIVE: a command is pending",
        TagFlag.OWNED_BY_SRV: "OWNED_BY_SRV: a request was delivered",
        TagFlag.OWNED_BY_SRV | TagFlag.AUTO_BUF_REG: "OWNED_BY_SRV, AUTO_BUF_REG: with its buffer registered",
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
#: What a server may send.
LEGAL = frozenset(
    {
        (NOT_FETCHED, IoCommand.FETCH_REQ),
        (TagFlag.OWNED_BY_SRV, IoCommand.COMMIT_AND_FETCH_REQ),
        (TagFlag.OWNED_BY_SRV, IoCommand.REGISTER_IO_BUF),
        (TagFlag.OWNED_BY_SRV | TagFlag.AUTO_BUF_REG, IoCommand.COMMIT_AND_FETCH_REQ),
        (TagFlag.OWNED_BY_SRV | TagFlag.AUTO_BUF_REG, IoCommand.REGISTER_IO_BUF),
        (TagFlag.OWNED_BY_SRV | TagFlag.NEED_GET_DATA, IoCommand.NEED_GET_DATA),
        # Unregistering asks for an index of the ring's, whatever becomes of the tag. In other rows nothing can be registered: of
        # a queue that is not fetched whole, or is stopped, no request has data in use.
        (TagFlag.ACTIVE, IoCommand.UNREGISTER_IO_BUF),
        (TagFlag.OWNED_BY_SRV, IoCommand.UNREGISTER_IO_BUF),
        (TagFlag.OWNED_BY_SRV | TagFlag.AUTO_BUF_REG, IoCommand.UNREGISTER_IO_BUF),
    }
)
#: The ways of moving data that the server tries.
MODES = (
    Feature(0),
    Feature.NEED_GET_DATA,
    Feature.SUPPORT_ZERO_COPY,
    Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG,
)


def table() -> Table[TagFlag, IoCommand]:
    """The table, empty."""
    return Table(rows=list(ROWS), columns=COLUMNS, legal=LEGAL)


@contextmanager
def _counting(counted: Table[TagFlag, IoCommand]) -> Iterator[None]:
    command = SimQueue.command

    def counted_command(queue: SimQueue, ring: CommandRing, number: int, tag: int, *rest: Any) -> int:
        before = queue.tags[tag].flags
        result = command(queue, ring, number, tag, *rest)
        assert result >= 0 or queue.tags[tag].flags == before, "a refused command changes nothing"
        counted.count_result(TagFlag(before), IoCommand(number), result)
        return result

    with mock.patch.object(SimQueue, "command", counted_command):
        yield


class _Server:
    """One device, and a server of it without any sense."""

    def __init__(self, generator: random.Random) -> None:
        self.random = generator
        mode = generator.choice(MODES)
        #: The driver moves the data, between requests and the buffers that commands name.
        self.copies = not mode & Feature.SUPPORT_ZERO_COPY
        self.kernel = raw_kernel()
        self.server = raw_server(self.kernel, depth=DEPTH, flags=mode, copies=self.copies, live=False)
        self.server.ring.register_buffers(BUFFERS)

    def live(self) -> None:
        server = self.server
        for _ in range(STEPS):
            self.step()
        self.close()
        assert server.control.delete(server.info.dev_id) == 0
        assert self.kernel.device_ids() == []

    def close(self) -> None:
        self.server.ring.close()
        self.server.char.close()

    def open(self) -> None:
        server = self.server
        char = server.process.open(self.kernel.char_path(server.info.dev_id))
        assert isinstance(char, CharFile)
        server.char = char
        server.rings = [SimUring(server.tasks[0])]
        server.ring.register_buffers(BUFFERS)

    def step(self) -> None:
        server = self.server
        what = self.random.randrange(40)
        if what < 20:
            # One after the other, before anything is delivered.
            server.ring.submit([self.any_command() for _ in range(1 + self.random.randrange(3))])
        elif what < 28:
            server.ring.reap()
        elif what < 36:
            self.submit()
        elif what < 38:
            self.start()
        elif what < 39:
            self.finish()
            assert server.control.stop(server.info.dev_id) == 0
        else:
            self.close()
            self.open()

    def any_command(self) -> Sqe:
        return self.sqe(
            self.random.choice(COLUMNS), self.random.randrange(DEPTH), careless=self.random.randrange(3) == 0
        )

    def sqe(self, command: IoCommand, tag: int, *, careless: bool = False) -> Sqe:
        """The command as it should be, or with another address."""
        server = self.server
        index = self.random.randrange(BUFFERS)
        if command in (IoCommand.REGISTER_IO_BUF, IoCommand.UNREGISTER_IO_BUF):
            addr = index
        elif self.copies:
            addr = 0 if careless else server.buffers[0][tag]
        else:
            addr = _NO_BUSINESS_HERE if careless else 0
        fallback = AutoBufRegFlag.FALLBACK << 16 if self.random.randrange(2) else 0
        return server.io_sqe(command, tag, result=BLOCK, addr=addr, sqe_addr=index | fallback)

    def submit(self) -> None:
        """An application's READ or WRITE."""
        disk = self.server.disk
        if self.random.randrange(2):
            disk.submit(IoOp.WRITE, 0, bytes(BLOCK))
        else:
            disk.submit(IoOp.READ, 0, BLOCK)

    def start(self) -> None:
        """START_DEV, interrupted if it waits for tags."""
        control = self.server.control
        control.start(self.server.info.dev_id)
        self.kernel.interrupt(control.ring)
        control.ring.reap()

    def finish(self) -> None:
        """Answer everything, and give every buffer back, or STOP_DEV would wait."""
        server = self.server
        for _ in range(ROUNDS_MAX):
            disk = self.kernel.devices[server.info.dev_id].disk
            if disk is None or not disk.bios:
                return
            server.ring.reap()
            for tag in range(DEPTH):
                server.ring.submit([self.sqe(command, tag) for command in COLUMNS[1:3]])
            server.ring.submit([server.io_sqe(IoCommand.UNREGISTER_IO_BUF, 0, addr=index) for index in range(BUFFERS)])
        raise AssertionError(f"what is answered does not end: {self.kernel.leftovers()}")


def covered() -> Table[TagFlag, IoCommand]:
    """The table after all runs."""
    counted = table()
    with _counting(counted):
        for seed in SEEDS:
            _Server(random.Random(seed)).live()
    return counted
