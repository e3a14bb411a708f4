"""The methods of bdevs that stand on nothing else: malloc (memory), null, aio (a file or another block device).

Metadata and protection information are not offered: a request for them is an error that says so, since a ublk disk could not show
them. What would only make SPDK's bdev faster, and is in its saved files, is passed over with a warning.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec
from msgspec import Meta

from ublk_trio.backends import Backend, Memory, Null, ThreadedFile
from ublk_trio.errors import UsageError
from ublk_trio.rpc import Method
from ublk_trio.service.service import Made, Service

logger = logging.getLogger("ublk_trio.service")

Positive = Annotated[int, Meta(ge=1)]
Blocks = Annotated[int, Meta(ge=0)]
Zero = Annotated[int, Meta(ge=0, le=0)]
_MIB: Final = 1 << 20


class _Sized(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    block_size: Positive
    num_blocks: Positive
    uuid: UUID | None = None
    physical_block_size: Positive | None = None
    #: What SPDK has besides, and only 0 is possible here.
    md_size: Zero = 0
    dif_type: Zero = 0
    dif_pi_format: Zero = 0


class MallocCreate(_Sized, kw_only=True):
    """Parameters of ``bdev_malloc_create``. Without a name it is called Malloc0, Malloc1 and so on."""

    name: str | None = None
    #: Blocks; requests should not cross a multiple of it.
    optimal_io_boundary: Blocks = 0
    md_interleave: bool = False
    dif_is_head_of_md: bool = False
    #: Whose memory; -1 is any.
    numa_id: int = -1


class NullCreate(_Sized, kw_only=True):
    """Parameters of ``bdev_null_create``."""

    name: str
    dif_is_head_of_md: bool = False
    preferred_write_granularity: Blocks = 0
    preferred_write_alignment: Blocks = 0
    optimal_write_size: Blocks = 0
    preferred_unmap_granularity: Blocks = 0
    preferred_unmap_alignment: Blocks = 0


_HINTS: Final = tuple(name for name in NullCreate.__struct_fields__ if name.startswith(("preferred_", "optimal_")))


class Resize(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_null_resize`` and ``bdev_malloc_resize``; MiB."""

    name: str
    new_size: Positive


class AioCreate(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_aio_create``. `fallocate` offers discards and zeroing."""

    name: str
    filename: str
    block_size: Positive | None = None
    readonly: bool = False
    fallocate: bool = False
    uuid: UUID | None = None
    #: Requests wait in threads, whatever it says.
    nowait: bool = False


class Named(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of the methods that take a bdev's name alone."""

    name: str


class _Aio(ThreadedFile):
    """A file whose holes are punched only when that was asked for."""

    def __init__(self, params: AioCreate) -> None:
        super().__init__(params.filename, read_only=params.readonly, block_size=params.block_size)
        self._fallocate = params.fallocate

    async def open(self) -> None:
        await super().open()
        if not self._fallocate:
            self.unsupported |= {"discard", "write_zeroes"}


async def malloc_create(service: Service, params: MallocCreate) -> str:
    """Make a disk of memory."""
    if params.md_interleave or params.dif_is_head_of_md:
        raise UsageError(
            "params.md_interleave and params.dif_is_head_of_md: only false is possible: there is no metadata"
        )
    if params.numa_id != -1:
        _pass_over("bdev_malloc_create", "numa_id")
    backend = Memory(params.num_blocks * params.block_size, block_size=params.block_size)
    _set_physical(backend, params.physical_block_size)
    if params.optimal_io_boundary:
        backend.optimal_io_size = params.optimal_io_boundary * params.block_size
    made = Made(
        method="bdev_malloc_create",
        params=lambda: {**_sized(backend), "optimal_io_boundary": backend.optimal_io_size // backend.block_size},
        specific=dict,
    )
    name = params.name if params.name is not None else service.free_name("Malloc")
    await service.make(made, name, backend, product_name="Malloc disk", uuid=params.uuid)
    return name


async def null_create(service: Service, params: NullCreate) -> str:
    """Make a disk that keeps nothing."""
    if params.dif_is_head_of_md:
        raise UsageError("params.dif_is_head_of_md: only false is possible: there is no metadata")
    for name in _HINTS:
        if getattr(params, name):
            _pass_over("bdev_null_create", name)
    backend = Null(params.num_blocks * params.block_size, block_size=params.block_size)
    _set_physical(backend, params.physical_block_size)
    made = Made(method="bdev_null_create", params=lambda: _sized(backend), specific=dict)
    await service.make(made, params.name, backend, product_name="Null disk", uuid=params.uuid)
    return params.name


async def null_resize(service: Service, params: Resize) -> bool:
    """Give it another size; a disk that is made of it follows."""
    return await _resize(service, params, "bdev_null_create")


async def malloc_resize(service: Service, params: Resize) -> bool:
    """Give it another size; a disk that is made of it follows. What is beyond a smaller one is lost."""
    return await _resize(service, params, "bdev_malloc_create")


async def _resize(service: Service, params: Resize, method: str) -> bool:
    bdev = service.find(params.name, method)
    assert isinstance(bdev.backend, Memory | Null)
    bdev.backend.resize(params.new_size * _MIB)
    await bdev.resized()
    return True


async def aio_create(service: Service, params: AioCreate) -> str:
    """Open a file or a block device."""
    if params.nowait:
        _pass_over("bdev_aio_create", "nowait")
    backend = _Aio(params)
    shown = {"filename": params.filename, "readonly": params.readonly, "fallocate": params.fallocate}
    asked = {} if params.block_size is None else {"block_size": params.block_size}
    made = Made(
        method="bdev_aio_create",
        params=lambda: {**shown, **asked},
        specific=lambda: {"aio": {**shown, "block_size_override": bool(asked)}},
    )
    await service.make(made, params.name, backend, product_name="AIO disk", uuid=params.uuid)
    return params.name


async def aio_rescan(service: Service, params: Named) -> bool:
    """Look for the file's size anew; a disk that is made of it follows."""
    bdev = service.find(params.name, "bdev_aio_create")
    assert isinstance(bdev.backend, ThreadedFile)
    before = bdev.size
    await bdev.backend.rescan()
    if bdev.size != before:
        await bdev.resized()
    return True


def delete_method(kind: str) -> Method[Service, Named]:
    """``bdev_KIND_delete``: remove a bdev that ``bdev_KIND_create`` made; answered when it is gone."""

    async def delete(service: Service, params: Named) -> bool:
        return await service.delete(params.name, f"bdev_{kind}_create")

    return Method(name=f"bdev_{kind}_delete", params=Named, function=delete)


def _pass_over(method: str, name: str) -> None:
    logger.warning("%s: %s is passed over: it changes nothing here", method, name)


def _set_physical(backend: Backend, physical: int | None) -> None:
    if physical is not None:
        backend.physical_block_size = physical


def _sized(backend: Backend) -> dict[str, Any]:
    return {
        "num_blocks": backend.size // backend.block_size,
        "block_size": backend.block_size,
        "physical_block_size": backend.physical_block_size,
    }


PLAIN_METHODS: Final[tuple[Method[Service, Any], ...]] = (
    Method(name="bdev_malloc_create", params=MallocCreate, function=malloc_create),
    Method(name="bdev_malloc_resize", params=Resize, function=malloc_resize),
    delete_method("malloc"),
    Method(name="bdev_null_create", params=NullCreate, function=null_create),
    Method(name="bdev_null_resize", params=Resize, function=null_resize),
    delete_method("null"),
    Method(name="bdev_aio_create", params=AioCreate, function=aio_create),
    Method(name="bdev_aio_rescan", params=Named, function=aio_rescan),
    delete_method("aio"),
)
