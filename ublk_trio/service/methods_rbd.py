"""The methods of rbd bdevs: images of Ceph clusters, and the connections that they share."""

from __future__ import annotations

import logging
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec
import trio
from msgspec import Meta

from ublk_trio.backends import CephCluster, Rbd
from ublk_trio.bdev import Bdev
from ublk_trio.errors import UsageError
from ublk_trio.rpc import Method
from ublk_trio.service.cpumask import parse_cpumask
from ublk_trio.service.methods_plain import Positive, Resize, delete_method
from ublk_trio.service.service import Made, Service

logger = logging.getLogger("ublk_trio.service")

_METHOD: Final = "bdev_rbd_create"
_MIB: Final = 1 << 20
#: Whoever gives options means these and no file, as with SPDK.
_NO_FILE: Final = "/dev/null"

NotEmpty = Annotated[str, Meta(min_length=1)]


class RegisterCluster(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Parameters of ``bdev_rbd_register_cluster``. `config_param` wins over the file; without one, Ceph's usual places are looked in."""

    name: NotEmpty
    user_id: str | None = None
    config_param: dict[str, str] | None = None
    config_file: str | None = None
    key_file: str | None = None
    #: CPUs of Ceph's own threads.
    core_mask: str | None = None


class UnregisterCluster(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_rbd_unregister_cluster``."""

    name: str


class GetClustersInfo(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_rbd_get_clusters_info``."""

    name: str | None = None


class RbdCreate(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_rbd_create``. Without a name it is called Ceph0, Ceph1 and so on."""

    pool_name: NotEmpty
    rbd_name: NotEmpty
    block_size: Positive
    name: str | None = None
    #: Of a connection of its own; with `config` no file is read.
    user_id: str | None = None
    config: dict[str, str] | None = None
    #: A registered connection instead.
    cluster_name: str | None = None
    read_only: bool = False
    uuid: UUID | None = None
    #: Not in SPDK: a namespace of the pool.
    namespace_name: str = ""


async def register_cluster(service: Service, params: RegisterCluster) -> str:
    """Connect to a cluster, for any number of bdevs."""
    cluster = CephCluster(
        user=params.user_id,
        config_file=params.config_file,
        config=params.config_param or {},
        keyring=params.key_file,
        cpus=_cpus(service, params.core_mask),
    )
    await service.clusters.register(params.name, cluster, msgspec.to_builtins(params))
    return params.name


def _cpus(service: Service, mask: str | None) -> frozenset[int]:
    # Not those of a target, which Ceph's threads would share with those that serve.
    return service.cpus if mask is None else parse_cpumask(mask, allowed=service.cpus)


async def unregister_cluster(service: Service, params: UnregisterCluster) -> bool:
    """Disconnect from a cluster that no bdev uses."""
    await service.clusters.unregister(params.name)
    return True


async def get_clusters_info(service: Service, params: GetClustersInfo) -> dict[str, Any] | list[dict[str, Any]]:
    """One cluster, or the list of all."""
    if params.name is not None:
        return _cluster_info(service, params.name)
    return [_cluster_info(service, name) for name in service.clusters]


def _cluster_info(service: Service, name: str) -> dict[str, Any]:
    given = dict(service.clusters.get(name).params)
    return {"cluster_name": given.pop("name"), **given}


async def rbd_create(service: Service, params: RbdCreate) -> str:
    """Open an image; a disk that is made of it follows when it is resized, here or elsewhere."""
    if params.cluster_name is not None:
        for passed_over in ("user_id", "config"):
            if getattr(params, passed_over) is not None:
                logger.warning("%s: %s is passed over: the cluster has its own", _METHOD, passed_over)
        cluster = service.clusters.get(params.cluster_name).cluster
    else:
        file = None if params.config is None else _NO_FILE
        cluster = CephCluster(
            user=params.user_id, config_file=file, config=params.config or {}, cpus=_cpus(service, None)
        )
    backend = Rbd(
        params.pool_name,
        params.rbd_name,
        namespace=params.namespace_name,
        cluster=cluster,
        read_only=params.read_only,
        block_size=params.block_size,
    )
    made = Made(
        method=_METHOD,
        params=lambda: {**_place(params), **_given(params, "cluster_name"), **_own_connection(params)},
        specific=lambda: {"rbd": {**_place(params), **_connection(service, params)}},
    )
    name = params.name if params.name is not None else service.free_name("Ceph")
    bdev = await service.make(made, name, backend, product_name="Ceph Rbd Disk", uuid=params.uuid)
    service.tasks.start_soon(_follow, bdev, backend, name=f"size of {name}")
    return name


async def rbd_resize(service: Service, params: Resize) -> bool:
    """Make the image larger; a disk that is made of it follows."""
    bdev = service.find(params.name, _METHOD)
    assert isinstance(bdev.backend, Rbd)
    await bdev.backend.resize(params.new_size * _MIB)
    await bdev.resized()
    return True


async def _follow(bdev: Bdev, backend: Rbd) -> None:
    """Tell who uses it of a size that somebody else gave the image; ends when the bdev is closed."""
    while True:
        try:
            await backend.next_size()
        except trio.ClosedResourceError:
            return
        try:
            await bdev.resized()
        except (OSError, UsageError) as error:
            logger.warning("bdev %s has another size, and a disk could not follow: %s", bdev.name, error)


def _place(params: RbdCreate) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "pool_name": params.pool_name,
        "rbd_name": params.rbd_name,
        "block_size": params.block_size,
    }
    # What SPDK does not have is left out where it is what SPDK does.
    if params.read_only:
        shown["read_only"] = True
    if params.namespace_name:
        shown["namespace_name"] = params.namespace_name
    return shown


def _given(params: RbdCreate, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(params, name)) is not None}


def _own_connection(params: RbdCreate) -> dict[str, Any]:
    return _given(params, "user_id", "config") if params.cluster_name is None else {}


def _connection(service: Service, params: RbdCreate) -> dict[str, Any]:
    if params.cluster_name is None:
        return _own_connection(params)
    return _cluster_info(service, params.cluster_name)


RBD_METHODS: Final[tuple[Method[Service, Any], ...]] = (
    Method(name="bdev_rbd_register_cluster", params=RegisterCluster, function=register_cluster),
    Method(name="bdev_rbd_unregister_cluster", params=UnregisterCluster, function=unregister_cluster),
    Method(name="bdev_rbd_get_clusters_info", params=GetClustersInfo, function=get_clusters_info),
    Method(name=_METHOD, params=RbdCreate, function=rbd_create),
    Method(name="bdev_rbd_resize", params=Resize, function=rbd_resize),
    delete_method("rbd"),
)
