"""Taking over a disk whose server is gone: what must be true first, and what is taken from the kernel.

Facts: a device that was added with USER_RECOVERY outlives its server. When the char device is closed it becomes QUIESCED
(or FAIL_IO): requests wait (or fail) until another server opens it, fetches every tag and ends the recovery. Queues, depth,
buffer size, flags and parameters are the device's own; a new server has to live with them. The kernel looks at none of
what a new server serves from, so that a wrong backend would be a wrong disk under a mounted filesystem: it is checked
here, before anything is touched.
"""

from __future__ import annotations

import errno
import os

import attrs
import trio

from ublk_trio.backends import Backend
from ublk_trio.control import Control
from ublk_trio.errors import KernelError, UsageError
from ublk_trio.handlers import Handlers
from ublk_trio.options import MODE_FLAGS, RECOVERY_FLAGS, DataMode, DeviceOptions, Recovery
from ublk_trio.params import params_of
from ublk_trio.uapi import SECTOR_SHIFT, BasicAttr, DeviceState, DevInfo, Feature, Params

#: Seconds that the kernel gets to notice that a killed server is gone. It is a moment; but before Linux 6.15 a queue whose
#: every tag the server held tells it only when a request's time limit of 30 seconds is over.
NOTICE_SECONDS = 45.0
#: Seconds that it gets to take apart what a server left: its rings end one after the other, in a kernel worker.
RELEASE_SECONDS = 5.0
_PAUSE_SECONDS = 0.02

#: Ways of moving data, and kinds of disk, that this version cannot take over.
_NOT_SERVED = Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG | Feature.BATCH_IO | Feature.ZONED | Feature.INTEGRITY
_RECOVERABLE = frozenset({DeviceState.QUIESCED, DeviceState.FAIL_IO})


@attrs.frozen(kw_only=True)
class Recoverable:
    """A device without a server, as the kernel describes it."""

    info: DevInfo
    params: Params

    def options(self, options: DeviceOptions) -> DeviceOptions:
        """``options`` with all that the device brings along: id, queues, depth, buffer size, mode, recovery."""
        info = self.info
        assert self.params.basic is not None
        return attrs.evolve(
            options,
            dev_id=info.dev_id,
            queues=info.nr_hw_queues,
            depth=info.queue_depth,
            max_io_bytes=info.max_io_buf_bytes,
            mode=mode_of(info.flags),
            recovery=recovery_of(info.flags),
            unprivileged=Feature.UNPRIVILEGED_DEV in info.flags,
            read_only=BasicAttr.READ_ONLY in self.params.basic.attrs,
        )

    def check_backend(self, backend: Backend, handlers: Handlers) -> None:
        """Raise `UsageError` unless the opened backend can stand in for the one that the disk was made from."""
        dev_id, basic = self.info.dev_id, self.params.basic
        assert basic is not None
        size, block_size = basic.dev_sectors << SECTOR_SHIFT, 1 << basic.logical_bs_shift
        if backend.size != size:
            raise UsageError(
                f"device {dev_id} is a disk of {size} bytes, and backend {backend} has {backend.size}: "
                "give the backend that it was made from"
            )
        if backend.block_size != block_size:
            raise UsageError(
                f"device {dev_id} has blocks of {block_size} bytes, and backend {backend} of {backend.block_size}: "
                f"say block_size={block_size}"
            )
        missing = sorted(
            _promises(self.params) - _promises(params_of(handlers, max_io_bytes=self.info.max_io_buf_bytes))
        )
        if missing:
            raise UsageError(f"device {dev_id} offers {', '.join(missing)}, and backend {backend} cannot do that")


def _promises(params: Params) -> frozenset[str]:
    """What a disk with these parameters is asked for besides reads."""
    assert params.basic is not None
    promises = set() if BasicAttr.READ_ONLY in params.basic.attrs else {"writes"}
    if BasicAttr.VOLATILE_CACHE in params.basic.attrs:
        promises.add("flushes")
    if params.discard is not None and params.discard.max_discard_sectors:
        promises.add("discards")
    if params.discard is not None and params.discard.max_write_zeroes_sectors:
        promises.add("write-zeroes")
    return frozenset(promises)


def mode_of(flags: Feature) -> DataMode:
    """How the data of a device with these flags moves."""
    return next((mode for mode, needed in MODE_FLAGS.items() if needed & flags), DataMode.COPY)


def recovery_of(flags: Feature) -> Recovery:
    """What a device with these flags does when its server dies."""
    asked = flags & RECOVERY_FLAGS[Recovery.FAIL] | flags & RECOVERY_FLAGS[Recovery.REISSUE]
    return next(recovery for recovery, needed in RECOVERY_FLAGS.items() if needed == asked)


async def find_recoverable(control: Control, dev_id: int) -> Recoverable:
    """Ask the kernel what it has. Touches nothing.

    Waits up to `NOTICE_SECONDS` for the kernel to notice the end of a server that is gone. Raises `UsageError` when the
    device cannot be taken over, `KernelError` when there is none.
    """
    info = await control.device_info(dev_id)
    if Feature.USER_RECOVERY not in info.flags:
        raise UsageError(
            f"device {dev_id} was made without recovery: stop it, and start it with --recovery another time"
        )
    with trio.move_on_after(_seconds_to_notice(info)):
        while info.state is DeviceState.LIVE:
            await trio.sleep(_PAUSE_SECONDS)
            info = await control.device_info(dev_id)
    _check_state(info)
    if info.flags & _NOT_SERVED:
        names = ", ".join(feature.name or "?" for feature in info.flags & _NOT_SERVED)
        raise UsageError(f"device {dev_id} was made with {names}, which this version does not serve")
    params = await control.params(dev_id)
    if params.basic is None:
        raise UsageError(
            f"device {dev_id} was never started: delete it (`ublk-trio stop {dev_id}`) and start a new one"
        )
    return Recoverable(info=info, params=params)


async def start_recovery(control: Control, dev_id: int) -> None:
    """START_USER_RECOVERY, tried again while the kernel still takes the last server's char device apart.

    Linux 6.12 calls a device QUIESCED before that is over. Raises `KernelError` after `RELEASE_SECONDS`.
    """
    deadline = trio.current_time() + RELEASE_SECONDS
    while True:
        try:
            await control.start_recovery(dev_id)
        except KernelError as error:
            if error.errno != errno.EBUSY or trio.current_time() > deadline:
                raise
        else:
            return
        await trio.sleep(_PAUSE_SECONDS)


def _seconds_to_notice(info: DevInfo) -> float:
    """How long it is worth to wait for a LIVE device to lose its server."""
    if info.ublksrv_pid == os.getpid():
        return RELEASE_SECONDS  # a device of this process: one that it left behind, or serves
    return 0.0 if _is_running(info.ublksrv_pid) else NOTICE_SECONDS


def _is_running(pid: int) -> bool:
    return pid > 0 and os.path.exists(f"/proc/{pid}")


def _check_state(info: DevInfo) -> None:
    dev_id, pid = info.dev_id, info.ublksrv_pid
    if info.state in _RECOVERABLE:
        return
    if info.state is not DeviceState.LIVE:
        raise UsageError(
            f"device {dev_id} is stopped: there is nothing to recover; delete it (`ublk-trio stop {dev_id}`) and start a new one"
        )
    if _is_running(pid):
        raise UsageError(f"device {dev_id} is live: process {pid} serves it")
    raise UsageError(
        f"device {dev_id} is live, and the kernel has not noticed in {NOTICE_SECONDS:g} s that its server is gone: try again"
    )
