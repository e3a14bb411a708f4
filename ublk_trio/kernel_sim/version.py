"""Which Linux release the simulator plays, and what follows from it.

**Supported.** Releases from 6.0 to 7.3, as ``(major, minor)``; features and control commands appear with their release.
**Rejected.** Anything older than 6.0, where there was no ublk.
**Differs from Linux.** A feature that this simulator does not model is not offered, whatever the release (`MODELLED`).
Stable releases got some changes earlier than the release named here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

from ublk_trio.uapi import FEATURE_RELEASE, ControlCommand, Feature

#: The features whose behaviour the simulator has. The others come as they are written: recovery, user copy, zero copy, …
MODELLED = (
    Feature.URING_CMD_COMP_IN_TASK
    | Feature.NEED_GET_DATA
    | Feature.CMD_IOCTL_ENCODE
    | Feature.UPDATE_SIZE
    | Feature.PER_IO_DAEMON
    | Feature.BUF_REG_OFF_DAEMON
    | Feature.SAFE_STOP_DEV
    | Feature.NO_AUTO_PART_SCAN
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
COMMAND_RELEASE: Mapping[ControlCommand, tuple[int, int]] = MappingProxyType(
    {
        ControlCommand.GET_QUEUE_AFFINITY: (6, 0),
        ControlCommand.GET_DEV_INFO: (6, 0),
        ControlCommand.ADD_DEV: (6, 0),
        ControlCommand.DEL_DEV: (6, 0),
        ControlCommand.START_DEV: (6, 0),
        ControlCommand.STOP_DEV: (6, 0),
        ControlCommand.SET_PARAMS: (6, 0),
        ControlCommand.GET_PARAMS: (6, 0),
        ControlCommand.GET_DEV_INFO2: (6, 3),
        ControlCommand.GET_FEATURES: (6, 5),
        ControlCommand.DEL_DEV_ASYNC: (6, 9),
        ControlCommand.UPDATE_SIZE: (6, 16),
        ControlCommand.TRY_STOP_DEV: (7, 0),
    }
)


@functools.total_ordering
class KernelVersion:
    """A release, comparable with another and with a ``(major, minor)`` tuple."""

    __slots__ = ("release",)

    def __init__(self, major: int, minor: int) -> None:
        if (major, minor) < (6, 0):
            raise ValueError(f"Linux {major}.{minor} had no ublk driver: 6.0 was the first")
        self.release = (major, minor)

    @classmethod
    def of(cls, version: KernelVersion | tuple[int, int]) -> KernelVersion:
        return version if isinstance(version, KernelVersion) else cls(*version)

    @staticmethod
    def _release(other: object) -> tuple[int, int] | None:
        if isinstance(other, KernelVersion):
            return other.release
        return other if isinstance(other, tuple) else None

    def __eq__(self, other: object) -> bool:
        return self.release == self._release(other)

    def __lt__(self, other: KernelVersion | tuple[int, int]) -> bool:
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

    @property
    def short_write_is_whole(self) -> bool:
        """A commit of fewer bytes ends a WRITE whole and "OK"; up to 7.1 the rest was delivered again."""
        return self.release >= (7, 2)

    @property
    def checks_opener_pid(self) -> bool:
        """START_DEV refuses a pid that is not the char device's opener (6.17)."""
        return self.release >= (6, 17)

    @property
    def stopping_refuses(self) -> bool:
        """A stopped device refuses FETCH with ENODEV and wakes START_DEV, until its char device was closed (7.0)."""
        return self.release >= (7, 0)

    @property
    def limits_privileged_devices(self) -> bool:
        """``ublks_max`` counts every device; from 6.15 unprivileged ones only."""
        return self.release < (6, 15)

    @property
    def scans_partitions_later(self) -> bool:
        """START_DEV may return before the partition scan has read anything (7.0)."""
        return self.release >= (7, 0)

    @property
    def default_request_bytes_max(self) -> int:
        """Linux's own cap on a READ or WRITE: 1280 KiB, 4 MiB from 6.17."""
        return 4 << 20 if self.release >= (6, 17) else 1280 << 10

    @property
    def io_opt_raises_requests(self) -> bool:
        """A larger optimal or minimal I/O size raises that cap (6.11)."""
        return self.release >= (6, 11)

    @property
    def groups_cpus(self) -> bool:
        """Neighbouring CPUs share a hardware queue; before, the queues took turns (6.3)."""
        return self.release >= (6, 3)
