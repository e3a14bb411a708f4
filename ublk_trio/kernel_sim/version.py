"""Which Linux release the simulator plays, and what follows from it.

**Supported.** Releases from 6.0 to 7.3, as ``(major, minor)``; features and control commands appear with their release,
and every other difference is a property of `KernelVersion` with the release that made it.
**Rejected.** Anything older than 6.0, where there was no ublk.
**Differs from Linux.** A feature that this simulator does not model is not offered, whatever the release (`MODELLED`).
Long-term series got fixes of later releases: 6.12 is played as its series is now; elsewhere a change comes with the
release named here. How releases before 6.7 found out that a server had died (they looked every few seconds) is not
played: there it is as in 6.12.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, overload

from ublk_trio.uapi import FEATURE_RELEASE, ControlCommand, Feature

Release = tuple[int, int]

#: The features whose behaviour the simulator has.
MODELLED = (
    Feature.URING_CMD_COMP_IN_TASK
    | Feature.NEED_GET_DATA
    | Feature.SUPPORT_ZERO_COPY
    | Feature.USER_COPY
    | Feature.ZONED
    | Feature.AUTO_BUF_REG
    | Feature.BATCH_IO
    | Feature.INTEGRITY
    | Feature.SHMEM_ZC
    | Feature.USER_RECOVERY
    | Feature.USER_RECOVERY_REISSUE
    | Feature.UNPRIVILEGED_DEV
    | Feature.CMD_IOCTL_ENCODE
    | Feature.USER_RECOVERY_FAIL_IO
    | Feature.UPDATE_SIZE
    | Feature.QUIESCE
    | Feature.PER_IO_DAEMON
    | Feature.BUF_REG_OFF_DAEMON
    | Feature.SAFE_STOP_DEV
    | Feature.NO_AUTO_PART_SCAN
    | Feature.IO_DESC_SIZE
)

#: What ADD_DEV grants without being asked, as the release has it.
ALWAYS_GRANTED = (
    Feature.CMD_IOCTL_ENCODE
    | Feature.URING_CMD_COMP_IN_TASK
    | Feature.PER_IO_DAEMON
    | Feature.BUF_REG_OFF_DAEMON
    | Feature.SAFE_STOP_DEV
)

#: The first release of each control command that the simulator models; the absent ones are EOPNOTSUPP everywhere.
COMMAND_RELEASE: Mapping[ControlCommand, Release] = MappingProxyType(
    {
        ControlCommand.GET_QUEUE_AFFINITY: (6, 0),
        ControlCommand.GET_DEV_INFO: (6, 0),
        ControlCommand.ADD_DEV: (6, 0),
        ControlCommand.DEL_DEV: (6, 0),
        ControlCommand.START_DEV: (6, 0),
        ControlCommand.STOP_DEV: (6, 0),
        ControlCommand.SET_PARAMS: (6, 0),
        ControlCommand.GET_PARAMS: (6, 0),
        ControlCommand.START_USER_RECOVERY: (6, 1),
        ControlCommand.END_USER_RECOVERY: (6, 1),
        ControlCommand.GET_DEV_INFO2: (6, 3),
        ControlCommand.GET_FEATURES: (6, 5),
        ControlCommand.DEL_DEV_ASYNC: (6, 9),
        ControlCommand.UPDATE_SIZE: (6, 16),
        ControlCommand.QUIESCE_DEV: (6, 16),
        ControlCommand.TRY_STOP_DEV: (7, 0),
        ControlCommand.REG_BUF: (7, 1),
        ControlCommand.UNREG_BUF: (7, 1),
    }
)

#: Series that are maintained for years, with fixes from later releases.
LONG_TERM: Final = frozenset({(6, 1), (6, 6), (6, 12)})


class Difference:
    """A fact that is true of some releases only. On a `KernelVersion` it is a bool; on the class it is itself, for tables."""

    name: str

    def __init__(self, text: str, when: str, true_of: Callable[[Release], bool]) -> None:
        self.text = text
        self.when = when
        self._true_of = true_of
        self.__doc__ = f"{text} ({when})"

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Difference: ...
    @overload
    def __get__(self, instance: KernelVersion, owner: type) -> bool: ...
    def __get__(self, instance: KernelVersion | None, owner: type) -> Difference | bool:
        return self if instance is None else self._true_of(instance.release)


def _since(major: int, minor: int, text: str) -> Difference:
    return Difference(text, f"since {major}.{minor}", lambda release: release >= (major, minor))


def _before(major: int, minor: int, text: str) -> Difference:
    return Difference(text, f"before {major}.{minor}", lambda release: release < (major, minor))


@functools.total_ordering
class KernelVersion:
    """A release, comparable with another and with a ``(major, minor)`` tuple."""

    __slots__ = ("release",)

    def __init__(self, major: int, minor: int) -> None:
        if (major, minor) < (6, 0):
            raise ValueError(f"Linux {major}.{minor} had no ublk driver: 6.0 was the first")
        self.release = (major, minor)

    @classmethod
    def of(cls, version: KernelVersion | Release) -> KernelVersion:
        return version if isinstance(version, KernelVersion) else cls(*version)

    @staticmethod
    def _release(other: object) -> Release | None:
        if isinstance(other, KernelVersion):
            return other.release
        return other if isinstance(other, tuple) else None

    def __eq__(self, other: object) -> bool:
        return self.release == self._release(other)

    def __lt__(self, other: KernelVersion | Release) -> bool:
        release = self._release(other)
        return NotImplemented if release is None else self.release < release

    def __hash__(self) -> int:
        return hash(self.release)

    def __str__(self) -> str:
        return "{}.{}".format(*self.release)

    def __repr__(self) -> str:
        return f"KernelVersion{self.release}"

    @property
    def features(self) -> Feature:
        """What the release's driver has, whether modelled here or not."""
        return Feature(sum(feature for feature, release in FEATURE_RELEASE.items() if self.release >= release))

    def has_command(self, command: ControlCommand) -> bool:
        """Whether the simulator answers the command as this release does."""
        release = COMMAND_RELEASE.get(command)
        return release is not None and self.release >= release

    # ------------------------------------------------------------------ control commands

    finds_device_first = _since(
        6, 3, "A control command for no device is ENODEV whatever else is wrong with it; before, most said EINVAL."
    )
    understands_ioctl_encoding = _since(6, 4, "Opcodes may come in ioctl encoding.")
    unknown_is_enotsupp = Difference(
        "An unknown control command is ENOTSUPP (524, which has no name in user space) instead of EOPNOTSUPP.",
        "before 6.14, but not in long-term series",
        lambda release: release < (6, 14) and release not in LONG_TERM,
    )
    limits_privileged_devices = _before(6, 12, "`ublks_max` counts every device; then unprivileged ones only.")
    checks_recovery_flags = _since(6, 13, "ADD_DEV refuses recovery flags that exclude each other.")
    checks_physical_shifts = _since(7, 0, "SET_PARAMS refuses shifts above 28.")
    zone_size_is_power_of_two = _since(7, 0, "SET_PARAMS refuses a zone size that is no power of two, not only 0.")
    failed_params_are_zeroed = _since(
        7,
        0,
        "Parameters that SET_PARAMS refused are zeroed; before, only their types were, and the rest could be read.",
    )
    checks_opener_pid = _since(
        6, 17, "START_DEV and END_USER_RECOVERY refuse a pid that is not the char device's opener."
    )
    reports_live_pids_only = _since(7, 0, "GET_DEV_INFO says -1 for the pid of a server that has died.")

    # ------------------------------------------------------------------ starting and stopping

    scans_partitions_later = _since(7, 0, "START_DEV returns before the partition scan has read anything.")
    stopping_refuses = _since(
        7,
        0,
        "A device that was stopped under its server refuses FETCH_REQ with ENODEV and START_DEV with EBUSY until its char "
        "device was closed, and wakes whoever waits in them.",
    )
    readiness_is_checked_anew = _since(
        7,
        0,
        "START_DEV and END_USER_RECOVERY look whether the tags are fetched now. Before, it was enough that they all were once "
        "since START_USER_RECOVERY: a device whose server is gone starts, and serves nothing.",
    )

    # ------------------------------------------------------------------ the end of a server

    release_ends_server = _since(
        6,
        15,
        "The last close of the char device is the server's end: what it held is dealt with then, and a next server gets new "
        "requests as soon as a queue's tags are fetched. Before, it happened when an idle command of the same queue was "
        "cancelled; with none, only a request's 30 s timeout finds out, if the process died; and nothing is delivered before "
        "END_USER_RECOVERY, which needs a START_USER_RECOVERY to forget the old server.",
    )
    closed_device_is_reset = _since(
        7, 0, "The last close resets a device without a disk, too, so that a new server can fetch its tags."
    )
    has_multishot_commands = _since(
        6, 18, "io_uring takes commands to drivers that complete many times, with provided buffers; EOPNOTSUPP before."
    )
    fails_read_from_nowhere = _since(
        7, 0, "A READ of whose data nothing could be copied fails; 6.12 delivers it again."
    )
    short_write_is_whole = _since(
        7, 2, 'A commit of fewer bytes ends a WRITE whole and "OK"; up to 7.1 the rest was delivered again.'
    )

    # ------------------------------------------------------------------ the block layer

    @property
    def default_request_bytes_max(self) -> int:
        """Linux's own cap on a READ or WRITE: 1280 KiB, 4 MiB from 6.17."""
        return 4 << 20 if self.release >= (6, 17) else 1280 << 10

    io_opt_raises_requests = _since(6, 11, "A larger optimal or minimal I/O size raises Linux's own cap on a request.")
    groups_cpus = _since(6, 3, "Neighbouring CPUs share a hardware queue; before, the queues took turns.")

    @classmethod
    def differences(cls) -> list[Difference]:
        """Every named difference between releases."""
        return [value for value in vars(cls).values() if isinstance(value, Difference)]
