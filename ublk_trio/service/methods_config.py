"""The methods that save a configuration: by subsystem, each a list of the calls that make its state again.

``save_config`` and ``load_config`` of SPDK's programs are built on these. There are two subsystems: the bdevs, and the disks,
which depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import attrs
import msgspec

from ublk_trio.options import DataMode, Recovery
from ublk_trio.rpc import ErrorCode, Method, NoParams, RpcError
from ublk_trio.service.cpumask import format_cpumask
from ublk_trio.service.service import Call, Service


class GetConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``framework_get_config``."""

    name: str
    #: SPDK's client says it; there are no batches here to be flattened.
    with_batches: bool = False


def _bdev_calls(service: Service) -> list[Call]:
    # Before the bdevs that share them.
    clusters = [
        Call(method="bdev_rbd_register_cluster", params=service.clusters.get(name).params) for name in service.clusters
    ]
    limited = [(bdev.name, attrs.asdict(bdev.limits)) for bdev in service.registry]
    limits = [
        Call(method="bdev_set_qos_limit", params={"name": name, **limits})
        for name, limits in limited
        if any(limits.values())
    ]
    return clusters + service.calls() + limits


def _ublk_calls(service: Service) -> list[Call]:
    disks = service.disks
    if not disks.has_target:
        return []
    # With a mask there are workers: it is not made up.
    mask = {} if disks.cpus is None else {"cpumask": format_cpumask(disks.cpus)}
    target = {**mask, "disable_user_copy": disks.disable_user_copy}
    return [Call(method="ublk_create_target", params=target), *(_start_call(disk) for disk in disks)]


def _start_call(disk: Any) -> Call:
    options = disk.device.options
    params: dict[str, Any] = {
        "bdev_name": disk.bdev_name,
        "ublk_id": disk.ublk_id,
        "num_queues": options.queues,
        "queue_depth": options.depth,
    }
    # What SPDK does not have is left out where it is what SPDK does.
    if options.unprivileged:
        params["unprivileged"] = True
    elif options.recovery is not Recovery.REISSUE:
        params["recovery"] = options.recovery.value
    if options.mode is not DataMode.COPY:
        params["mode"] = options.mode.value
    if options.read_only:
        params["read_only"] = True
    return Call(method="ublk_start_disk", params=params)


#: Each subsystem, with those that it depends on and its calls, in the order in which they are made again.
SUBSYSTEMS: Final[dict[str, tuple[tuple[str, ...], Callable[[Service], list[Call]]]]] = {
    "bdev": ((), _bdev_calls),
    "ublk": (("bdev",), _ublk_calls),
}


def save(service: Service) -> dict[str, Any]:
    """The whole configuration, in the form of SPDK's ``save_config``."""
    return {
        "subsystems": [
            {
                "subsystem": name,
                "config": [{"method": call.method, "params": dict(call.params)} for call in calls(service)],
            }
            for name, (_, calls) in SUBSYSTEMS.items()
        ]
    }


async def get_subsystems(service: Service, params: NoParams) -> list[dict[str, Any]]:
    """The subsystems, in the order in which they are made."""
    return [{"subsystem": name, "depends_on": list(needed)} for name, (needed, _) in SUBSYSTEMS.items()]


async def get_config(service: Service, params: GetConfig) -> list[dict[str, Any]]:
    """The calls that make one subsystem's state again."""
    found = SUBSYSTEMS.get(params.name)
    if found is None:
        known = ", ".join(SUBSYSTEMS)
        raise RpcError(
            ErrorCode.INVALID_PARAMS, f"params.name: there is no subsystem {params.name!r}; known are {known}"
        )
    return [{"method": call.method, "params": dict(call.params)} for call in found[1](service)]


CONFIG_METHODS: Final[tuple[Method[Service, Any], ...]] = (
    Method(name="framework_get_subsystems", params=NoParams, function=get_subsystems),
    Method(name="framework_get_config", params=GetConfig, function=get_config),
)
