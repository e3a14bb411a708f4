"""The methods of bdevs that stand on one other: passthru, delay, error. Each waits for its base, if that is not there.

As in SPDK, what went with its base comes back when a bdev of the base's name is made, as it was created: what was changed since is
forgotten. An error bdev does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, TypeVar
from uuid import UUID

import msgspec
from msgspec import Meta

from ublk_trio.backends import Backend, Delay, ErrorInjection, LatencyKind, Passthru
from ublk_trio.bdev import Descriptor
from ublk_trio.rpc import Method
from ublk_trio.service.expected import Expected
from ublk_trio.service.methods_plain import delete_method
from ublk_trio.service.service import Made, Service, call_of

Microseconds = Annotated[int, Meta(ge=0)]
B = TypeVar("B", bound=Backend)


class PassthruCreate(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_passthru_create``."""

    name: str
    base_bdev_name: str
    uuid: UUID | None = None


class DelayCreate(PassthruCreate, kw_only=True):
    """Parameters of ``bdev_delay_create``; µs."""

    avg_read_latency: Microseconds
    p99_read_latency: Microseconds
    avg_write_latency: Microseconds
    p99_write_latency: Microseconds


class DelayUpdate(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_delay_update_latency``; µs."""

    delay_bdev_name: str
    latency_type: LatencyKind
    latency_us: Microseconds


class ErrorCreate(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_error_create``; the bdev is called EE_ and its base's name."""

    base_name: str
    uuid: UUID | None = None
    #: What a saved configuration says, and nothing else is possible.
    name: str | None = None


class InjectError(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_error_inject_error``."""

    name: str
    io_type: Literal["clear", "read", "write", "unmap", "flush", "write_zeroes", "all"]
    error_type: Literal["failure", "pending", "corrupt_data", "nomem"]
    num: Annotated[int, Meta(ge=0)] = 1
    queue_depth: Annotated[int, Meta(ge=0)] = 0
    corrupt_offset: Annotated[int, Meta(ge=0)] = 0
    corrupt_value: Annotated[int, Meta(ge=1, le=255)] = 255


async def passthru_create(service: Service, params: PassthruCreate) -> str:
    """Make a bdev that hands everything on."""
    await _stack(service, params, params.name, params.base_bdev_name, "passthru", Passthru)
    return params.name


async def delay_create(service: Service, params: DelayCreate) -> str:
    """Make a bdev that answers later than its base."""

    def make(base: Backend) -> Delay:
        return Delay(
            base,
            avg_read_us=params.avg_read_latency,
            p99_read_us=params.p99_read_latency,
            avg_write_us=params.avg_write_latency,
            p99_write_us=params.p99_write_latency,
        )

    await _stack(service, params, params.name, params.base_bdev_name, "delay", make, _latencies)
    return params.name


def _latencies(backend: Delay) -> dict[str, Any]:
    return {f"{kind}_latency": latency for kind, latency in backend.latency_us.items()}


async def delay_update(service: Service, params: DelayUpdate) -> bool:
    """Change one latency, for requests to come."""
    backend = service.find(params.delay_bdev_name, "bdev_delay_create").backend
    assert isinstance(backend, Delay)
    backend.update_latency(params.latency_type, params.latency_us)
    return True


async def error_create(service: Service, params: ErrorCreate) -> bool:
    """Make a bdev that fails when it is told to."""
    name = f"EE_{params.base_name}"
    await _stack(
        service,
        params,
        name,
        params.base_name,
        "error",
        ErrorInjection,
        base_key="base_name",
        kind="error_disk",
        comes_back=False,
    )
    return True


async def error_inject(service: Service, params: InjectError) -> bool:
    """Have the next requests fail, or forget what was injected."""
    backend = service.find(params.name, "bdev_error_create").backend
    assert isinstance(backend, ErrorInjection)
    if params.io_type == "clear":
        backend.clear()
        return True
    backend.inject(
        "discard" if params.io_type == "unmap" else params.io_type,
        params.error_type,
        num=params.num,
        queue_depth=params.queue_depth,
        corrupt_offset=params.corrupt_offset,
        corrupt_value=params.corrupt_value,
    )
    return True


async def _stack(
    service: Service,
    asked: PassthruCreate | ErrorCreate,
    name: str,
    base_name: str,
    product: str,
    make: Callable[[Descriptor], B],
    describe: Callable[[B], dict[str, Any]] = lambda _: {},
    *,
    base_key: str = "base_bdev_name",
    kind: str | None = None,
    comes_back: bool = True,
) -> None:
    """Add a bdev that stands on one other, which it claims."""
    method = f"bdev_{product}_create"

    def expected(*, lost: bool) -> Expected:
        return Expected(call=call_of(method, asked), bases=[base_name], claim=product, make=add, lost=lost)

    async def add() -> None:
        base = service.registry.descriptor(base_name, claim=product)
        backend = make(base)
        made = Made(
            method=method,
            params=lambda: {base_key: base_name, **describe(backend)},
            specific=lambda: {kind or product: {"name": name, "base_bdev_name": base_name, **describe(backend)}},
            when_lost=lambda _: expected(lost=True) if comes_back else None,
        )
        await service.make(made, name, backend, product_name=product, uuid=asked.uuid, bases=[base])

    await service.make_on(name, expected(lost=False))


STACKED_METHODS: Final[tuple[Method[Service, Any], ...]] = (
    Method(name="bdev_passthru_create", params=PassthruCreate, function=passthru_create),
    delete_method("passthru"),
    Method(name="bdev_delay_create", params=DelayCreate, function=delay_create),
    Method(name="bdev_delay_update_latency", params=DelayUpdate, function=delay_update),
    delete_method("delay"),
    Method(name="bdev_error_create", params=ErrorCreate, function=error_create),
    Method(name="bdev_error_inject_error", params=InjectError, function=error_inject),
    delete_method("error"),
)
