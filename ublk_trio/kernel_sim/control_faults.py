"""Failures of control commands that no server causes: no memory, a bad address, a signal.

**Supported.** Each point of `CONTROL_FAULTS`, once it is named in `SimKernel.control_faults`; then a choice of the same
name decides each time. By default none is, and nothing is asked. The faults no-memory and interrupted of `faults` strike
here, too. **Rejected.** Names that there are not.
**Differs from Linux.** A command fails at one of these points, or not at all: Linux has more allocations than these.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ublk_trio.kernel_sim.kernel import SimKernel

#: Where a command can fail, and with what.
CONTROL_FAULTS: Mapping[str, int] = MappingProxyType(
    {
        "ADD_DEV copy-in": errno.EFAULT,
        "ADD_DEV lock": errno.EINTR,
        "ADD_DEV allocate": errno.ENOMEM,
        "ADD_DEV copy-out": errno.EFAULT,
        "DEL_DEV lock": errno.EINTR,
        "DEL_DEV wait": errno.EINTR,
        "SET_PARAMS header": errno.EFAULT,
        "SET_PARAMS copy-in": errno.EFAULT,
        "GET_PARAMS header": errno.EFAULT,
        "GET_PARAMS copy-out": errno.EFAULT,
        "START_DEV wait": errno.EINTR,
        "START_DEV allocate": errno.ENOMEM,
        "END_USER_RECOVERY wait": errno.EINTR,
        "QUIESCE_DEV signal": errno.EINTR,
        "GET_DEV_INFO copy-out": errno.EFAULT,
        "GET_FEATURES copy-out": errno.EFAULT,
        "GET_QUEUE_AFFINITY allocate": errno.ENOMEM,
        "GET_QUEUE_AFFINITY copy-out": errno.EFAULT,
        "path copy-in": errno.EFAULT,
    }
)

#: The faults of `faults.FAULTS` that strike at these points as well, where they are enabled.
_STRUCK_BY: Mapping[str, str] = MappingProxyType(
    {
        "ADD_DEV lock": "interrupted",
        "ADD_DEV allocate": "no-memory",
        "DEL_DEV wait": "interrupted",
        "START_DEV wait": "interrupted",
        "START_DEV allocate": "no-memory",
    }
)
#: Then a command fails one time in so many, where that is drawn evenly.
_FAULT_OPTIONS = 4


def fails(kernel: SimKernel, point: str) -> bool:
    """Whether the command fails here."""
    assert point in CONTROL_FAULTS, point
    if point in _STRUCK_BY and kernel.strikes(_STRUCK_BY[point], _FAULT_OPTIONS):
        return True
    return point in kernel.control_faults and bool(kernel.choices.choose(point, 2))
