"""What a user can choose about a device."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import TypeVar, get_args

import attrs

from ublk_trio.errors import UsageError
from ublk_trio.handlers import Serve
from ublk_trio.uapi import MAX_DEVICES, MAX_IO_BYTES, MAX_NR_QUEUES, MAX_QUEUE_DEPTH, Feature


class DataMode(Enum):
    """How a request's data moves between the kernel and the backend."""

    #: One buffer per tag, posted ahead.
    COPY = "copy"
    #: A bounded pool of buffers per queue: memory for what is in flight only, for one more round trip per WRITE.
    GET_DATA = "get-data"
    #: A bounded pool as well, without the round trip: the server moves the data itself, by a system call for each request.
    USER_COPY = "user-copy"


#: The feature that each asks the kernel for.
MODE_FLAGS: Mapping[DataMode, Feature] = MappingProxyType(
    {DataMode.COPY: Feature(0), DataMode.GET_DATA: Feature.NEED_GET_DATA, DataMode.USER_COPY: Feature.USER_COPY}
)


class Recovery(Enum):
    """What becomes of a disk when its server dies without stopping it."""

    #: The disk goes, and what was under way fails.
    OFF = "off"
    #: The disk stays. What the server held fails with EIO, since it may have been done; all else waits for a new server.
    REQUEUE = "requeue"
    #: The disk stays. What the server held is given to the new one again: for backends where doing it twice is harmless.
    REISSUE = "reissue"
    #: The disk stays. What the server held fails with EIO, all else with EREMOTEIO until there is a new one.
    FAIL = "fail"


#: The features that each asks the kernel for.
RECOVERY_FLAGS: Mapping[Recovery, Feature] = MappingProxyType(
    {
        Recovery.OFF: Feature(0),
        Recovery.REQUEUE: Feature.USER_RECOVERY,
        Recovery.REISSUE: Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE,
        Recovery.FAIL: Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO,
    }
)


_Choice = TypeVar("_Choice", bound=Enum)


def _member(kind: type[_Choice], name: str, value: _Choice | str) -> _Choice:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(str(member.value) for member in kind)
        raise UsageError(f"{name} is {value!r}: known are {known}") from None


def _to_recovery(value: Recovery | str) -> Recovery:
    return _member(Recovery, "recovery", value)


def _to_mode(value: DataMode | str) -> DataMode:
    return _member(DataMode, "mode", value)


@attrs.frozen(kw_only=True)
class DeviceOptions:
    """How to make a device. The kernel may lower `queues` (to its number of CPUs) and round `max_io_bytes` down to a
    page."""

    #: The N of /dev/ublkbN; None takes a free one.
    dev_id: int | None = None
    queues: int = 1
    #: Requests in flight per queue.
    depth: int = 128
    #: Bytes of the largest request.
    max_io_bytes: int = 512 * 1024
    mode: DataMode = attrs.field(default=DataMode.COPY, converter=_to_mode)
    #: Buffers per queue in GET_DATA and USER_COPY mode (at most `depth` are made).
    pool_buffers: int = 32
    #: None: "async" if the backend has an async method, else "inline".
    serve: Serve | None = None
    read_only: bool = False
    recovery: Recovery = attrs.field(default=Recovery.OFF, converter=_to_recovery)
    #: A disk of an ordinary user's; root has none of these.
    unprivileged: bool = False
    #: Seconds without progress after which a stop no longer waits for the backend: what it still holds fails with EIO.
    grace_seconds: float = 10.0

    def check(self, *, page_size: int) -> None:
        """Raise `UsageError` for what no kernel accepts."""
        _check_range("queues", self.queues, 1, MAX_NR_QUEUES)
        _check_range("depth", self.depth, 1, MAX_QUEUE_DEPTH)
        _check_range("pool_buffers", self.pool_buffers, 1, MAX_QUEUE_DEPTH)
        _check_range("max_io_bytes", self.max_io_bytes, page_size, MAX_IO_BYTES)
        if self.dev_id is not None:
            _check_range("the device id", self.dev_id, 0, MAX_DEVICES - 1)
        if self.unprivileged and self.recovery is not Recovery.OFF:
            raise UsageError("an unprivileged disk has no recovery: the kernel does not let it outlive its server")
        if self.unprivileged and self.mode is DataMode.USER_COPY:
            raise UsageError(
                "an unprivileged disk cannot have mode user-copy: the kernel lets only root's servers copy"
            )
        if self.serve not in (None, *get_args(Serve)):
            raise UsageError(f"serve is {self.serve!r}: known are {', '.join(get_args(Serve))}")
        if self.max_io_bytes % page_size:
            raise UsageError(f"max_io_bytes is {self.max_io_bytes}: give a multiple of {page_size}")
        if not self.grace_seconds >= 0:
            raise UsageError(f"grace_seconds is {self.grace_seconds}: give 0 or more")


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}: give {low} to {high}")
