"""SET_PARAMS and GET_PARAMS: a device's parameters as the driver holds them, byte for byte.

**Supported.** A SET_PARAMS shorter than the structure leaves the rest as it was; a refused one leaves what the release
leaves; GET_PARAMS fills in the device numbers, and they stay. **Rejected.** EINVAL: lengths, no types, a rule of
`params`. EACCES: from START_DEV until the disk is freed. EFAULT when Choices may.
**Differs from Linux.** The device numbers are made up.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from ublk_trio.kernel_sim import params
from ublk_trio.kernel_sim.call import Call
from ublk_trio.kernel_sim.control_faults import fails
from ublk_trio.kernel_sim.params import HEADER, OFFSETS
from ublk_trio.kernel_sim.waits import Steps
from ublk_trio.uapi import ParamsDevt, ParamType

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.device import SimDevice
    from ublk_trio.kernel_sim.kernel import SimKernel

_CHAR_MAJOR: Final = 240
_BLOCK_MAJOR: Final = 259


def set_params(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    if call.length <= HEADER.size or not call.has_address:
        return -errno.EINVAL
    header = None if fails(kernel, "SET_PARAMS header") else call.sent(HEADER.size)
    if header is None:
        return -errno.EFAULT
    length, types = HEADER.unpack(header)
    if not 0 < length <= call.length or not types:
        return -errno.EINVAL
    length = min(length, len(device.held_params))
    yield from device.mutex.lock()
    try:
        if device.used:
            return -errno.EACCES
        sent = None if fails(kernel, "SET_PARAMS copy-in") else call.sent(length)
        if sent is None:
            if kernel.version.failed_params_are_zeroed:
                device.forget_params()
            return -errno.EFAULT
        return _take(kernel, device, sent)
    finally:
        device.mutex.unlock()


def _take(kernel: SimKernel, device: SimDevice, sent: bytes) -> int:
    held = device.held_params
    held[: len(sent)] = sent
    size, types = HEADER.unpack_from(held)
    HEADER.pack_into(held, 0, size, types & params.known_types(kernel.version))
    if params.is_valid(bytes(held), device.info, version=kernel.version, page_size=kernel.page_size):
        device.params = params.parse(bytes(held))
        return 0
    if kernel.version.failed_params_are_zeroed:
        device.forget_params()
    else:
        HEADER.pack_into(held, 0, size, 0)
        device.params = params.parse(bytes(held))
    return -errno.EINVAL


def get_params(kernel: SimKernel, device: SimDevice, call: Call) -> Steps:
    if call.length <= HEADER.size or not call.has_address:
        return -errno.EINVAL
    header = None if fails(kernel, "GET_PARAMS header") else call.sent(HEADER.size)
    if header is None:
        return -errno.EFAULT
    length, _ = HEADER.unpack(header)
    if not 0 < length <= call.length:
        return -errno.EINVAL
    yield from device.mutex.lock()
    try:
        _fill_device_numbers(kernel, device)
        if fails(kernel, "GET_PARAMS copy-out") or not call.answer(bytes(device.held_params[:length])):
            return -errno.EFAULT
        return 0
    finally:
        device.mutex.unlock()


def _fill_device_numbers(kernel: SimKernel, device: SimDevice) -> None:
    """They are the server's to read only, so the driver writes them when it is asked."""
    if not params.known_types(kernel.version) & ParamType.DEVT:
        return
    held, live = device.held_params, device.disk is not None
    numbers = ParamsDevt(
        char_major=_CHAR_MAJOR,
        char_minor=device.dev_id,
        disk_major=_BLOCK_MAJOR if live else 0,
        disk_minor=device.dev_id if live else 0,
    )
    held[OFFSETS["devt"] : OFFSETS["devt"] + numbers.LAYOUT.size] = numbers.pack()
    size, types = HEADER.unpack_from(held)
    HEADER.pack_into(held, 0, size, types | ParamType.DEVT)
