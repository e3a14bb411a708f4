"""A small table of methods, one for each way in which a call can go; the wire is tested with it."""

from __future__ import annotations

import errno
import os
from typing import Annotated, Any, Literal

import attrs
import msgspec
import trio

from ublk_trio import UsageError
from ublk_trio.errors import BackendError, KernelUnavailableError, StuckError
from ublk_trio.rpc import ANY_STATE, Method, NoParams, RpcError


@attrs.define
class Service:
    """What the methods work on; it remembers what they did."""

    began: list[str] = attrs.Factory(list)
    ended: list[str] = attrs.Factory(list)
    cancelled: list[str] = attrs.Factory(list)
    hold: trio.Event = attrs.Factory(trio.Event)


class Echo(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    value: Any = None


class Named(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: str = "?"


class Sleep(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    seconds: float
    name: str = "?"


class Fail(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    errno_name: str
    text: str | None = None


class Fill(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    length: int


class Member(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: str
    weight: int = 1


class Typed(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, rename={"from_": "from"}):
    name: str
    num_queues: Annotated[int, msgspec.Meta(ge=1, le=32)] = 1
    level: Literal["raid0", "raid1"] = "raid0"
    base_bdevs: list[str] = []
    read_only: bool = False
    member: Member | None = None
    limits: dict[str, int] = {}
    from_: str = ""


async def echo(service: Service, params: Echo) -> Any:
    """Gives back what came."""
    return params.value


async def note(service: Service, params: Named) -> int:
    """Waits for nothing; returns how many calls there were."""
    service.began.append(params.name)
    service.ended.append(params.name)
    return len(service.ended)


async def sleep(service: Service, params: Sleep) -> str:
    """Takes its time."""
    service.began.append(params.name)
    try:
        await trio.sleep(params.seconds)
    except trio.Cancelled:
        service.cancelled.append(params.name)
        raise
    service.ended.append(params.name)
    return params.name


async def hold(service: Service, params: Named) -> str:
    """Waits until the test lets it go."""
    service.began.append(params.name)
    try:
        await service.hold.wait()
    except trio.Cancelled:
        service.cancelled.append(params.name)
        raise
    service.ended.append(params.name)
    return params.name


async def finish_anyway(service: Service, params: Sleep) -> str:
    """Cannot be cancelled."""
    with trio.CancelScope(shield=True):
        await sleep(service, params)
    return params.name


async def fail(service: Service, params: Fail) -> None:
    """Fails with an errno."""
    number = getattr(errno, params.errno_name)
    raise OSError(number, params.text or os.strerror(number))


async def fail_in_group(service: Service, params: NoParams) -> None:
    """Fails in a nursery."""

    async def refuse() -> None:
        raise BackendError(errno.ENOSPC, "the backend is full")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refuse)


async def fail_for_good(service: Service, params: Named) -> None:
    """Fails in a way that has no errno."""
    match params.name:
        case "usage":
            raise UsageError("depth is 0: give 1 to 4096")
        case "unavailable":
            raise KernelUnavailableError("there is no driver: modprobe ublk_drv")
        case "stuck":
            raise StuckError("device 3 did not stop within 10 s")
        case "lines":
            raise OSError(errno.EIO, "the first line\nthe second\tline " + "x" * 10_000)
        case "own":
            raise RpcError(-errno.EDOM, "chosen")
        case "filename":
            os.rmdir("/nowhere/at/all")
        case _:
            raise ZeroDivisionError("secret")


async def bad_result(service: Service, params: Named) -> Any:
    """Returns what JSON does not have."""
    return {"nan": float("nan"), "object": object(), "surrogate": "\udc80"}[params.name]


async def fill(service: Service, params: Fill) -> str:
    """A result of any length."""
    return "x" * params.length


async def typed(service: Service, params: Typed) -> Typed:
    """Gives its parameters back."""
    return params


FAKE_METHODS: tuple[Method[Service, Any], ...] = (
    Method(name="echo", params=Echo, function=echo, aliases=("construct_echo",), states=ANY_STATE),
    Method(name="note", params=Named, function=note),
    Method(name="sleep", params=Sleep, function=sleep),
    Method(name="hold", params=Named, function=hold),
    Method(name="watch", params=Named, function=hold, ends_with_client=True),
    Method(name="finish_anyway", params=Sleep, function=finish_anyway),
    Method(name="fail", params=Fail, function=fail),
    Method(name="fail_in_group", params=NoParams, function=fail_in_group),
    Method(name="fail_for_good", params=Named, function=fail_for_good),
    Method(name="bad_result", params=Named, function=bad_result),
    Method(name="fill", params=Fill, function=fill),
    Method(name="typed", params=Typed, function=typed),
)
