"""A disk under test: what is known of it, what applications ask of it, and what must hold of it."""

from __future__ import annotations

import errno
import operator
from collections.abc import Callable

import attrs
import trio

from tests.property.disks import BLOCK, Disk, content_of
from tests.property.model import ZEROES, ByteModel, Name, Operation, demand
from tests.property.plans import Ask, DiskPlan
from ublk_trio import Device
from ublk_trio.kernel_sim import SimBlockDevice
from ublk_trio.kernel_sim.device import SimDevice
from ublk_trio.kernel_sim.tag import ACTIVE, CANCELED, NEED_GET_DATA, OWNED_BY_SRV, SimTag, TagFlag
from ublk_trio.queue import Queue
from ublk_trio.ring import NO_SLOT
from ublk_trio.tag import TagState
from ublk_trio.uapi import IoOp

OPS: dict[Name, IoOp] = {
    "read": IoOp.READ,
    "write": IoOp.WRITE,
    "flush": IoOp.FLUSH,
    "discard": IoOp.DISCARD,
    "write_zeroes": IoOp.WRITE_ZEROES,
}
_DATA_OPS = (IoOp.READ, IoOp.WRITE)
_SERVING = frozenset({TagState.SERVING})


@attrs.define(eq=False, kw_only=True)
class Served:
    """A disk under test, with what is known of it."""

    number: int
    plan: DiskPlan
    disk: Disk
    model: ByteModel
    start_scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    start_ended: bool = False
    stop_scopes: list[trio.CancelScope] = attrs.Factory(list)
    stops_running: int = 0
    device: Device | None = None
    sim: SimDevice | None = None
    block_device: SimBlockDevice | None = None
    stopping: bool = False
    #: When it was asked to stop, or the last operation ended since.
    progress_time: float = 0.0
    errors: list[BaseException] = attrs.Factory(list)

    def __str__(self) -> str:
        return f"disk {self.number}"

    @property
    def present(self) -> bool:
        """Starting, live or stopping."""
        return not self.start_ended or (self.device is not None and not self.device._closed.is_set())

    @property
    def live(self) -> bool:
        return self.device is not None and not self.stopping

    def begin_stop(self, now: float) -> None:
        """From now on its operations may fail."""
        if not self.stopping:
            self.stopping = True
            self.progress_time = now

    # What applications ask -------------------------------------------------------------------------------------------

    def submit(self, ask: Ask, next_write: Callable[[], int]) -> None:
        """An application's operation; ``next_write`` numbers a write, and so its content."""
        assert self.block_device is not None
        blocks = self.plan.blocks
        first = min(ask.block, blocks - 1)
        count = min(ask.blocks, blocks - first) if ask.name != "flush" else 0
        offset, length = (first * BLOCK, count * BLOCK) if count else (0, 0)
        contents: list[bytes] = []
        if ask.name == "write":
            number = next_write()
            contents = [content_of(number, block) for block in range(first, first + count)]
        elif ask.name in ("discard", "write_zeroes"):
            contents = [ZEROES] * count
        data: bytes | int = b"".join(contents) if ask.name == "write" else length
        failures_before = len(self.disk.failures)
        bio = self.block_device.submit(OPS[ask.name], offset, data, fua=ask.fua)
        if bio.done:
            self._check_refusal(ask, bio.result, length)
            return
        self.model.begin(
            Operation(
                name=ask.name,
                bio=bio,
                offset=offset,
                length=length,
                fua=ask.fua and ask.name == "write",
                failures_before=failures_before,
                contents=contents,
            )
        )

    def _check_refusal(self, ask: Ask, result: int | None, length: int) -> None:
        plan = self.plan
        if self.stopping and result in (-errno.EIO, -errno.ENXIO):
            return
        if ask.name == "flush":
            expected = 0 if "flush" in plan.unsupported or plan.read_only else None
        elif ask.name == "discard" and ("discard" in plan.unsupported or plan.read_only):
            # What is not offered is refused first, and a read-only disk offers none.
            expected = -errno.EOPNOTSUPP
        elif plan.read_only and ask.name != "read":
            expected = -errno.EPERM
        else:
            expected = None
        demand(result == expected, "the result is right", f"{ask} of {length} bytes ended at once with {result}")

    def check_operations(self, now: float) -> None:
        """Take in what has ended since the last time: is it right?"""
        ended = [operation for operation in self.model.in_flight if operation.bio.done]
        for operation in ended:
            self.model.end(operation, may_fail=self.stopping)
        if ended:
            self.progress_time = now

    # Its tags and buffers --------------------------------------------------------------------------------------------

    def check_device(self, *, idle: bool) -> None:
        """Engine and simulator say the same of each tag; each buffer is in one place."""
        device, sim = self.device, self.sim
        if device is None or sim is None or len(sim.rings) != len(device._queues):
            return  # not up yet, or being taken down
        serving = 0
        # What a worker has and has not sent yet.
        has_handed = {ring.queue_id: bool(ring._handed) for ring in sim.rings}
        for queue, sim_queue in zip(device._queues, sim.queues, strict=True):
            handed = has_handed[queue.queue_id]
            unsent = bool(queue._answers) or handed
            unseen = operator.length_hint(queue.events) > 0
            for state, sim_tag in zip(queue.tags._states, sim_queue.tags, strict=True):
                # The tags that rest are most of them.
                if not (state is TagState.FETCHING and sim_tag.flags == ACTIVE and sim_tag.request is None):
                    self._check_tag(queue, state, sim_tag, idle=idle, unsent=unsent, unseen=unseen, handed=handed)
            if queue._pool is not None:
                self._check_pool(queue)
            if idle:
                demand(not queue._answers, "the tag tables agree", f"{self}: answers were not sent")
                serving += sum(self._is_served(queue, tag) for tag in queue.tags.in_states(_SERVING)) - len(queue.line)
        if idle:
            running = [call for call in self.disk.running if call.name not in ("open", "close")]
            demand(
                serving == len(running),
                "the tag tables agree",
                f"{self}: {serving} requests are being served, by {len(running)} calls",
            )

    @staticmethod
    def _is_served(queue: Queue, tag: int) -> bool:
        return queue._pool is None or queue._requests[tag].op not in _DATA_OPS or queue.ring.slots[tag] != NO_SLOT

    def _check_tag(
        self, queue: Queue, state: TagState, sim: SimTag, *, idle: bool, unsent: bool, unseen: bool, handed: bool
    ) -> None:
        flags = sim.flags
        if state is TagState.FETCHING:
            with_kernel = flags == ACTIVE and (not idle or sim.request is None)
            on_its_way = bool(flags & OWNED_BY_SRV) and (unsent or unseen)
            agrees = with_kernel or on_its_way or bool(flags & CANCELED and not idle) or (not flags and handed)
        elif state is TagState.SERVING:
            agrees = flags == OWNED_BY_SRV and sim.request is not None
        elif state is TagState.ANNOUNCED:
            agrees = flags == OWNED_BY_SRV | NEED_GET_DATA
        elif state is TagState.GETTING_DATA:
            agrees = not idle and bool(flags & NEED_GET_DATA or (flags & OWNED_BY_SRV and unseen))
        elif state is TagState.CLOSED:
            agrees = bool(flags & CANCELED)
        else:
            agrees = False
        demand(
            agrees,
            "the tag tables agree",
            lambda: (
                f"{self} queue {queue.queue_id} tag {sim.tag}: engine {state.name}, kernel {TagFlag(flags)!r} with "
                f"{sim.request}; idle={idle}, unsent={unsent}, unseen={unseen}"
            ),
        )

    def _check_pool(self, queue: Queue) -> None:
        assert queue._pool is not None
        lent = [slot for _, slot in queue._lent]
        places = sorted([*queue._pool._free, *lent, *(slot for slot in queue.ring.slots if slot != NO_SLOT)])
        demand(
            places == list(range(len(queue.ring.buffers))),
            "every buffer is in one place",
            lambda: f"{self} queue {queue.queue_id}: {places}",
        )
