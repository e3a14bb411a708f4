"""The engine's tag table, covered: queues of the engine on a kernel that does whatever the table allows, and now and then more.

The kernel here is a `ScriptedRing`: it knows nothing but whose turn each tag is, and picks one of the completions that may come then.
Any kernel that keeps to the table behaves like one of its runs. In every third run it also sends one completion that the
table forbids: the engine must refuse that, leave the tag alone, and end in good order.

Everything is drawn from a seeded generator of Python's, so the counts are the same on every machine.
"""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import MappingProxyType
from unittest import mock

import trio

from tests.proof.coverage_table import Table
from ublk_trio import Backend, DataMode
from ublk_trio.arena import make_slots
from ublk_trio.errors import IllegalTagEventError, KernelError
from ublk_trio.handlers import Handlers
from ublk_trio.kernel_sim import FirstChoice, scheduled_by
from ublk_trio.queue import Queue
from ublk_trio.ring import EVENT, NO_SLOT, RingStatistics, unpack_answer
from ublk_trio.tag import TRANSITIONS, TagEvent, Tags, TagState
from ublk_trio.uapi import IO_RES_ABORT, IO_RES_NEED_GET_DATA, IO_RES_OK, IoCommand, IoOp

SEEDS = range(600)
#: After so many reaps the kernel aborts every tag that it owns.
REAPS_MAX = 40
_BUFFER_BYTES = 4096
_REFUSAL = -errno.EINVAL
_RESULT_OF = {
    TagEvent.DELIVERED: IO_RES_OK,
    TagEvent.WRITE_ANNOUNCED: IO_RES_NEED_GET_DATA,
    TagEvent.ABORTED: IO_RES_ABORT,
    TagEvent.REFUSED: _REFUSAL,
}
#: Legal, but no queue of the engine ever does it.
ELSEWHERE = MappingProxyType(
    {
        (TagState.UNFETCHED, TagEvent.RING_CLOSED): "a queue fetches all its tags in one go, before it uses its ring "
        "for the first time: when it finds the ring closed, no tag is unfetched any more. The step is taken on the table alone."
    }
)


class ScriptedRing:
    """`ring.QueueRing`, with a generator for a kernel."""

    def __init__(self, generator: random.Random, *, depth: int, buffers: int, announces: bool, breaks: bool) -> None:
        self._random = generator
        self._announces = announces
        self._breaks = breaks
        self._closed = self._refused = False
        self._reaps = 0
        #: Each tag's command that is with the kernel.
        self._pending: list[IoCommand | None] = [None] * depth
        self.queue_id = 0
        self.depth = depth
        self.worker = None
        self.untaken = 0
        self.buffers = [memoryview(bytearray(_BUFFER_BYTES)) for _ in range(buffers)]
        self.slots = make_slots(depth=depth, buffers=buffers)
        #: The tags of the queue that is under test.
        self.tags: Tags | None = None

    def commit(self, answers: list[int]) -> None:
        if self._closed or self._one_in(2 if self._refused else 200):
            self.close()
            raise trio.ClosedResourceError
        for answer in answers:
            command, tag, _ = unpack_answer(answer)
            assert self._pending[tag] is None, f"tag {tag}: two commands at a time"
            self._pending[tag] = IoCommand(command)

    def copy_in(self, tag: int) -> int:
        assert self._pending[tag] is None, f"tag {tag}: a copy while the kernel has it"
        assert self.slots[tag] != NO_SLOT, f"tag {tag}: a copy into nowhere"
        if self._closed:
            raise trio.ClosedResourceError
        return -errno.EIO if self._one_in(10) else 0

    def reap(self) -> memoryview:
        if self._closed:
            raise trio.ClosedResourceError
        self._reaps += 1
        ending = self._reaps > REAPS_MAX
        events = b"".join(
            self._complete(tag, command, ending=ending)
            for tag, command in enumerate(self._pending)
            if command is not None and (ending or self._one_in(2))
        )
        if not events and self._breaks:
            events = self._break_the_contract()
        return memoryview(events)

    def _complete(self, tag: int, command: IoCommand, *, ending: bool) -> bytes:
        self._pending[tag] = None
        if ending or self._one_in(30):
            return EVENT.pack(tag, 0, IO_RES_ABORT, 0, 0, 0)
        if self._one_in(100):
            self._refused = True
            return EVENT.pack(tag, 0, _REFUSAL, 0, 0, 0)
        if command is IoCommand.NEED_GET_DATA:
            return EVENT.pack(tag, 0, IO_RES_OK, IoOp.WRITE, 1, 0)
        op = self._random.choice((IoOp.READ, IoOp.WRITE, IoOp.FLUSH))
        result = IO_RES_NEED_GET_DATA if self._announces and op is IoOp.WRITE else IO_RES_OK
        return EVENT.pack(tag, 0, result, op, 0 if op is IoOp.FLUSH else 1, 0)

    def _break_the_contract(self) -> bytes:
        assert self.tags is not None
        # Not for a tag that is being served: its answer may be on its way, and then the completion would be right.
        wrong = [
            (tag, result)
            for tag in range(self.depth)
            for event, result in _RESULT_OF.items()
            if self.tags[tag] is not TagState.SERVING and event not in TRANSITIONS[self.tags[tag]]
        ]
        if not wrong:
            return b""
        self._breaks = False
        tag, result = self._random.choice(wrong)
        return EVENT.pack(tag, 0, result, IoOp.READ, 1, 0)

    async def wait(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._one_in(100):
            self.close()
        if self._closed:
            raise trio.ClosedResourceError

    def statistics(self) -> RingStatistics:
        raise NotImplementedError

    def close(self) -> None:
        self._closed = True

    def _one_in(self, times: int) -> bool:
        return not self._random.randrange(times)


class PlainDisk(Backend):
    """Answers at once."""

    size = 1 << 20

    def read(self, offset: int, buffer: memoryview) -> None:
        pass

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        pass

    def flush(self) -> None:
        pass


class SuspendingDisk(Backend):
    """Answers a little later, now and then."""

    size = 1 << 20

    def __init__(self, generator: random.Random) -> None:
        self._random = generator

    async def read(self, offset: int, buffer: memoryview) -> None:
        await self._suspend()

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        await self._suspend()

    async def flush(self) -> None:
        await self._suspend()

    async def _suspend(self) -> None:
        for _ in range(self._random.randrange(4)):
            await trio.lowlevel.checkpoint()


def run(seed: int) -> None:
    """One queue's life. Raises what it must not end with."""
    generator = random.Random(seed)
    suspending, mode, breaks = seed % 2 == 1, tuple(DataMode)[seed // 6 % 3], seed % 3 == 0
    announces = mode is DataMode.GET_DATA
    depth = 1 + generator.randrange(4)
    buffers = depth if mode is DataMode.COPY else 1 + generator.randrange(depth)
    ring = ScriptedRing(generator, depth=depth, buffers=buffers, announces=announces, breaks=breaks)
    backend: Backend = SuspendingDisk(generator) if suspending else PlainDisk()
    failures: list[BaseException] = []

    async def serve() -> None:
        handlers = Handlers(backend, read_only=False)
        queue = Queue(ring, handlers, serve="async" if suspending else "inline", mode=mode)
        ring.tags = queue.tags
        raised: list[BaseException] = []
        try:
            await queue.run(lambda queue, failure: failures.append(failure))
        except (KernelError, IllegalTagEventError) as error:
            raised.append(error)
        assert failures == raised, "whoever has to act was told at once"
        assert queue.tags.all_ended or queue.must_close, "a queue ends when its tags have, or says that it cannot"

    with scheduled_by(FirstChoice()):
        trio.run(serve)
    assert breaks or not any(isinstance(failure, IllegalTagEventError) for failure in failures), failures


def table() -> Table[TagState, TagEvent]:
    """The engine's table, empty."""
    legal = {(state, event) for state, row in TRANSITIONS.items() for event in row}
    return Table(rows=list(TagState), columns=list(TagEvent), legal=legal, elsewhere=ELSEWHERE)


@contextmanager
def counting(counted: Table[TagState, TagEvent]) -> Iterator[None]:
    """Count every step of every tag, whoever takes it."""
    step = Tags.step

    def counted_step(tags: Tags, tag: int, event: TagEvent) -> TagState:
        before = tags[tag]
        try:
            after = step(tags, tag, event)
        except IllegalTagEventError:
            assert tags[tag] is before, "a refused event changes nothing"
            counted.count(before, event, "rejected")
            raise
        counted.count(before, event)
        return after

    with mock.patch.object(Tags, "step", counted_step):
        yield


def try_on_the_table_alone(counted: Table[TagState, TagEvent]) -> None:
    """Bring a tag into each state, by the table, and try there what is illegal, and what no queue does."""
    for state, path in _shortest_paths().items():
        for event in TagEvent:
            if event in TRANSITIONS[state] and (state, event) not in ELSEWHERE:
                continue
            tags = Tags(queue_id=0, depth=1)
            for happened in path:
                tags.step(0, happened)
            assert tags[0] is state
            with counting(counted), suppress(IllegalTagEventError):
                tags.step(0, event)


def _shortest_paths() -> dict[TagState, list[TagEvent]]:
    paths: dict[TagState, list[TagEvent]] = {TagState.UNFETCHED: []}
    while len(paths) < len(TagState):
        for state, path in list(paths.items()):
            for event, after in TRANSITIONS[state].items():
                paths.setdefault(after, [*path, event])
    return paths


def covered() -> Table[TagState, TagEvent]:
    """The table after all runs."""
    counted = table()
    logging.disable(logging.CRITICAL)  # planned failures, each with its traceback
    try:
        with counting(counted):
            for seed in SEEDS:
                run(seed)
    finally:
        logging.disable(logging.NOTSET)
    reached = [cell for cell in ELSEWHERE if counted.accepted[cell]]
    assert not reached, f"it is said that no queue does this: {reached}"
    try_on_the_table_alone(counted)
    return counted
