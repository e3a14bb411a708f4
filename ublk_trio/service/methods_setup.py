"""The methods of SPDK's set-up: pools of buffers, their sizes, and the examination of bdevs.

Every saved configuration of SPDK's sets options of its own memory and threads, and of much that is not here. What only tunes is taken, so
that such a file can be loaded, and passed over with a warning. What makes something is not: a file that needs it cannot be had here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from ublk_trio.rpc import AnyParams, Method, NoParams
from ublk_trio.service.methods_plain import Named
from ublk_trio.service.service import Service

logger = logging.getLogger("ublk_trio.service")

Count = Annotated[int, Meta(ge=0)]

#: Methods that only tune something, and what it is: there is none of it here.
TUNING: Final[Mapping[str, str]] = MappingProxyType(
    {
        "accel_assign_opc": "accelerator",
        "accel_set_driver": "accelerator",
        "accel_set_options": "accelerator",
        "bdev_enable_histogram": "histogram of latencies",
        "bdev_iscsi_set_options": "iSCSI bdev",
        "bdev_nvme_set_hotplug": "NVMe bdev",
        "bdev_nvme_set_options": "NVMe bdev",
        "bdev_raid_set_options": "choice of how a rebuild copies",
        "framework_set_scheduler": "scheduler of threads",
        "fsdev_set_opts": "file system device",
        "iscsi_enable_histogram": "iSCSI target",
        "iscsi_set_options": "iSCSI target",
        "keyring_linux_set_options": "keyring",
        "nvmf_set_config": "NVMe-oF target",
        "nvmf_set_crdt": "NVMe-oF target",
        "nvmf_set_max_subsystems": "NVMe-oF target",
        "sock_impl_set_options": "socket of a storage protocol",
        "sock_set_default_impl": "socket of a storage protocol",
        "vmd_enable": "VMD device",
    }
)


class BdevSetOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_set_options``."""

    bdev_io_pool_size: Count | None = None
    bdev_io_cache_size: Count | None = None
    bdev_auto_examine: bool | None = None
    iobuf_small_cache_size: Count | None = None
    iobuf_large_cache_size: Count | None = None


class IobufSetOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``iobuf_set_options``."""

    small_pool_count: Count | None = None
    large_pool_count: Count | None = None
    small_bufsize: Count | None = None
    large_bufsize: Count | None = None
    enable_numa: bool | None = None


async def bdev_set_options(service: Service, params: BdevSetOptions) -> bool:
    """Nothing but a line in the log."""
    return _pass_over("bdev_set_options", "pool of requests")


async def iobuf_set_options(service: Service, params: IobufSetOptions) -> bool:
    """Nothing but a line in the log."""
    return _pass_over("iobuf_set_options", "pool of buffers that all share")


def _pass_over(method: str, what: str) -> bool:
    logger.warning("%s is passed over: there is no %s here", method, what)
    return True


def _tuning_method(name: str, what: str) -> Method[Service, AnyParams]:
    async def pass_over(service: Service, params: AnyParams) -> bool:
        return _pass_over(name, what)

    return Method(name=name, params=AnyParams, function=pass_over)


async def bdev_examine(service: Service, params: Named) -> bool:
    """Nothing: nothing is found on a bdev. Raises `BackendError` (ENODEV)."""
    service.registry.get(params.name)
    return True


async def bdev_wait_for_examine(service: Service, params: NoParams) -> bool:
    """Nothing: nothing is being examined."""
    return True


async def iobuf_get_stats(service: Service, params: NoParams) -> list[dict[str, Any]]:
    """What became of requests for buffers, over all disks that are live now.

    Only disks of mode get-data have pools; they are SPDK's large ones. A buffer that was free at once came from a queue's own pool
    (cache), one that had to be waited for is a retry; there is no pool that queues share (main).
    """
    pools = [
        (pool, sum(queue.requests.get(operation, 0) for operation in ("READ", "WRITE")))
        for disk in service.disks
        if disk.device is not None
        for queue in disk.device.statistics().queues
        if (pool := queue.pool) is not None
    ]
    large = _pool(
        cache=sum(max(0, requests - pool.waited_total) for pool, requests in pools),
        retry=sum(pool.waited_total for pool, _ in pools),
        sizes=(pool.buffers for pool, _ in pools),
    )
    return [{"module": "ublk", "small_pool": _pool(cache=0, retry=0, sizes=()), "large_pool": large}]


def _pool(*, cache: int, retry: int, sizes: Iterable[int]) -> dict[str, int]:
    return {"cache": cache, "main": 0, "retry": retry, "cache_size": sum(sizes)}


SETUP_METHODS: Final[tuple[Method[Service, Any], ...]] = (
    Method(name="bdev_set_options", params=BdevSetOptions, function=bdev_set_options),
    Method(name="bdev_examine", params=Named, function=bdev_examine),
    Method(name="bdev_wait_for_examine", params=NoParams, function=bdev_wait_for_examine),
    Method(name="iobuf_set_options", params=IobufSetOptions, function=iobuf_set_options),
    Method(name="iobuf_get_stats", params=NoParams, function=iobuf_get_stats),
    *(_tuning_method(name, what) for name, what in TUNING.items()),
)
