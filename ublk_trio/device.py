"""A device: one disk, from ADD_DEV to DEL_DEV, as one scoped task.

Its life, and the order of its end, which is fixed by the kernel (DEL_DEV waits for the char device, its mappings and
every ring that registered it to be closed; STOP_DEV waits for every delivered request to be committed, and before
that writes the disk's dirty pages back through us):

    backend open → ADD_DEV → SET_PARAMS → char device open → rings, every tag fetched → START_DEV → live
    STOP_DEV → queues end → rings exit and unmap → char device close → DEL_DEV → backend close

A device that is taken over from another server begins with START_USER_RECOVERY instead of ADD_DEV and SET_PARAMS, and
END_USER_RECOVERY instead of START_DEV. Until it is live and handed out it is not ours: what fails before lets go of it, and
leaves it as it was, to be recovered another time. One that is released ends without STOP_DEV and DEL_DEV.

Whatever ends it (a stop, the surrounding scope cancelled, a failure half way up), it goes down the same stairs from
where it stands.

**Bounds.** Each step down is shielded from the caller's cancellation and bounded in time: as long as requests are
being answered, a stop waits; after `grace_seconds` without progress it cancels the handlers that still run and
refuses what comes (EIO); if even that does not end the queues, it closes rings and char device, which makes the
kernel fail what is left. Then it says so with `StuckError`.
"""

from __future__ import annotations

import errno
import inspect
import logging
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import attrs
import trio

from ublk_trio.backends import Backend, as_async, check_geometry
from ublk_trio.control import Control, open_control
from ublk_trio.errors import KernelError, StuckError, UsageError
from ublk_trio.handlers import Handlers, Serve
from ublk_trio.nursery import open_plain_nursery
from ublk_trio.options import MODE_FLAGS, RECOVERY_FLAGS, DataMode, DeviceOptions, Recovery
from ublk_trio.params import params_of
from ublk_trio.queue import Queue, QueueStatistics
from ublk_trio.recovery import Recoverable, find_recoverable, mode_of, recovery_of, start_recovery
from ublk_trio.ring import CharDevice, Kernel
from ublk_trio.uapi import ANY_DEVICE_ID, DevInfo, Feature
from ublk_trio.workers import Workers

logger = logging.getLogger("ublk_trio.device")

#: Seconds that the queues have to end once nothing depends on the backend any more, and again once their rings are
#: closed.
REFUSE_SECONDS = 5.0
#: Seconds that DEL_DEV may take. It takes long only while somebody else has the disk open.
DELETE_SECONDS = 5.0
#: Seconds that udev has to give each of an unprivileged device's nodes to their owner.
ACCESS_SECONDS = 30.0
_ACCESS_PAUSE_SECONDS = 0.05
#: Seconds between two looks at whether everything is answered, before a disk is let go. In between Trio waits in the kernel, which
#: thereby hands over whatever it had on its way to us; and then the queues' tasks must have had their turn to take it.
_LOOK_SECONDS = 0.005
#: After so many looks in a row without anything new nothing is on its way any more. Looks are counted, not seconds: on a busy machine
#: any time may pass between two of them without a turn for anybody. Where the kernel cannot hold requests back, who uses the disk
#: goes on until they wait for us; so long is waited for that at most. Before Linux 6.15 the driver may crash when a ring is closed while a
#: request is on its way to it.
_CALM_LOOKS = 20
_SETTLE_SECONDS_MAX = 3.0


@contextmanager
def already_gone_is_fine() -> Iterator[None]:
    """For stopping and deleting: somebody else may have been faster."""
    try:
        yield
    except KernelError as error:
        # ENOENT: of an unprivileged device the node is gone, and the device is about to be.
        if error.errno not in (errno.ENODEV, errno.ENOENT):
            raise


async def try_stop(kernel: Kernel, control: Control, dev_id: int) -> None:
    """TRY_STOP_DEV; its EBUSY says who uses the disk."""
    try:
        await control.try_stop_device(dev_id)
    except KernelError as error:
        if error.errno != errno.EBUSY:
            raise
        users = ", ".join(kernel.disk_users(dev_id)) or f"`fuser -vam {kernel.disk_path(dev_id)}` may tell who"
        raise KernelError(errno.EBUSY, f"device {dev_id} is in use: {users}") from None


def _not_given(node: str, outcome: str) -> KernelError:
    return KernelError(
        errno.EACCES,
        f"{node} was not given to this user within {ACCESS_SECONDS:g} s: install the udev rule "
        f"(as root: `ublk-trio udev-rule --install`); {outcome}",
    )


def _check_is_backend(backend: object) -> None:
    if not isinstance(backend, Backend):
        raise UsageError(f"{backend!r} is not a backend: give an instance of a subclass of ublk_trio.Backend")
    for method in ("open", "aclose"):
        if not inspect.iscoroutinefunction(getattr(backend, method)):
            raise UsageError(f"backend {backend}: {method} must be `async def`")


@attrs.frozen(kw_only=True)
class DeviceStatistics:
    """What a device did so far, by queue."""

    dev_id: int
    path: str
    backend: str
    queues: tuple[QueueStatistics, ...]

    @property
    def requests(self) -> int:
        """Requests answered, over all queues."""
        return sum(sum(queue.requests.values()) for queue in self.queues)

    @property
    def failed(self) -> int:
        """Those of them that were answered with an errno."""
        return sum(queue.failed for queue in self.queues)


class Device:
    """A live disk. Made by `Target.start_device`, `Target.recover_device` and `serve_device`, never directly."""

    def __init__(
        self,
        kernel: Kernel,
        control: Control,
        backend: Backend,
        options: DeviceOptions,
        recoverable: Recoverable | None = None,
        workers: Workers | None = None,
    ) -> None:
        if recoverable is not None:
            options = recoverable.options(options)
        options.check(page_size=kernel.page_size)
        _check_is_backend(backend)
        self.options = options
        self.backend = as_async(backend) if options.serve == "async" else backend
        self._kernel = kernel
        self._control = control
        self._recoverable = recoverable
        self._workers = workers
        #: The disk is ours to stop and to delete: we added it, or have taken it over.
        self._owned = recoverable is None
        self._info: DevInfo | None = None
        self._handlers: Handlers | None = None
        self._char: CharDevice | None = None
        self._queues: list[Queue] = []
        self._stop_asked = trio.Event()
        self._start_ended = trio.Event()
        self._start_scope = trio.CancelScope(shield=True)
        self._starting = trio.CancelScope()
        self._start_error: KernelError | None = None
        self._stopped = trio.Event()
        self._hopeless = trio.Event()
        self._closed = trio.Event()
        self._stopping = False
        #: What made it fail, once it was live and is gone.
        self.failure: Exception | None = None
        self._resizing = trio.Lock()
        self._trying_to_stop = 0
        self._releasing = False
        # Who stops a device from outside deletes it, too: then its id is free, and soon another's, from the moment when
        # we close the char device. So it is deleted while that is still open, and the id surely ours.
        self._stopped_by_others = False
        self._deleted = False

    # What a user sees ------------------------------------------------------------------------------------------------

    @property
    def info(self) -> DevInfo:
        """What the kernel made of the device: its id, queues, depth, buffer size, flags."""
        assert self._info is not None, "a Device is handed out only once it was added"
        return self._info

    @property
    def dev_id(self) -> int:
        """The N of /dev/ublkbN."""
        return self.info.dev_id

    @property
    def path(self) -> str:
        """The disk's device node."""
        return self._kernel.disk_path(self.dev_id)

    @property
    def size(self) -> int:
        """Bytes: the backend's."""
        return self.backend.size

    async def update_size(self) -> None:
        """Tell the kernel that the backend's size has changed: whoever uses the disk sees the new one. For a live disk.

        A backend grows before this, and shrinks before it too: it must fail requests beyond its new end, of which some may be
        under way. Raises `UsageError` where the kernel cannot do it (before Linux 6.16), for a size that is not
        possible, and when the disk is being stopped; `KernelError` when the kernel refuses. Then the disk keeps its size.
        Not cancellable once the kernel was told, which is a moment; several calls come one after the other.
        """
        async with self._resizing:
            if self._stop_asked.is_set():
                raise UsageError(f"device {self.dev_id} is being stopped: its size cannot be changed any more")
            check_geometry(self.backend)
            with trio.CancelScope(shield=True):
                await self._control.update_size(self.dev_id, self.backend.size)
            logger.info("device %d: %s has %d bytes now", self.dev_id, self.path, self.backend.size)

    @property
    def read_only(self) -> bool:
        """Whether the disk refuses to be changed: because it was asked for, or because the backend cannot."""
        assert self._handlers is not None
        return self._handlers.read_only

    @property
    def serve(self) -> Serve:
        """How its requests are served."""
        assert self._handlers is not None
        return self._handlers.choose_serve(self.options.serve)

    @property
    def stopping(self) -> bool:
        """Whether it has begun to stop, for whatever reason, or is gone."""
        return self._stop_asked.is_set() or self._stopping

    def ask_to_stop(self) -> None:
        """Begin to stop; returns at once. Repeatable."""
        self._stop_asked.set()

    def ask_to_release(self) -> None:
        """Begin to let go of the disk without stopping it, so that another server can take it over; returns at once. Repeatable.

        What the server has is answered first, and what comes waits for the next server: who uses the disk sees a pause and no
        error. With `Recovery.FAIL` what comes fails, as that promises. `released` says whether it came to that.

        Raises `UsageError` for a disk without recovery, for one that is being stopped, and for one with `Recovery.REQUEUE` on a
        kernel before Linux 6.16: that has no way to hold requests back, and would fail those that it has just handed over.
        """
        if self._releasing:
            return
        if self.stopping:
            raise UsageError(f"device {self.dev_id} is being stopped: it cannot be released any more")
        if self.options.recovery is Recovery.OFF:
            raise UsageError(
                f"device {self.dev_id} was made without recovery: it cannot be released; start it with --recovery another time"
            )
        if self.options.recovery is Recovery.REQUEUE and Feature.QUIESCE not in self.info.flags:
            raise UsageError(
                f"device {self.dev_id} cannot be released without failing requests: recovery requeue needs QUIESCE for that, which "
                "came with Linux 6.16; with recovery reissue older kernels can do it"
            )
        self._releasing = True
        self._stop_asked.set()

    @property
    def released(self) -> bool:
        """Whether it was let go, and is there for another server to take it over."""
        return self._releasing and not self._owned

    async def stop_if_unused(self) -> None:
        """Begin to stop if nobody has the disk open; the kernel decides that, so that nobody can slip in between.

        Raises `KernelError` with EBUSY, and who uses the disk, if somebody does: then it goes on as before. Raises `UsageError`
        where the kernel cannot do it (before Linux 7.0), and `StuckError` when it has not answered within the grace time, because the
        backend does not: then `ask_to_stop` is what helps. Cancelled, it may stop or not. Fine for a disk that is being
        stopped already.
        """
        if self._stop_asked.is_set():
            return
        self._trying_to_stop += 1
        try:
            with trio.move_on_after(self.options.grace_seconds) as scope:
                with already_gone_is_fine():
                    await try_stop(self._kernel, self._control, self.dev_id)
                self._stop_asked.set()
            if scope.cancelled_caught:
                raise StuckError(
                    f"device {self.dev_id}: the kernel did not say within {self.options.grace_seconds:g} s whether anybody "
                    f"uses it; not answered: {self._held() or 'nothing'}"
                )
        finally:
            self._trying_to_stop -= 1

    async def wait_closed(self) -> None:
        """Wait until the device is gone: deleted in the kernel, backend closed. Cancelling the wait stops nothing."""
        await self._closed.wait()

    def statistics(self) -> DeviceStatistics:
        """A snapshot."""
        return DeviceStatistics(
            dev_id=self.dev_id,
            path=self.path,
            backend=str(self.backend),
            queues=tuple(queue.statistics() for queue in self._queues),
        )

    def __repr__(self) -> str:
        which = f"{self.dev_id} " if self._info is not None else ""
        return f"<Device {which}of {self.backend}>"

    # Its life --------------------------------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[Device] = trio.TASK_STATUS_IGNORED) -> None:
        """Bring the disk up, serve it until it is asked to stop or cancelled, and take everything down again."""
        try:
            got = self._added() if self._recoverable is None else self._taken_over(self._recoverable)
            async with self._opened_backend(), got, self._opened_char() as char:
                with self._opened_queues(char):
                    await self._serve(task_status)
        finally:
            self._closed.set()

    @asynccontextmanager
    async def _opened_backend(self) -> AsyncIterator[None]:
        await self.backend.open()
        try:
            check_geometry(self.backend)
            self._handlers = Handlers(self.backend, read_only=self.options.read_only)
            self._handlers.choose_serve(self.options.serve)
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self.backend.aclose()

    def _flags(self) -> Feature:
        flags = Feature.URING_CMD_COMP_IN_TASK
        if self._control.ioctl_encoded:
            flags |= Feature.CMD_IOCTL_ENCODE
        if self.options.recovery is not Recovery.OFF and self._control.features is not None:
            flags |= self._control.features & Feature.QUIESCE
        if self.options.unprivileged:
            self._control.need(Feature.UNPRIVILEGED_DEV, "make unprivileged disks")
            flags |= Feature.UNPRIVILEGED_DEV
        return flags | MODE_FLAGS[self.options.mode] | RECOVERY_FLAGS[self.options.recovery]

    @asynccontextmanager
    async def _added(self) -> AsyncIterator[None]:
        options, control = self.options, self._control
        asked = DevInfo(
            dev_id=ANY_DEVICE_ID if options.dev_id is None else options.dev_id,
            nr_hw_queues=options.queues,
            queue_depth=options.depth,
            max_io_buf_bytes=options.max_io_bytes,
            flags=self._flags(),
        )
        self._info = info = await control.add_device(asked)
        logger.debug("device %d: added: %s", info.dev_id, info)
        try:
            if mode_of(info.flags) is not options.mode:
                raise UsageError(f"{self._kernel.name} does not do mode {options.mode.value}: choose copy")
            if recovery_of(info.flags) is not options.recovery:
                raise UsageError(f"{self._kernel.name} does not do recovery {options.recovery.value}")
            if options.unprivileged:
                await self._wait_for_access(info)
            if info.nr_hw_queues < options.queues:
                logger.info(
                    "device %d: the kernel gives %d of %d queues", info.dev_id, info.nr_hw_queues, options.queues
                )
            assert self._handlers is not None
            await control.set_params(info.dev_id, params_of(self._handlers, max_io_bytes=info.max_io_buf_bytes))
            yield
        finally:
            if self._owned:
                await self._delete(info.dev_id)

    async def _wait_for_access(self, info: DevInfo) -> None:
        """An ordinary user may use the device once udev has given its char device's node to them."""
        if Feature.UNPRIVILEGED_DEV not in info.flags:
            raise UsageError("root's disks are never unprivileged: leave that out, or be an ordinary user")
        deadline = trio.current_time() + ACCESS_SECONDS
        while True:
            try:
                await self._control.device_info(info.dev_id)
            except KernelError as error:
                if error.errno not in (errno.EACCES, errno.EPERM):
                    raise
                if trio.current_time() > deadline:
                    left = f"what was begun is left for root: `ublk-trio stop {info.dev_id}`"
                    raise _not_given(self._kernel.char_path(info.dev_id), left) from None
            else:
                return
            await trio.sleep(_ACCESS_PAUSE_SECONDS)

    async def _wait_for_disk(self) -> None:
        """udev gives away the disk's own node by itself, some time after the disk is live."""
        deadline = trio.current_time() + ACCESS_SECONDS
        while not (self._stop_asked.is_set() or self._kernel.disk_usable(self.dev_id)):
            if trio.current_time() > deadline:
                raise _not_given(self.path, "the disk is stopped again")
            await trio.sleep(_ACCESS_PAUSE_SECONDS)

    @asynccontextmanager
    async def _taken_over(self, recoverable: Recoverable) -> AsyncIterator[None]:
        assert self._handlers is not None
        recoverable.check_backend(self.backend, self._handlers)
        self._info = info = recoverable.info
        await start_recovery(self._control, info.dev_id)
        try:
            yield
        finally:
            if self._owned:
                await self._delete(info.dev_id)

    async def _delete(self, dev_id: int) -> None:
        if self._deleted:
            return
        with trio.move_on_after(DELETE_SECONDS, shield=True) as scope, already_gone_is_fine():
            try:
                await self._control.delete_device(dev_id)
            except KernelError as error:
                if not self.options.unprivileged or error.errno not in (errno.EACCES, errno.EPERM):
                    raise
                # Given up before udev had given it to us.
                logger.warning("device %d is left for root to remove: %s", dev_id, error)
                return
            logger.info("device %d: deleted", dev_id)
        if scope.cancelled_caught:
            logger.warning(
                "device %d: the kernel will delete it when the last program that has %s open closes it",
                dev_id,
                self._kernel.disk_path(dev_id),
            )

    @asynccontextmanager
    async def _opened_char(self) -> AsyncIterator[CharDevice]:
        self._char = char = await self._kernel.open_char_device(self.info, ioctl_encoded=self._control.ioctl_encoded)
        try:
            yield char
        finally:
            if self._stopped_by_others and self._owned:
                with trio.CancelScope(shield=True), already_gone_is_fine():
                    self._deleted = await self._control.delete_device_async(self.dev_id)
            char.close()

    @contextmanager
    def _opened_queues(self, char: CharDevice) -> Iterator[None]:
        info, options = self.info, self.options
        pooled = options.mode is not DataMode.COPY
        buffers = min(options.pool_buffers, info.queue_depth) if pooled else info.queue_depth
        assert self._handlers is not None
        try:
            for queue_id in range(info.nr_hw_queues):
                worker = None if self._workers is None else self._workers.next()
                ring = char.open_queue(queue_id, buffers=buffers, worker=worker)
                self._queues.append(Queue(ring, self._handlers, serve=self.serve, mode=options.mode))
            yield
        finally:
            self._close_rings()

    async def _serve(self, task_status: trio.TaskStatus[Device]) -> None:
        async with open_plain_nursery() as nursery:
            try:
                for queue in self._queues:
                    nursery.start_soon(self._run_queue, queue, name=f"ublk device {self.dev_id} queue {queue.queue_id}")
                nursery.start_soon(self._start_command)
                with self._starting:
                    await self._start_ended.wait()
                    if self._start_error is None and self.options.unprivileged:
                        await self._wait_for_disk()
                if self._start_error is not None:
                    raise self._start_error
                if self._stopped_by_others:
                    raise KernelError(errno.EINTR, f"device {self.dev_id} was stopped while it was starting")
                if not self._stop_asked.is_set():
                    # Whoever takes a disk over and is cancelled has not got it, and must not take it down with them.
                    await trio.lowlevel.checkpoint_if_cancelled()
                    self._owned = True
                    logger.info(
                        "device %d: %s is live, served %s from %s", self.dev_id, self.path, self.serve, self.backend
                    )
                    task_status.started(self)
                await self._stop_asked.wait()
            finally:
                with trio.CancelScope(shield=True):
                    try:
                        if not self._owned:
                            logger.info("device %d: not taken over", self.dev_id)
                            await self._let_go()
                        elif self._releasing:
                            await self._release()
                        else:
                            await self._stop_serving()
                    finally:
                        # Whatever went wrong there: without its ring no queue can go on for ever.
                        self._close_rings()

    async def _start_command(self) -> None:
        # Not recalled when the caller is cancelled: START_DEV and STOP_DEV run in parallel in the kernel, in either
        # order. The queues serve while it runs, so it ends soon; if they cannot, `_stop_serving` ends it.
        try:
            with self._start_scope:
                if self._recoverable is None:
                    await self._control.start_device(self.dev_id)
                else:
                    await self._control.end_recovery(self.dev_id)
        except KernelError as error:
            self._start_error = error
        finally:
            self._start_ended.set()

    async def _run_queue(self, queue: Queue) -> None:
        await queue.run(self._queue_failed)
        # Queues end when the kernel has aborted their tags: if that was not our doing, somebody else stopped the
        # device.
        self._stopped_by_others |= not (self._stopping or self._trying_to_stop)
        self._stop_asked.set()

    def _queue_failed(self, queue: Queue, error: BaseException) -> None:
        logger.error("device %d: queue %d failed; the device stops", self.dev_id, queue.queue_id, exc_info=error)
        if queue.must_close:
            self._hopeless.set()
        self._stop_asked.set()
        self._starting.cancel()

    # Its end ---------------------------------------------------------------------------------------------------------

    async def _stop_serving(self) -> None:
        """Take the disk away and end the queues; see the module's docstring for the bounds."""
        logger.info("device %d: stopping", self.dev_id)
        self._stopping = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_command)
            if await self._ended_while_progressing():
                return
            held = self._held()
            for queue in self._queues:
                queue.refuse()
            if not self._hopeless.is_set() and await self._ended_within(REFUSE_SECONDS):
                logger.warning(
                    "device %d: not answered within the grace time, so failed with EIO: %s", self.dev_id, held
                )
                return
            stuck = self._held()
            self._start_scope.cancel()
            self._close_rings()
            # What the kernel still waits for from us fails when the char device is closed.
            if self._char is not None:
                self._char.close()
            ended = await self._ended_within(REFUSE_SECONDS)
            nursery.cancel_scope.cancel()
        if stuck or not ended:
            raise StuckError(
                f"device {self.dev_id} had to be torn from the kernel; not answered: {stuck or 'STOP_DEV'}"
            )

    async def _release(self) -> None:
        """Answer what we have, take nothing more, and let go."""
        logger.info("device %d: being released", self.dev_id)
        self._stopping = True
        if Feature.QUIESCE in self.info.flags:
            if not await self._quiesce():
                await self._stop_serving()
                return
        else:
            for queue in self._queues:
                queue.hold()
        held = "" if await self._done_while_progressing() else self._held()
        self._owned = False
        await self._let_go()
        logger.info("device %d: released; it waits for another server", self.dev_id)
        if held:
            raise StuckError(
                f"device {self.dev_id} was released with requests that the backend had not answered, of which becomes what "
                f"recovery {self.options.recovery.value} says: {held}"
            )

    async def _quiesce(self) -> bool:
        """Have the kernel give us nothing more. False if the disk is gone, or another program is about to stop it."""
        grace = self.options.grace_seconds
        # The kernel keeps to the grace time itself, but for a STOP_DEV of somebody else's that it lets end first.
        with trio.move_on_after(grace + REFUSE_SECONDS):
            try:
                await self._control.quiesce_device(self.dev_id, seconds=grace)
            except KernelError as error:
                if error.errno == errno.ENODEV:
                    return False
                logger.warning("device %d: %s", self.dev_id, error)
            return True
        return False

    async def _done_while_progressing(self) -> bool:
        """Wait until every queue `is_done` and nothing comes any more. False after the grace time without a single answer."""
        calm_looks, held = 0, -1
        answered, deadline = -1, 0.0
        settle_deadline = math.inf
        while not self._hopeless.is_set():
            now = trio.current_time()
            if done := all(queue.is_done for queue in self._queues):
                settle_deadline = min(settle_deadline, now + _SETTLE_SECONDS_MAX)
                calm_looks = calm_looks + 1 if held == (held := self._number_held()) else 0
                if calm_looks >= _CALM_LOOKS or now > settle_deadline:
                    return True
            else:
                calm_looks = 0
            if answered != (answered := sum(queue.answered for queue in self._queues)):
                deadline = now + self.options.grace_seconds
            elif not done and now > deadline:
                return False
            await trio.sleep(_LOOK_SECONDS)
        return False

    def _number_held(self) -> int:
        return sum(len(queue.unanswered()) for queue in self._queues)

    async def _let_go(self) -> None:
        """Leave a disk as it is: without a server, but there."""
        self._stopping = True
        self._start_scope.cancel()
        # First the rings, so that nothing is answered any more: what we were given already goes to the next server.
        self._close_rings()
        for queue in self._queues:
            queue.refuse()
        with trio.move_on_after(REFUSE_SECONDS):
            await self._start_ended.wait()
            for queue in self._queues:
                await queue.ended.wait()

    async def _stop_command(self) -> None:
        await self._start_ended.wait()
        try:
            with already_gone_is_fine():
                await self._control.stop_device(self.dev_id)
        except KernelError:
            logger.exception("device %d: cannot be stopped; its rings will be closed", self.dev_id)
            self._hopeless.set()
        finally:
            self._stopped.set()

    async def _ended(self) -> None:
        await self._stopped.wait()
        for queue in self._queues:
            await queue.ended.wait()

    async def _ended_within(self, seconds: float) -> bool:
        with trio.move_on_after(seconds):
            await self._ended()
            return True
        return False

    async def _ended_while_progressing(self) -> bool:
        while not self._hopeless.is_set():
            before = sum(queue.answered for queue in self._queues)
            if await self._ended_within(self.options.grace_seconds):
                return True
            if before == sum(queue.answered for queue in self._queues):
                return False
        return False

    def _held(self) -> str:
        """Names what the backend has not answered."""
        return "; ".join(
            f"queue {queue.queue_id} tag {request.tag}: {request}"
            for queue in self._queues
            for request in queue.unanswered()
        )

    def _close_rings(self) -> None:
        for queue in self._queues:
            queue.ring.close()


async def serve_device(
    kernel: Kernel,
    backend: Backend,
    options: DeviceOptions | None = None,
    *,
    task_status: trio.TaskStatus[Device] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve one disk in the caller's own nursery: ``device = await nursery.start(serve_device, kernel, backend,
    options)``.

    Reports the `Device` when the disk is live. Returns after `Device.ask_to_stop`, once everything is gone.
    Cancelling it stops the disk in the same way, bounded by the options' grace time. Raises what made it fail:
    `UsageError`, `BackendError`, `KernelError`, `KernelUnavailableError`, `StuckError`, or the bug that broke a
    queue.
    """
    async with open_control(kernel) as control:
        await Device(kernel, control, backend, options or DeviceOptions()).run(task_status)


async def recover_device(
    kernel: Kernel,
    dev_id: int,
    backend: Backend,
    options: DeviceOptions | None = None,
    *,
    task_status: trio.TaskStatus[Device] = trio.TASK_STATUS_IGNORED,
) -> None:
    """As `serve_device`, for a disk whose server is gone: see `Target.recover_device`."""
    async with open_control(kernel) as control:
        found = await find_recoverable(control, dev_id)
        await Device(kernel, control, backend, options or DeviceOptions(), found).run(task_status)
