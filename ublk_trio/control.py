"""The control commands, typed, each with its errors explained.

`ControlRing.submit` gives what the kernel gives: a number. Here a negative one becomes a `KernelError` that says what
was refused, what the errno means for this command, and how to mend it.

Opcodes come in two encodings: plain numbers, and ioctl style since Linux 6.4; a kernel can be built without the
former. GET_FEATURES (6.5) exists only in the latter, so its answer decides.

Facts about DEL_DEV: it takes a mutex killably, removes the device, and then waits interruptibly for its last user. Only a
process that is being killed can be interrupted before the removal; so whoever lives to see EINTR has removed the device.

An unprivileged device (6.3) is reached, by root too, only with the path of its char device in front of a command's buffer: who may
use that file may use the device. Which devices are unprivileged is learnt from `add_device` and `device_info`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import attrs
import trio

from ublk_trio.errors import ENOTSUPP, KernelError, UsageError, errno_text
from ublk_trio.ring import ControlRing, Kernel
from ublk_trio.uapi import (
    ANY_DEVICE_ID,
    FEATURE_RELEASE,
    FEATURES_LEN,
    SECTOR_SHIFT,
    ControlCommand,
    DeviceState,
    DevInfo,
    Feature,
    Params,
)

#: What a driver answers to a command that it does not know. Before Linux 6.14 it was ENOTSUPP, the kernel's own.
UNKNOWN_COMMAND = frozenset({errno.EOPNOTSUPP, ENOTSUPP})
#: Between two looks at a device that is to go.
_LOOK_SECONDS = 0.02
_U32_MAX = (1 << 32) - 1
_GONE = "there is no such device; `ublk-trio list` shows which there are"
_UNKNOWN = "this kernel's ublk driver does not know the command"
_NOT_ALLOWED = "the kernel lets only root (CAP_SYS_ADMIN) do that"

_MEANING: dict[tuple[ControlCommand | None, int], str] = {
    (None, errno.ENODEV): _GONE,
    (None, errno.EPERM): _NOT_ALLOWED,
    (None, errno.EACCES): _NOT_ALLOWED,
    (None, errno.EOPNOTSUPP): _UNKNOWN,
    (None, ENOTSUPP): _UNKNOWN,
    (
        ControlCommand.ADD_DEV,
        errno.EPERM,
    ): "only root may make such a disk; an ordinary user can make an unprivileged one (`start --unprivileged`)",
    (ControlCommand.ADD_DEV, errno.EEXIST): "the id is in use; choose another, or leave it out to get a free one",
    (ControlCommand.ADD_DEV, errno.EACCES): (
        "the driver's limit on devices is reached; raise /sys/module/ublk_drv/parameters/ublks_max or stop one"
    ),
    (ControlCommand.ADD_DEV, errno.EINVAL): "the kernel does not accept these numbers or flags",
    (ControlCommand.SET_PARAMS, errno.EINVAL): "the kernel does not accept this geometry",
    (ControlCommand.SET_PARAMS, errno.EACCES): "the device has been started already",
    (ControlCommand.START_DEV, errno.EEXIST): "it is live already",
    (ControlCommand.START_DEV, errno.EINTR): "it was stopped while it was starting",
    (ControlCommand.START_DEV, errno.EINVAL): "it has no parameters, or another process opened it",
    (ControlCommand.START_USER_RECOVERY, errno.EINVAL): "it was made without recovery",
    (ControlCommand.START_USER_RECOVERY, errno.EBUSY): "it still has a server, or is not waiting for one",
    (ControlCommand.END_USER_RECOVERY, errno.EINTR): "it was stopped while it was being taken over",
    (ControlCommand.END_USER_RECOVERY, errno.EBUSY): "it was stopped, or another server took it over",
    (ControlCommand.UPDATE_SIZE, errno.ENODEV): "it has no disk any more: it was stopped",
    (ControlCommand.TRY_STOP_DEV, errno.ENODEV): "it has no disk: it was not started, or stopped already",
}


_NOT_YOURS = "{} belongs to another user, or to root as long as no udev rule gives it away (`ublk-trio udev-rule`)"


def _refusal(command: ControlCommand, dev_id: int, result: int, *, path: str = "") -> KernelError:
    which = "" if dev_id == ANY_DEVICE_ID else f" for ublk device {dev_id}"
    meaning = _MEANING.get((command, -result)) or _MEANING.get((None, -result))
    if path and -result in (errno.EACCES, errno.EPERM):
        meaning = _NOT_YOURS.format(path)
    text = f"the kernel refused {command.name}{which}: {errno_text(result)}"
    return KernelError(-result, f"{text}: {meaning}" if meaning else text, command)


@attrs.define
class Control:
    """A control ring, with what the kernel offers. Any number of tasks may use it at once."""

    _ring: ControlRing
    _kernel: Kernel
    #: None: a kernel before 6.5, which cannot be asked.
    features: Feature | None = None
    #: The ids that were an unprivileged device's when they were last looked at.
    _unprivileged: set[int] = attrs.Factory(set)

    @property
    def ioctl_encoded(self) -> bool:
        """Whether commands go in ioctl encoding."""
        return self.features is not None and Feature.CMD_IOCTL_ENCODE in self.features

    def need(self, feature: Feature, what: str) -> None:
        """Raise `UsageError` unless the kernel offers a feature; ``what`` is what it is needed for, as a verb."""
        if self.features is None or feature not in self.features:
            raise UsageError(
                "this kernel cannot {}: its driver has no {}, which came with Linux {}.{}".format(
                    what, feature.name, *FEATURE_RELEASE[feature]
                )
            )

    async def _submit(
        self,
        command: ControlCommand,
        dev_id: int,
        *,
        buffer: bytearray | None = None,
        data: int = 0,
    ) -> int:
        # What one command of an unprivileged device has, all have; but ADD_DEV's is not there yet, and its id was another's.
        needs_path = command is ControlCommand.GET_DEV_INFO2 or (
            dev_id in self._unprivileged and command not in (ControlCommand.ADD_DEV, ControlCommand.GET_DEV_INFO)
        )
        path = self._kernel.char_path(dev_id) if needs_path else ""
        # With its NUL; empty without a path.
        prefix = path.encode() + b"\0" if path else b""
        sent = bytearray(prefix + (buffer or b"")) if prefix else buffer
        result = await self._ring.submit(
            command,
            dev_id=dev_id,
            data=data,
            buffer=sent,
            dev_path_length=len(prefix),
            ioctl_encoded=self.ioctl_encoded,
        )
        if result < 0:
            raise _refusal(command, dev_id, result, path=path)
        if prefix and buffer is not None and sent is not None:
            buffer[:] = sent[len(prefix) :]
        return result

    def _learn(self, info: DevInfo) -> DevInfo:
        if Feature.UNPRIVILEGED_DEV in info.flags:
            self._unprivileged.add(info.dev_id)
        else:
            self._unprivileged.discard(info.dev_id)
        return info

    async def _ask_features(self) -> None:
        buffer = bytearray(FEATURES_LEN)
        result = await self._ring.submit(ControlCommand.GET_FEATURES, dev_id=ANY_DEVICE_ID, buffer=buffer)
        if result >= 0:
            self.features = Feature(int.from_bytes(buffer, "little"))
        elif -result not in {*UNKNOWN_COMMAND, errno.ENODEV}:
            # A driver that does not know the command (before 6.5) looks for the device first, and there is none.
            raise _refusal(ControlCommand.GET_FEATURES, ANY_DEVICE_ID, result)

    async def add_device(self, info: DevInfo) -> DevInfo:
        """ADD_DEV. Returns what the kernel made of it: id, queues, flags and buffer size may differ from what was
        asked."""
        buffer = bytearray(info.pack())
        # Whether the device exists must be known, or nobody would ever delete it.
        with trio.CancelScope(shield=True):
            await self._submit(ControlCommand.ADD_DEV, info.dev_id, buffer=buffer)
        return self._learn(DevInfo.unpack(buffer))

    async def set_params(self, dev_id: int, params: Params) -> None:
        """SET_PARAMS; only before START_DEV."""
        await self._submit(ControlCommand.SET_PARAMS, dev_id, buffer=bytearray(params.pack()))

    async def params(self, dev_id: int) -> Params:
        """GET_PARAMS."""
        buffer = bytearray(Params.query())
        await self._submit(ControlCommand.GET_PARAMS, dev_id, buffer=buffer)
        return Params.unpack(buffer)

    async def start_device(self, dev_id: int) -> None:
        """START_DEV. The kernel holds it until every tag is fetched, and may read the disk before it answers."""
        await self._submit(ControlCommand.START_DEV, dev_id, data=os.getpid())

    async def quiesce_device(self, dev_id: int, *, seconds: float) -> None:
        """QUIESCE_DEV: from now on nothing is given to the server, and the commands of its idle tags end.

        The kernel waits up to ``seconds`` for an idle tag of each queue; EBUSY is that there was none: then nothing is given to the
        server either.
        """
        await self._submit(ControlCommand.QUIESCE_DEV, dev_id, data=min(max(1, int(seconds * 1000)), _U32_MAX))

    async def start_recovery(self, dev_id: int) -> None:
        """START_USER_RECOVERY: the device expects a new server."""
        await self._submit(ControlCommand.START_USER_RECOVERY, dev_id)

    async def end_recovery(self, dev_id: int) -> None:
        """END_USER_RECOVERY. The kernel holds it until every tag is fetched; then the requests that waited go on."""
        await self._submit(ControlCommand.END_USER_RECOVERY, dev_id, data=os.getpid())

    async def stop_device(self, dev_id: int) -> None:
        """STOP_DEV. The kernel holds it until every delivered request is committed."""
        await self._submit(ControlCommand.STOP_DEV, dev_id)

    async def try_stop_device(self, dev_id: int) -> None:
        """TRY_STOP_DEV: as STOP_DEV, but EBUSY while somebody has the disk open. Raises `UsageError` before Linux 7.0."""
        self.need(Feature.SAFE_STOP_DEV, "stop a disk only if nobody uses it")
        await self._submit(ControlCommand.TRY_STOP_DEV, dev_id)

    async def update_size(self, dev_id: int, size: int) -> None:
        """UPDATE_SIZE: the disk is so many bytes now. Raises `UsageError` before Linux 6.16."""
        self.need(Feature.UPDATE_SIZE, "change the size of a live disk")
        await self._submit(ControlCommand.UPDATE_SIZE, dev_id, data=size >> SECTOR_SHIFT)

    async def delete_device(self, dev_id: int) -> None:
        """DEL_DEV. The kernel holds it until the char device and the disk are closed by everybody.

        A signal ends only that wait (EINTR): the device is removed, and goes with its last user. So it is not asked again: at any
        moment the id may be another device's. What is left of the wait is to look until the id is free, or in use again.
        """
        try:
            await self._submit(ControlCommand.DEL_DEV, dev_id)
        except KernelError as error:
            if error.errno != errno.EINTR:
                raise
            await self._wait_until_gone(dev_id)

    async def _wait_until_gone(self, dev_id: int) -> None:
        """A removed device is DEAD until its id is free. One that is not is another's; so is one that we may not ask about."""
        with suppress(KernelError):  # ENODEV; EINVAL on Linux 6.0
            info = await self.device_info(dev_id)
            while info.state is DeviceState.DEAD:
                await trio.sleep(_LOOK_SECONDS)
                info = await self.device_info(dev_id)

    async def delete_device_async(self, dev_id: int) -> bool:
        """DEL_DEV_ASYNC: the same without the wait. False if this kernel does not know it (before 6.9), or not for this device."""
        if dev_id in self._unprivileged:
            return False  # the driver has forgotten it in its list of what they may be sent
        try:
            await self._submit(ControlCommand.DEL_DEV_ASYNC, dev_id)
        except KernelError as error:
            if error.errno in UNKNOWN_COMMAND:
                return False
            raise
        return True

    async def device_info(self, dev_id: int) -> DevInfo:
        """GET_DEV_INFO; for an unprivileged device GET_DEV_INFO2."""
        try:
            return await self._info(ControlCommand.GET_DEV_INFO, dev_id)
        except KernelError as error:
            if error.errno != errno.EINVAL or self.features is None:
                raise
        # It has to be asked for by its path.
        return await self._info(ControlCommand.GET_DEV_INFO2, dev_id)

    async def _info(self, command: ControlCommand, dev_id: int) -> DevInfo:
        buffer = bytearray(DevInfo(nr_hw_queues=0, queue_depth=0, max_io_buf_bytes=0, dev_id=dev_id).pack())
        await self._submit(command, dev_id, buffer=buffer)
        return self._learn(DevInfo.unpack(buffer))


@asynccontextmanager
async def open_control(kernel: Kernel) -> AsyncIterator[Control]:
    """Open a kernel's control device and find out what its driver offers. Raises `KernelUnavailableError`."""
    async with kernel.open_control() as ring:
        control = Control(ring, kernel)
        await control._ask_features()
        yield control
