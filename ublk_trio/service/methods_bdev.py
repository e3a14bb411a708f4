"""The methods of all bdevs, whatever they are made of: what there is, and what it did."""

from __future__ import annotations

import errno
import time
from typing import Annotated, Any, Final, Literal

import attrs
import msgspec
import trio
from msgspec import Meta

from ublk_trio.bdev import Bdev, IoStatistics
from ublk_trio.errors import BackendError, UsageError
from ublk_trio.rpc import Method
from ublk_trio.service.service import Service

Limit = Annotated[int, Meta(ge=0)]

#: SPDK's names of I/O types, and the backend method that each asks for; None: not here.
_IO_TYPES: Final = {
    "read": "read",
    "write": "write",
    "unmap": "discard",
    "flush": "flush",
    "reset": None,
    "nvme_admin": None,
    "nvme_io": None,
    "nvme_io_md": None,
    "write_zeroes": "write_zeroes",
    "zcopy": None,
    "get_zone_info": None,
    "zone_management": None,
    "zone_append": None,
    "compare": None,
    "compare_and_write": None,
    "abort": None,
    "seek_hole": None,
    "seek_data": None,
    "copy": None,
    "nvme_iov_md": None,
}
#: Ticks of the clock in which latencies are given: nanoseconds.
_TICK_RATE: Final = 1_000_000_000


class GetBdevs(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_get_bdevs``: a name or UUID, and how many milliseconds to wait for it."""

    name: str | None = None
    timeout: Annotated[int, Meta(ge=0)] = 0


class GetIostat(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_get_iostat``. With `reset_mode` all, counting begins again after the answer."""

    name: str | None = None
    names: list[str] | None = None
    reset_mode: Literal["none", "all"] = "none"
    #: SPDK's client says it always, and only false is possible: one thread serves all.
    per_channel: bool = False


class SetQosLimit(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_set_qos_limit``. What is left out stays; 0 is no limit."""

    name: str
    rw_ios_per_sec: Limit | None = None
    rw_mbytes_per_sec: Limit | None = None
    r_mbytes_per_sec: Limit | None = None
    w_mbytes_per_sec: Limit | None = None


async def get_bdevs(service: Service, params: GetBdevs) -> list[dict[str, Any]]:
    """All bdevs, or one."""
    if params.name is None:
        return [_describe(service, bdev) for bdev in service.registry]
    with trio.move_on_after(params.timeout / 1000):
        await service.registry.wait_for(params.name)
    return [_describe(service, service.registry.get(params.name))]


async def get_iostat(service: Service, params: GetIostat) -> dict[str, Any]:
    """The counters of all bdevs, or of some."""
    if params.name is not None and params.names is not None:
        raise BackendError(errno.EINVAL, "params.name and params.names: give one of them")
    if params.per_channel:
        raise UsageError("params.per_channel: only false is possible: a bdev has no channels here")
    names = params.names if params.name is None else [params.name]
    bdevs = list(service.registry) if names is None else [service.registry.get(name) for name in names]
    answer = {
        "tick_rate": _TICK_RATE,
        "ticks": time.perf_counter_ns(),
        "bdevs": [{"name": bdev.name, **_counted(bdev.counters.statistics())} for bdev in bdevs],
    }
    if params.reset_mode == "all":
        for bdev in bdevs:
            bdev.counters.reset()
    return answer


async def set_qos_limit(service: Service, params: SetQosLimit) -> bool:
    """Limit what a bdev carries out in a second, at once."""
    bdev = service.registry.get(params.name)
    given = {name: getattr(params, name) for name in attrs.asdict(bdev.limits)}
    if all(limit is None for limit in given.values()):
        raise UsageError(f"params: give a limit: {', '.join(given)}")
    bdev.set_limits(attrs.evolve(bdev.limits, **{name: limit for name, limit in given.items() if limit is not None}))
    return True


def _counted(statistics: IoStatistics) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for operation, ops, done in (
        ("read", "read", "read"),
        ("write", "write", "written"),
        ("discard", "unmap", "unmapped"),
    ):
        shown[f"bytes_{done}"] = statistics.operations[operation].bytes
        shown[f"num_{ops}_ops"] = statistics.operations[operation].count
    for operation, ops in (("read", "read"), ("write", "write"), ("discard", "unmap")):
        counted = statistics.operations[operation]
        shown[f"{ops}_latency_ticks"] = counted.total_ns
        shown[f"max_{ops}_latency_ticks"] = counted.max_ns
        shown[f"min_{ops}_latency_ticks"] = counted.min_ns
    # What SPDK counts and nobody can ask of a disk here.
    shown |= dict.fromkeys(
        ("bytes_copied", "num_copy_ops", "copy_latency_ticks", "max_copy_latency_ticks", "min_copy_latency_ticks"), 0
    )
    shown["num_flush_ops"] = statistics.operations["flush"].count
    shown["num_write_zeroes_ops"] = statistics.operations["write_zeroes"].count
    shown["io_error"] = {errno.errorcode.get(number, str(number)): n for number, n in sorted(statistics.errors.items())}
    return shown


def _describe(service: Service, bdev: Bdev) -> dict[str, Any]:
    claim = bdev.claimed_by
    return {
        "name": bdev.name,
        "aliases": [str(bdev.uuid)],
        "product_name": bdev.product_name,
        "block_size": bdev.block_size,
        "num_blocks": bdev.size // bdev.block_size,
        "uuid": str(bdev.uuid),
        "assigned_rate_limits": attrs.asdict(bdev.limits),
        "claimed": claim is not None,
        **({} if claim is None else {"claim_type": "exclusive_write", "claimed_by": claim}),
        "zoned": False,
        "supported_io_types": {name: method in bdev.offered for name, method in _IO_TYPES.items()},
        "driver_specific": service.made(bdev).specific(),
    }


BDEV_METHODS: Final[tuple[Method[Service, Any], ...]] = (
    Method(name="bdev_get_bdevs", params=GetBdevs, function=get_bdevs, ends_with_client=True),
    Method(name="bdev_get_iostat", params=GetIostat, function=get_iostat),
    Method(name="bdev_set_qos_limit", params=SetQosLimit, function=set_qos_limit),
)
