"""The methods of the target and its disks: ``ublk_…``.

`ublk_id` may be left out, and the kernel chooses one. `recovery` is ours: what becomes of the disk when this process dies;
left out, it stays, so that `ublk_recover_disk` can take it over. `unprivileged` is ours too: a disk of an ordinary user's, as whom this
process runs; it never stays.
"""

from __future__ import annotations

import mmap
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from ublk_trio.options import DataMode, DeviceOptions, Recovery
from ublk_trio.rpc import Method, NoParams
from ublk_trio.service.disks import Disk
from ublk_trio.service.service import Service
from ublk_trio.uapi import MAX_DEVICES, MAX_NR_QUEUES, MAX_QUEUE_DEPTH

UblkId = Annotated[int, Meta(ge=0, lt=MAX_DEVICES)]


class CreateTarget(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``ublk_create_target``."""

    cpumask: str | None = None
    disable_user_copy: bool = False


class StartDisk(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``ublk_start_disk``. More queues or depth than the kernel has are lowered, as in SPDK."""

    bdev_name: str
    ublk_id: UblkId | None = None
    num_queues: Annotated[int, Meta(ge=1)] = 1
    queue_depth: Annotated[int, Meta(ge=1)] = 128
    #: Left out: reissue, or off for an unprivileged disk.
    recovery: Recovery | None = None
    mode: DataMode = DataMode.COPY
    read_only: bool = False
    #: Left out: as the service is.
    unprivileged: bool | None = None


class StopDisk(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``ublk_stop_disk``. With `if_unused`, ours, a disk that somebody has open goes on."""

    ublk_id: UblkId
    if_unused: bool = False


class RecoverDisk(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``ublk_recover_disk``."""

    bdev_name: str
    ublk_id: UblkId


class GetDisks(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``ublk_get_disks``. 0 is an id like any other."""

    ublk_id: UblkId | None = None


async def create_target(service: Service, params: CreateTarget) -> bool:
    """Open the driver."""
    await service.disks.create_target(cpumask=params.cpumask, disable_user_copy=params.disable_user_copy)
    return True


async def destroy_target(service: Service, params: NoParams) -> bool:
    """Stop all disks and close the driver; answered when all is gone."""
    await service.disks.destroy_target()
    return True


async def start_disk(service: Service, params: StartDisk) -> int | None:
    """Serve a bdev as a disk; answered with its id when it is live."""
    unprivileged = service.unprivileged if params.unprivileged is None else params.unprivileged
    usual = Recovery.OFF if unprivileged else Recovery.REISSUE
    options = DeviceOptions(
        dev_id=params.ublk_id,
        queues=min(params.num_queues, MAX_NR_QUEUES),
        depth=min(params.queue_depth, MAX_QUEUE_DEPTH),
        recovery=usual if params.recovery is None else params.recovery,
        mode=params.mode,
        read_only=params.read_only,
        unprivileged=unprivileged,
    )
    options.check(page_size=mmap.PAGESIZE)
    disk = await service.disks.start_disk(params.bdev_name, options)
    return disk.ublk_id


async def stop_disk(service: Service, params: StopDisk) -> bool:
    """Stop a disk; answered when it is gone."""
    await service.disks.stop_disk(params.ublk_id, only_if_unused=params.if_unused)
    return True


async def recover_disk(service: Service, params: RecoverDisk) -> int | None:
    """Take over a disk that a server left behind."""
    disk = await service.disks.recover_disk(params.bdev_name, params.ublk_id)
    return disk.ublk_id


async def get_disks(service: Service, params: GetDisks) -> list[dict[str, Any]]:
    """All disks, or one."""
    disks = list(service.disks) if params.ublk_id is None else [service.disks.get(params.ublk_id)]
    return [_describe(disk) for disk in disks if disk.device is not None]


def _describe(disk: Disk) -> dict[str, Any]:
    assert disk.device is not None
    return {
        "ublk_device": disk.device.path,
        "id": disk.ublk_id,
        "queue_depth": disk.device.info.queue_depth,
        "num_queues": disk.device.info.nr_hw_queues,
        "bdev_name": disk.bdev_name,
    }


UBLK_METHODS: Final[tuple[Method[Service, Any], ...]] = (
    Method(name="ublk_create_target", params=CreateTarget, function=create_target),
    Method(name="ublk_destroy_target", params=NoParams, function=destroy_target),
    Method(name="ublk_start_disk", params=StartDisk, function=start_disk),
    Method(name="ublk_stop_disk", params=StopDisk, function=stop_disk),
    Method(name="ublk_recover_disk", params=RecoverDisk, function=recover_disk),
    Method(name="ublk_get_disks", params=GetDisks, function=get_disks),
)
