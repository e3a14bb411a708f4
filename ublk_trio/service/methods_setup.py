"""The methods of SPDK's set-up: pools of buffers, their sizes, and the examination of bdevs.

Every saved configuration of SPDK's sets options of its own memory and threads. They are taken here, so that such a file can be loaded, and
have no meaning: buffers belong to the queues of disks, and no bdev is found on another one by examining it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from ublk_trio.rpc import Method, NoParams
from ublk_trio.service.methods_plain import Named
from ublk_trio.service.service import Service

logger = logging.getLogger("ublk_trio.service")

Count = Annotated[int, Meta(ge=0)]


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
    return _pass_over("bdev_set_options", params)


async def iobuf_set_options(service: Service, params: IobufSetOptions) -> bool:
    """Nothing but a line in the log."""
    return _pass_over("iobuf_set_options", params)


def _pass_over(method: str, params: msgspec.Struct) -> bool:
    given = ", ".join(name for name, value in msgspec.structs.asdict(params).items() if value is not None)
    logger.info("%s: %s: these have no meaning here", method, given or "no options")
    return True


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
)
