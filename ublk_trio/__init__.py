"""Linux block devices written in Python: a Trio engine for the kernel's ublk driver, and a simulator of that driver."""

from typing import TYPE_CHECKING

from ublk_trio.backends import Backend, Delay, ErrorInjection, File, Limited, Limits, Memory, Null, Passthru
from ublk_trio.device import Device, DeviceStatistics, recover_device, serve_device
from ublk_trio.errors import (
    BackendError,
    IllegalTagEventError,
    KernelError,
    KernelUnavailableError,
    StuckError,
    UblkError,
    UsageError,
)
from ublk_trio.options import DataMode, DeviceOptions, Recovery
from ublk_trio.queue import QueueStatistics
from ublk_trio.real import RealKernel
from ublk_trio.ring import Kernel
from ublk_trio.target import Target, TargetStatistics, open_target

if TYPE_CHECKING:
    from ublk_trio.kernel_sim import SimKernel
else:

    def __getattr__(name: str) -> object:
        """The simulator takes as long to import as the engine, and who serves real disks does not need it."""
        if name == "SimKernel":
            from ublk_trio.kernel_sim import SimKernel

            return SimKernel
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BackendError",
    "DataMode",
    "Delay",
    "Device",
    "DeviceOptions",
    "DeviceStatistics",
    "ErrorInjection",
    "File",
    "IllegalTagEventError",
    "Kernel",
    "KernelError",
    "KernelUnavailableError",
    "Limited",
    "Limits",
    "Memory",
    "Null",
    "Passthru",
    "QueueStatistics",
    "RealKernel",
    "Recovery",
    "SimKernel",
    "StuckError",
    "Target",
    "TargetStatistics",
    "UblkError",
    "UsageError",
    "open_target",
    "recover_device",
    "serve_device",
]
