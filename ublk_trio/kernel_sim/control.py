"""The control commands: their checks in the driver's order, their effects, and their waiting.

**Supported.** ADD_DEV, DEL_DEV, DEL_DEV_ASYNC, SET_PARAMS, GET_PARAMS, START_DEV, STOP_DEV, TRY_STOP_DEV, GET_DEV_INFO,
GET_DEV_INFO2, GET_FEATURES, GET_QUEUE_AFFINITY, UPDATE_SIZE; each from the release that has it.
**Rejected.** EOPNOTSUPP: recovery, QUIESCE_DEV, REG_BUF, UNREG_BUF (not modelled yet) and numbers that nobody knows.
**Differs from Linux.** The caller is root, unless the kernel was made with ``privileged=False``; then ADD_DEV is
refused, because unprivileged devices are not modelled. EFAULT does not occur; ENOMEM and EINTR only as faults of
`faults`. Kernels to 6.13 gave ENOTSUPP (524) where EOPNOTSUPP is meant; here it is always the latter.

A command is a generator. It yields a `Wait` where the kernel would sleep, and is resumed once that is over; what it
returns is the command's result. So a command goes on in the kernel whether or not somebody still waits for it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import attrs

from ublk_trio.kernel_sim import params
from ublk_trio.kernel_sim.device import SimDevice, Wait
from ublk_trio.kernel_sim.version import ALWAYS_GRANTED
from ublk_trio.uapi import (
    ANY_DEVICE_ID,
    FEATURES_LEN,
    IO_DESC_SIZE,
    IO_DESC_SIZE_MAX,
    IO_DESC_SIZE_STEP,
    LAST_LEGACY_CONTROL_COMMAND,
    MAX_DEVICES,
    MAX_NR_QUEUES,
    MAX_QUEUE_DEPTH,
    NO_QUEUE,
    ControlCommand,
    DeviceState,
    DevInfo,
    Feature,
    Params,
    ParamsDevt,
)

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.kernel import SimKernel
    from ublk_trio.kernel_sim.ring import SimControlRing

#: A command under way: yields what it waits for, gets True sent when it was interrupted, returns its result.
Steps = Generator[Wait, bool, int]

_CHAR_MAJOR: Final = 240
_BLOCK_MAJOR: Final = 259
_PATH_MAX: Final = 4096
_INFO_BYTES: Final = DevInfo.LAYOUT.size
#: A command fails by a fault one time in so many, where that is drawn evenly.
_FAULT_OPTIONS: Final = 4
_ALL_RECOVERY: Final = Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE | Feature.USER_RECOVERY_FAIL_IO
_RECOVERY_CHOICES: Final = (
    Feature(0),
    Feature.USER_RECOVERY,
    Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE,
    Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO,
)
_SERVERS_DATA: Final = Feature.USER_COPY | Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG


@attrs.define(kw_only=True)
class Call:
    """A control command as it was sent."""

    command: int
    dev_id: int
    queue_id: int
    data: int
    buffer: bytearray | None
    length: int
    dev_path_length: int
    ioctl_encoded: bool
    #: Where in the buffer the command's own part begins: behind the path.
    start: int = 0

    def sent(self, length: int) -> bytes:
        """What the server sent, as much as is there."""
        assert self.buffer is not None
        return bytes(self.buffer[self.start : self.start + length])

    def answer(self, data: bytes) -> None:
        """Write to the server's buffer; what does not fit would be a fault of the caller's."""
        assert self.buffer is not None
        data = data[: len(self.buffer) - self.start]
        self.buffer[self.start : self.start + len(data)] = data

    @property
    def has_buffer(self) -> bool:
        return self.buffer is not None


class Held:
    """A command, or a piece of the kernel's own work, that waits for something."""

    __slots__ = ("name", "on_done", "ring", "steps", "wait")

    def __init__(
        self, name: str, steps: Steps, wait: Wait, ring: SimControlRing | None, on_done: Callable[[int], None]
    ) -> None:
        self.name = name
        self.steps = steps
        self.wait = wait
        self.ring = ring
        self.on_done = on_done

    def __str__(self) -> str:
        return f"{self.name}, waiting for {self.wait.what}"


def execute(kernel: SimKernel, call: Call) -> Steps:
    """One control command, from the first check to the result."""
    version = kernel.version
    if not call.ioctl_encoded and call.command <= LAST_LEGACY_CONTROL_COMMAND and not kernel.legacy_opcodes:
        return -errno.EOPNOTSUPP
    encoded = call.ioctl_encoded or call.command > LAST_LEGACY_CONTROL_COMMAND
    if call.command == ControlCommand.GET_FEATURES and version.has_command(ControlCommand.GET_FEATURES):
        return _get_features(kernel, call)
    command = ControlCommand(call.command) if call.command in ControlCommand._value2member_map_ else None
    known = command is not None and version.has_command(command) and (version >= (6, 4) or not encoded)
    if known and command is ControlCommand.ADD_DEV:
        return (yield from _add(kernel, call))
    device = kernel.devices.get(call.dev_id)
    if device is None:
        return -errno.ENODEV
    refused = _permission(kernel, device, call)
    if refused:
        return refused
    if not known:
        return -errno.EOPNOTSUPP
    assert command is not None
    if command in _GETTERS:
        return _GETTERS[command](kernel, device, call)
    device.references += 1
    try:
        if command in (ControlCommand.DEL_DEV, ControlCommand.DEL_DEV_ASYNC):
            yield from kernel.devices_mutex.lock()
            yield from _remove(kernel, device)
            kernel.devices_mutex.unlock()
        else:
            return (yield from _COMMANDS[command](kernel, device, call))
    finally:
        device.references -= 1
        kernel.put_device(device)
    if command is ControlCommand.DEL_DEV and kernel.devices.get(call.dev_id) is device:
        if device.char_in_use:
            kernel.notes.append(f"DEL_DEV of device {call.dev_id} waits for its char device and rings to be closed")
        gone = Wait(
            f"the last user of device {call.dev_id}", lambda: kernel.devices.get(call.dev_id) is not device, True
        )
        if (yield gone):
            return -errno.EINTR
    return 0


def _permission(kernel: SimKernel, device: SimDevice, call: Call) -> int:
    if not kernel.privileged:
        return -errno.EPERM
    if call.command != ControlCommand.GET_DEV_INFO2 or not kernel.version.has_command(ControlCommand.GET_DEV_INFO2):
        return 0
    if not 0 < call.dev_path_length <= _PATH_MAX or call.length < call.dev_path_length or not call.has_buffer:
        return -errno.EINVAL
    path = call.sent(call.dev_path_length).split(b"\0")[0].decode(errors="replace")
    if path != kernel.char_path(device.dev_id):
        return -errno.EPERM
    call.start = call.dev_path_length
    call.length -= call.dev_path_length
    return 0


def _get_features(kernel: SimKernel, call: Call) -> int:
    if not call.ioctl_encoded or call.length != FEATURES_LEN or not call.has_buffer:
        return -errno.EINVAL
    call.answer(int(kernel.features).to_bytes(FEATURES_LEN, "little"))
    return 0


# ---------------------------------------------------------------------- ADD_DEV


def _add(kernel: SimKernel, call: Call) -> Steps:
    if call.length < _INFO_BYTES or not call.has_buffer:
        return -errno.EINVAL
    if call.queue_id != NO_QUEUE:
        return -errno.EINVAL
    try:
        asked = DevInfo.unpack(call.sent(_INFO_BYTES))
    except ValueError:  # a state that there is none of; the driver does not look, and neither need a server send it
        return -errno.EINVAL
    refused = _check_add(kernel, call, asked)
    if refused:
        return refused
    if kernel.strikes("interrupted", _FAULT_OPTIONS):
        return -errno.EINTR
    yield from kernel.devices_mutex.lock()
    try:
        if kernel.version.limits_privileged_devices and len(kernel.devices) >= kernel.devices_max:
            return -errno.EACCES
        dev_id = asked.dev_id if asked.dev_id != ANY_DEVICE_ID else kernel.free_id()
        if dev_id in kernel.devices:
            return -errno.EEXIST
        if kernel.strikes("no-memory", _FAULT_OPTIONS):
            return -errno.ENOMEM
        info = attrs.evolve(
            asked,
            dev_id=dev_id,
            flags=_granted(kernel, asked.flags),
            nr_hw_queues=min(asked.nr_hw_queues, kernel.cpus),
            max_io_buf_bytes=asked.max_io_buf_bytes // kernel.page_size * kernel.page_size,
            state=DeviceState.DEAD,
            ublksrv_pid=-1,
            owner_uid=0,
            owner_gid=0,
        )
        kernel.devices[dev_id] = SimDevice(kernel, info)
        call.answer(info.pack())
        return 0
    finally:
        kernel.devices_mutex.unlock()


def _check_add(kernel: SimKernel, call: Call, asked: DevInfo) -> int:
    """ADD_DEV's checks of what is asked: 0 or a negative errno."""
    # What a release does not know it does not check, either.
    flags = asked.flags & kernel.version.features
    if not 0 < asked.queue_depth <= MAX_QUEUE_DEPTH or not 0 < asked.nr_hw_queues <= MAX_NR_QUEUES:
        return -errno.EINVAL
    if kernel.privileged:
        flags &= ~Feature.UNPRIVILEGED_DEV
    elif not flags & Feature.UNPRIVILEGED_DEV:
        return -errno.EPERM
    recovery = flags & _ALL_RECOVERY
    if recovery not in _RECOVERY_CHOICES:
        return -errno.EINVAL
    if flags & Feature.QUIESCE and not flags & Feature.USER_RECOVERY:
        return -errno.EINVAL
    if flags & Feature.UNPRIVILEGED_DEV and flags & _SERVERS_DATA:
        return -errno.EINVAL
    if flags & Feature.INTEGRITY and not flags & Feature.USER_COPY:
        return -errno.EINVAL
    if flags & Feature.IO_DESC_SIZE and not _descriptor_size_ok(asked.io_desc_size):
        return -errno.EINVAL
    if call.dev_id != asked.dev_id:
        return -errno.EINVAL
    if asked.dev_id != ANY_DEVICE_ID and asked.dev_id >= MAX_DEVICES:
        return -errno.EINVAL
    if flags & Feature.ZONED and not flags & (Feature.USER_COPY | Feature.SUPPORT_ZERO_COPY):
        return -errno.EINVAL
    return 0 if kernel.privileged else -errno.EPERM


def _descriptor_size_ok(size: int) -> bool:
    return IO_DESC_SIZE <= size <= IO_DESC_SIZE_MAX and size % IO_DESC_SIZE_STEP == 0


def _granted(kernel: SimKernel, asked: Feature) -> Feature:
    """The flags that the device gets."""
    flags = (asked & kernel.features & ~Feature.UNPRIVILEGED_DEV) | (ALWAYS_GRANTED & kernel.features)
    if flags & Feature.BATCH_IO:
        flags &= ~(Feature.PER_IO_DAEMON | Feature.NEED_GET_DATA)
    if flags & _SERVERS_DATA:
        flags &= ~Feature.NEED_GET_DATA
    return flags


# ---------------------------------------------------------------------- parameters


def _set_params(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    if call.length <= params.HEADER.size or not call.has_buffer:
        return -errno.EINVAL
    length, types = params.HEADER.unpack_from(call.sent(params.HEADER.size).ljust(params.HEADER.size, b"\0"))
    if not 0 < length <= call.length or not types:
        return -errno.EINVAL
    yield from device.mutex.lock()
    try:
        if device.used:
            return -errno.EACCES
        length = min(length, Params.LAYOUT.size)
        given = params.parse(call.sent(length), length=length, version=kernel.version)
        if given is None or not params.is_valid(given, device.info, page_size=kernel.page_size):
            device.params = Params()
            device.params_length = 0
            return -errno.EINVAL
        device.params = given
        device.params_length = length
        return 0
    finally:
        device.mutex.unlock()


def _get_params(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    if call.length <= params.HEADER.size or not call.has_buffer:
        return -errno.EINVAL
    length, _ = params.HEADER.unpack_from(call.sent(params.HEADER.size).ljust(params.HEADER.size, b"\0"))
    if not 0 < length <= call.length:
        return -errno.EINVAL
    yield from device.mutex.lock()
    live = device.disk is not None
    filled = attrs.evolve(
        device.params,
        devt=ParamsDevt(
            char_major=_CHAR_MAJOR,
            char_minor=device.dev_id,
            disk_major=_BLOCK_MAJOR if live else 0,
            disk_minor=device.dev_id if live else 0,
        ),
    )
    # The header's length is the one that SET_PARAMS came with.
    whole = (
        params.HEADER.pack(device.params_length or Params.LAYOUT.size, filled.types)
        + filled.pack()[params.HEADER.size :]
    )
    call.answer(whole[: min(length, Params.LAYOUT.size)])
    device.mutex.unlock()
    return 0


# ---------------------------------------------------------------------- START_DEV, STOP_DEV and their kin


def _start(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    pid = call.data
    if not 0 < pid < 1 << 31 or device.params.basic is None:
        return -errno.EINVAL
    cancels = device.cancels
    fetched = Wait(
        f"every tag of device {device.dev_id} to be fetched",
        lambda: device.all_fetched or device.cancels != cancels,
        True,
    )
    if not device.all_fetched and not device.stopping and ((yield fetched) or device.cancels != cancels):
        return -errno.EINTR
    if kernel.strikes("interrupted", _FAULT_OPTIONS):
        return -errno.EINTR
    if kernel.version.checks_opener_pid and pid != device.opener_pid:
        return -errno.EINVAL
    yield from device.mutex.lock()
    try:
        if device.used:
            return -errno.EEXIST
        if device.stopping:
            return -errno.EBUSY
        if kernel.strikes("no-memory", _FAULT_OPTIONS):
            return -errno.ENOMEM
        disk = device.start(pid)
        if not kernel.partition_scan or device.info.flags & Feature.NO_AUTO_PART_SCAN:
            return 0
        scan = disk.scan_partitions()
        if scan is None or (kernel.version.scans_partitions_later and kernel.choices.choose("partition-scan-later", 2)):
            return 0
        yield Wait(f"the partition scan of {kernel.disk_path(device.dev_id)}", lambda: scan.done)
        return 0
    finally:
        device.mutex.unlock()


def _stop(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    yield from _stop_and_cancel(device)
    return 0


def _stop_and_cancel(device: SimDevice) -> Steps:
    yield from device.mutex.lock()
    try:
        yield from device.stop()
    finally:
        device.mutex.unlock()
    device.cancel()
    return 0


def _try_stop(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    if device.disk is None:
        return -errno.ENODEV
    if device.disk.openers:
        return -errno.EBUSY
    yield from _stop_and_cancel(device)
    return 0


def _remove(kernel: SimKernel, device: SimDevice) -> Steps:
    """Stop it and take its char device away; under the mutex of all devices, so a stuck one holds up every ADD and DEL."""
    if not device.removed:
        yield from _stop_and_cancel(device)
        device.removed = True
    return 0


def _update_size(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    yield from device.mutex.lock()
    try:
        if device.disk is None:
            return -errno.ENODEV
        assert device.params.basic is not None
        device.params = attrs.evolve(device.params, basic=attrs.evolve(device.params.basic, dev_sectors=call.data))
        device.disk.sectors = call.data
        return 0
    finally:
        device.mutex.unlock()


# ---------------------------------------------------------------------- getters


def _get_info(kernel: SimKernel, device: SimDevice, call: Call) -> int:
    if call.length < _INFO_BYTES or not call.has_buffer:
        return -errno.EINVAL
    call.answer(device.info.pack())
    return 0


def _get_affinity(kernel: SimKernel, device: SimDevice, call: Call) -> int:
    if call.length * 8 < kernel.cpus or call.length % 8 or not call.has_buffer:
        return -errno.EINVAL
    # The queue stands in the data word, not in queue_id.
    queues = len(device.queues)
    if call.data >= queues:
        return -errno.EINVAL
    mask = sum(1 << cpu for cpu in range(kernel.cpus) if cpu % queues == call.data)
    call.answer(mask.to_bytes(max(call.length, kernel.cpus // 8 + 1), "little")[: call.length])
    return 0


#: Those that never wait.
_GETTERS: Mapping[ControlCommand, Callable[[SimKernel, SimDevice, Call], int]] = MappingProxyType(
    {
        ControlCommand.GET_QUEUE_AFFINITY: _get_affinity,
        ControlCommand.GET_DEV_INFO: _get_info,
        ControlCommand.GET_DEV_INFO2: _get_info,
    }
)
_COMMANDS: Mapping[ControlCommand, Callable[[SimKernel, SimDevice, Call], Steps]] = MappingProxyType(
    {
        ControlCommand.SET_PARAMS: _set_params,
        ControlCommand.GET_PARAMS: _get_params,
        ControlCommand.START_DEV: _start,
        ControlCommand.STOP_DEV: _stop,
        ControlCommand.TRY_STOP_DEV: _try_stop,
        ControlCommand.UPDATE_SIZE: _update_size,
    }
)
