"""The control commands: which are understood, who may send them, and where each goes.

**Supported.** Every command, each from the release that has it: see `control_add`,
`control_params`, `control_start`, `control_recovery`, `control_getters`. Root's devices, and those of ordinary users:
these are reached by the path of their char device, which the caller must be allowed to open.
**Rejected.** An encoding that the kernel does not have: EOPNOTSUPP. A command that nobody knows: EOPNOTSUPP, or what
the release says instead.
**Differs from Linux.** A path is looked up in the simulated ``/dev``, which has the char devices, the disks and
``/dev/ublk-control``; a relative one from the root. To 6.2 commands looked for their device themselves: those that did
so after other checks are not told apart.

A command is a generator: see `waits`. So it goes on in the kernel whether or not somebody still waits for it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from ublk_trio.kernel_sim import char_device, control_getters, shmem
from ublk_trio.kernel_sim.call import Call
from ublk_trio.kernel_sim.control_add import add_device
from ublk_trio.kernel_sim.control_faults import fails
from ublk_trio.kernel_sim.control_params import get_params, set_params
from ublk_trio.kernel_sim.control_recovery import end_recovery, quiesce, start_recovery
from ublk_trio.kernel_sim.control_start import delete, start, stop, try_stop, update_size
from ublk_trio.kernel_sim.linux_errno import ENOTSUPP
from ublk_trio.kernel_sim.waits import Held, Steps
from ublk_trio.uapi import ControlCommand, Feature

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.device import SimDevice
    from ublk_trio.kernel_sim.kernel import SimKernel

__all__ = ["Call", "Held", "Steps", "execute"]

_PATH_MAX: Final = 4096

#: Those that never wait.
_GETTERS: Mapping[ControlCommand, Callable[[SimKernel, SimDevice, Call], int]] = MappingProxyType(
    {
        ControlCommand.GET_QUEUE_AFFINITY: control_getters.get_affinity,
        ControlCommand.GET_DEV_INFO: control_getters.get_info,
        ControlCommand.GET_DEV_INFO2: control_getters.get_info,
    }
)
_COMMANDS: Mapping[ControlCommand, Callable[[SimKernel, SimDevice, Call], Steps]] = MappingProxyType(
    {
        ControlCommand.SET_PARAMS: set_params,
        ControlCommand.GET_PARAMS: get_params,
        ControlCommand.START_DEV: start,
        ControlCommand.STOP_DEV: stop,
        ControlCommand.TRY_STOP_DEV: try_stop,
        ControlCommand.UPDATE_SIZE: update_size,
        ControlCommand.START_USER_RECOVERY: start_recovery,
        ControlCommand.END_USER_RECOVERY: end_recovery,
        ControlCommand.QUIESCE_DEV: quiesce,
        ControlCommand.REG_BUF: shmem.register,
        ControlCommand.UNREG_BUF: shmem.unregister,
    }
)
#: What a command for an unprivileged device needs of the char device's file. The absent ones are refused.
_READ_ACCESS: Final = frozenset({*_GETTERS, ControlCommand.GET_PARAMS, ControlCommand.GET_FEATURES})
_WRITE_ACCESS: Final = frozenset(
    {
        ControlCommand.START_DEV,
        ControlCommand.STOP_DEV,
        ControlCommand.DEL_DEV,
        ControlCommand.SET_PARAMS,
        ControlCommand.START_USER_RECOVERY,
        ControlCommand.END_USER_RECOVERY,
        ControlCommand.UPDATE_SIZE,
        ControlCommand.QUIESCE_DEV,
        ControlCommand.TRY_STOP_DEV,
        ControlCommand.REG_BUF,
        ControlCommand.UNREG_BUF,
    }
)


def execute(kernel: SimKernel, call: Call) -> Steps:
    """One control command, from the first check to the result."""
    refused = _encoding(kernel, call)
    if refused:
        return refused
    command = _known(kernel, call)
    if command is ControlCommand.GET_FEATURES and call.encoded and call.exact_opcode:
        return control_getters.get_features(kernel, call)
    if command is ControlCommand.ADD_DEV:
        return (yield from add_device(kernel, call))
    device = kernel.devices.get(call.dev_id)
    if device is None:
        return _no_device(kernel, command)
    refused = _permission(kernel, device, call)
    if refused:
        return refused
    if command is None:
        return _unknown(kernel)
    if command in _GETTERS:
        return _GETTERS[command](kernel, device, call)
    if command in (ControlCommand.DEL_DEV, ControlCommand.DEL_DEV_ASYNC):
        return (yield from delete(kernel, device, call, wait=command is ControlCommand.DEL_DEV))
    if command is ControlCommand.GET_FEATURES:  # as a plain number, or with another size
        return _unknown(kernel)
    device.references += 1
    try:
        return (yield from _COMMANDS[command](kernel, device, call))
    finally:
        device.references -= 1
        kernel.put_device(device)


def _encoding(kernel: SimKernel, call: Call) -> int:
    """The check of the opcode's type. A driver from before there were any compares whole opcodes, and so knows no other."""
    if not kernel.version.understands_ioctl_encoding or call.encoded:
        return 0
    if call.opcode_type or not kernel.legacy_opcodes:
        return -errno.EOPNOTSUPP
    return 0


def _known(kernel: SimKernel, call: Call) -> ControlCommand | None:
    """The command, if this release has it."""
    version = kernel.version
    if call.command not in ControlCommand._value2member_map_:
        return None
    command = ControlCommand(call.command)
    understood = version.understands_ioctl_encoding or call.opcode_type == 0
    return command if understood and version.has_command(command) else None


def _unknown(kernel: SimKernel) -> int:
    return -ENOTSUPP if kernel.version.unknown_is_enotsupp else -errno.EOPNOTSUPP


def _no_device(kernel: SimKernel, command: ControlCommand | None) -> int:
    if kernel.version.finds_device_first or command in (None, ControlCommand.DEL_DEV):
        return -errno.ENODEV
    return -errno.EINVAL


def _permission(kernel: SimKernel, device: SimDevice, call: Call) -> int:
    """Root may do everything with its own devices. Whoever means an unprivileged device names its char device's path."""
    caller = call.sender(kernel)
    unprivileged = Feature.UNPRIVILEGED_DEV in device.info.flags
    if not unprivileged:
        if not caller.privileged:
            return -errno.EPERM
        asks_info2 = call.command == ControlCommand.GET_DEV_INFO2
        if not asks_info2 or not kernel.version.has_command(ControlCommand.GET_DEV_INFO2):
            return 0
    if not 0 < call.dev_path_length <= _PATH_MAX or call.length < call.dev_path_length:
        return -errno.EINVAL
    path = None if fails(kernel, "path copy-in") else call.sent(call.dev_path_length)
    if path is None:
        return -errno.EFAULT
    if call.command not in _READ_ACCESS | _WRITE_ACCESS or not kernel.version.has_command(ControlCommand(call.command)):
        return -errno.EINVAL
    refused = char_device.permission(
        device, path.split(b"\0")[0].decode(errors="replace"), caller, write=call.command in _WRITE_ACCESS
    )
    if not refused:
        call.start = call.dev_path_length
        call.length -= call.dev_path_length
    return refused
