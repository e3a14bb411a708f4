"""The methods of bdevs that stand on several others: raid0, raid1, concat.

There is no superblock: a raid is what `bdev_raid_create` made, and a saved configuration holds that call. A raid whose members are not
all there waits for them; it is "configuring" until then, and has claimed those that are there. A mirror whose member's bdev goes does not go
with it: the member leaves, and the mirror goes on, as long as one that is in sync is left. Its place stays, and is saved under SPDK's name
for it. Any other raid is "offline" then: a new bdev has not the old one's bytes, so nothing brings the raid back. It keeps the other
members until it is deleted, or they have gone too.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import msgspec
import trio
from msgspec import Meta

from ublk_trio.backends import Concat, MemberState, Raid0, Raid1
from ublk_trio.backends.stacked import Stacked
from ublk_trio.bdev import Bdev, Descriptor
from ublk_trio.errors import BackendError, StuckError, UsageError
from ublk_trio.rpc import Method
from ublk_trio.service.expected import Expected
from ublk_trio.service.service import Call, Made, Service, call_of

logger = logging.getLogger("ublk_trio.service")

#: Who has the bdevs of members.
_CLAIM: Final = "raid"
_METHOD: Final = "bdev_raid_create"
#: As they are shown, by what may be asked for.
_LEVELS: Final = {"raid0": "raid0", "0": "raid0", "raid1": "raid1", "1": "raid1", "concat": "concat"}
_NO_UUID: Final = str(UUID(int=0))
#: What SPDK writes for a place of a raid that is empty.
_EMPTY_PLACE: Final = re.compile(r"removed_base_bdev_[0-9]+")


class RaidCreate(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_raid_create``; KiB. A mirror has no strips; those of a concatenation do nothing.

    Of a mirror, a base bdev ``removed_base_bdev_N`` is a place that is empty.
    """

    name: str
    raid_level: Literal["raid0", "0", "raid1", "1", "concat"]
    base_bdevs: Annotated[list[str], Meta(min_length=1)]
    strip_size_kb: Annotated[int, Meta(ge=0)] = 0
    uuid: UUID | None = None
    superblock: bool = False


class RaidDelete(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_raid_delete``. There is no superblock to be cleared."""

    name: str
    clear_sb: bool = False


class RaidGetBdevs(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_raid_get_bdevs``."""

    category: Literal["all", "online", "configuring", "offline"]


class RaidAddBase(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_raid_add_base_bdev``."""

    raid_bdev: str
    base_bdev: str


class RaidRemoveBase(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Parameters of ``bdev_raid_remove_base_bdev``: the name of a member."""

    name: str


class _Mirror(Raid1):
    """A mirror whose members have places, which stay empty when a member leaves."""

    def __init__(self, places: Sequence[Descriptor | None]) -> None:
        super().__init__([member for member in places if member is not None])
        self.places: list[Descriptor | None] = list(places)
        #: Removes the mirror's bdev.
        self.give_up: Callable[[], None] = lambda: None

    def states(self) -> dict[str, MemberState]:
        """Each member's state, by the name of its bdev."""
        return {member.backend: member.state for member in self.status().members}

    def member(self, name: str) -> Descriptor | None:
        """The member on that bdev."""
        return next((place for place in self.places if place is not None and place.bdev.name == name), None)

    def is_last(self, member: Descriptor) -> bool:
        """Whether no other member is in sync."""
        in_sync = [name for name, state in self.states().items() if state is MemberState.IN_SYNC]
        return in_sync == [member.bdev.name]

    def place(self, member: Descriptor) -> None:
        """Give it the first place that is empty, or a new one."""
        if None in self.places:
            self.places[self.places.index(None)] = member
        else:
            self.places.append(member)

    async def dismiss(self, member: Descriptor) -> None:
        """`remove`, and leave the place empty."""
        await self.remove(member)
        self.places = [None if place is member else place for place in self.places]


async def raid_create(service: Service, params: RaidCreate) -> bool:
    """Make a bdev of others, which it claims; if they are not all there, as soon as they are."""
    if params.superblock:
        raise UsageError("params.superblock: only false is possible: a raid is remembered by the configuration")
    _check_strips(params)
    if not any(_places(params)):
        raise UsageError("params.base_bdevs: all places are empty: name a bdev whose data the mirror has")

    await service.make_on(params.name, _expected(service, params))
    return True


def _offline(service: Service, params: RaidCreate, bdev: Bdev) -> Expected:
    return _expected(service, msgspec.structs.replace(params, uuid=bdev.uuid), offline=True)


def _expected(service: Service, params: RaidCreate, *, offline: bool = False) -> Expected:
    async def make() -> None:
        await _make(service, params)

    members = [name for name in _places(params) if name is not None]
    call = call_of(_METHOD, params)
    return Expected(call=call, bases=members, claim=_CLAIM, make=make, lost=offline, offline=offline)


def _check_strips(params: RaidCreate) -> None:
    match params.raid_level:
        case "raid0" | "0" if not params.strip_size_kb:
            raise UsageError("params.strip_size_kb: raid0 needs one, for example 64")
        case "raid0" | "0" if params.strip_size_kb.bit_count() != 1:
            raise UsageError(f"params.strip_size_kb: {params.strip_size_kb} is no power of two: use for example 64")
        case "raid1" | "1" if params.strip_size_kb:
            raise UsageError("params.strip_size_kb: raid1 has no strips: leave it out")


def _places(params: RaidCreate) -> list[str | None]:
    """The names of the members; None where a place is empty."""
    if params.raid_level not in ("raid1", "1"):
        return list(params.base_bdevs)
    return [None if _EMPTY_PLACE.fullmatch(name) else name for name in params.base_bdevs]


async def _make(service: Service, params: RaidCreate) -> None:
    places = [None if name is None else service.registry.descriptor(name, claim=_CLAIM) for name in _places(params)]
    members = [place for place in places if place is not None]
    backend = _build(params, places)
    made = Made(
        method=_METHOD,
        params=lambda: _parameters(params, backend),
        specific=lambda: {"raid": _describe(service.registry.get(params.name))},
        afterwards=lambda: _rebuilds(params.name, backend),
        when_lost=lambda bdev: None if isinstance(backend, _Mirror) else _offline(service, params, bdev),
    )
    bdev = await service.make(made, params.name, backend, product_name="Raid Volume", uuid=params.uuid, bases=members)
    if isinstance(backend, _Mirror):
        backend.give_up = members[0].on_removed
        for member in members:
            _look_after(service, bdev, backend, member)


def _build(params: RaidCreate, places: Sequence[Descriptor | None]) -> Stacked:
    members = [member for member in places if member is not None]
    match params.raid_level:
        case "raid0" | "0":
            return Raid0(members, params.strip_size_kb << 10)
        case "raid1" | "1":
            return _Mirror(places)
    return Concat(members)


async def raid_delete(service: Service, params: RaidDelete) -> bool:
    """Remove it; answered when it is gone."""
    return await service.delete(params.name, _METHOD)


async def raid_get_bdevs(service: Service, params: RaidGetBdevs) -> list[dict[str, Any]]:
    """The raids."""
    raids = [{"name": bdev.name, **_describe(bdev)} for bdev in _raids(service)]
    raids += [{"name": name, **_describe_expected(expected)} for name, expected in _expected_raids(service)]
    return [raid for raid in raids if params.category in ("all", raid["state"])]


async def raid_add_base(service: Service, params: RaidAddBase) -> bool:
    """Make a bdev a member of a mirror; answered when the copying has begun. Also for a member that failed."""
    bdev = service.find(params.raid_bdev, _METHOD)
    mirror = bdev.backend
    if not isinstance(mirror, _Mirror):
        raise BackendError(errno.EINVAL, f"bdev {bdev.name} is no mirror: only to raid1 a member can be added")
    base = service.registry.get(params.base_bdev)
    member = mirror.member(base.name)
    if member is None:
        member = service.registry.descriptor(base.name, claim=_CLAIM)
        _look_after(service, bdev, mirror, member)
        await mirror.join(member)
        mirror.place(member)
    elif mirror.states().get(base.name) is not MemberState.FAILED:
        raise BackendError(errno.EEXIST, f"bdev {base.name} is a member of {bdev.name} already")
    await service.tasks.start(_rebuild, mirror, member, name=f"rebuild of {base.name} in {bdev.name}")
    return True


async def raid_remove_base(service: Service, params: RaidRemoveBase) -> bool:
    """Take a member out of its mirror; answered when it is free."""
    base = service.registry.get(params.name)
    for bdev in _raids(service):
        if base not in (member and member.bdev for member in _members(bdev)):
            continue
        mirror = bdev.backend
        member = mirror.member(base.name) if isinstance(mirror, _Mirror) else None
        if not isinstance(mirror, _Mirror) or member is None:
            raise BackendError(errno.EBUSY, f"{bdev.name} cannot be without {base.name}: delete {bdev.name} instead")
        if mirror.is_last(member):
            raise BackendError(
                errno.EBUSY, f"{base.name} is the last of {bdev.name} in sync: delete {bdev.name} instead"
            )
        await mirror.dismiss(member)
        return True
    for name, expected in _expected_raids(service):
        if any(member is not None and member.bdev is base for member in expected.held):
            raise BackendError(errno.EBUSY, f"{name} keeps {base.name} while it is not online: delete {name} instead")
    raise BackendError(errno.ENODEV, f"bdev {base.name} is no member of a raid")


def _look_after(service: Service, bdev: Bdev, mirror: _Mirror, member: Descriptor) -> None:
    """Let the member leave when its bdev goes, and not the mirror."""

    async def leave() -> None:
        if bdev.removing:
            return
        if mirror.is_last(member):
            mirror.give_up()
            return
        logger.warning("bdev %s goes on without %s, which is being removed", bdev.name, member.bdev.name)
        while True:
            try:
                with suppress(UsageError):  # a call removes it already
                    await mirror.dismiss(member)
                return
            except StuckError as error:
                # The bdev is not gone before.
                logger.warning("%s", error)

    def begin() -> None:
        if not bdev.removing:
            service.tasks.start_soon(leave, name=f"end of {member.bdev.name} in {bdev.name}")

    member.on_removed = begin
    member.on_resized = bdev.resized


async def _rebuild(mirror: _Mirror, member: Descriptor, *, task_status: trio.TaskStatus[None]) -> None:
    # Whoever waits goes on at the next checkpoint: by then the member is being rebuilt.
    task_status.started()
    try:
        await mirror.rebuild(member)
    except (OSError, UsageError) as error:
        # It failed, or somebody removed it or the mirror. One that failed stays in its place until it is removed.
        logger.warning("%s", error)


def _raids(service: Service) -> list[Bdev]:
    return [bdev for bdev in service.registry if service.made(bdev).method == _METHOD]


def _expected_raids(service: Service) -> list[tuple[str, Expected]]:
    return [(name, expected) for name, expected in service.expected.items() if expected.call.method == _METHOD]


def _members(bdev: Bdev) -> list[Descriptor | None]:
    """Of a raid, by place."""
    backend = bdev.backend
    if isinstance(backend, _Mirror):
        return backend.places
    assert isinstance(backend, Stacked)
    members: list[Descriptor | None] = []
    for base in backend.bases:
        assert isinstance(base.backend, Descriptor)
        members.append(base.backend)
    return members


def _parameters(params: RaidCreate, backend: Stacked) -> dict[str, Any]:
    """What makes it again: of a mirror, from the members in sync, each in its place."""
    again: dict[str, Any] = {"raid_level": _level(backend), "base_bdevs": params.base_bdevs}
    if isinstance(backend, _Mirror):
        states = backend.states()
        names = [None if place is None else place.bdev.name for place in backend.places]
        again["base_bdevs"] = [
            name if name is not None and states.get(name) is MemberState.IN_SYNC else f"removed_base_bdev_{number}"
            for number, name in enumerate(names)
        ]
    if params.strip_size_kb:
        again["strip_size_kb"] = params.strip_size_kb
    return again


def _rebuilds(name: str, backend: Stacked) -> list[Call]:
    """Members that were being rebuilt are rebuilt again."""
    if not isinstance(backend, _Mirror):
        return []
    rebuilding = [member for member, state in backend.states().items() if state is MemberState.REBUILDING]
    return [
        Call(method="bdev_raid_add_base_bdev", params={"raid_bdev": name, "base_bdev": each}) for each in rebuilding
    ]


def _describe_expected(expected: Expected) -> dict[str, Any]:
    params = expected.call.params
    names = params["base_bdevs"]
    held = dict(zip(expected.bases, expected.held, strict=True))
    discovered = sum(member is not None for member in held.values())
    places = [
        # An offline raid waits for nobody by name.
        _describe_member(held.get(name), {}, absent=None if expected.offline else name)
        for name in names
    ]
    return {
        "uuid": params.get("uuid", _NO_UUID),
        "strip_size_kb": params.get("strip_size_kb", 0),
        "state": "offline" if expected.offline else "configuring",
        "raid_level": _LEVELS[params["raid_level"]],
        "superblock": False,
        "num_base_bdevs": len(names),
        "num_base_bdevs_discovered": discovered,
        "num_base_bdevs_operational": discovered if expected.offline else len(names),
        "base_bdevs_list": places,
    }


def _level(backend: Stacked) -> str:
    match backend:
        case Raid0():
            return "raid0"
        case Raid1():
            return "raid1"
    return "concat"


def _describe(bdev: Bdev) -> dict[str, Any]:
    backend = bdev.backend
    assert isinstance(backend, Stacked)
    states = backend.states() if isinstance(backend, _Mirror) else {}
    places = [_describe_member(member, states) for member in _members(bdev)]
    working = sum(place["is_configured"] for place in places)
    return {
        "uuid": str(bdev.uuid),
        "strip_size_kb": backend.strip_size >> 10 if isinstance(backend, Raid0) else 0,
        "state": "online",
        "raid_level": _level(backend),
        "superblock": False,
        "num_base_bdevs": len(places),
        "num_base_bdevs_discovered": working,
        "num_base_bdevs_operational": working,
        **_process(bdev),
        "base_bdevs_list": places,
    }


def _describe_member(
    member: Descriptor | None, states: dict[str, MemberState], absent: str | None = None
) -> dict[str, Any]:
    if member is None:
        return {"name": absent, "uuid": _NO_UUID, "is_configured": False, "data_offset": 0, "data_size": 0}
    bdev = member.bdev
    return {
        "name": bdev.name,
        "uuid": str(bdev.uuid),
        "is_configured": states.get(bdev.name) is not MemberState.FAILED,
        "data_offset": 0,
        "data_size": bdev.size // bdev.block_size,
    }


def _process(bdev: Bdev) -> dict[str, Any]:
    """The first rebuild that is running."""
    if not isinstance(bdev.backend, _Mirror):
        return {}
    for member in bdev.backend.status().members:
        if member.done_bytes is not None:
            progress = {
                "blocks": member.done_bytes // bdev.block_size,
                "percent": member.done_bytes * 100 // bdev.size,
            }
            return {"process": {"type": "rebuild", "target": member.backend, "progress": progress}}
    return {}


RAID_METHODS: Final[tuple[Method[Service, Any], ...]] = (
    Method(name="bdev_raid_create", params=RaidCreate, function=raid_create),
    Method(name="bdev_raid_delete", params=RaidDelete, function=raid_delete),
    Method(name="bdev_raid_get_bdevs", params=RaidGetBdevs, function=raid_get_bdevs),
    Method(name="bdev_raid_add_base_bdev", params=RaidAddBase, function=raid_add_base),
    Method(name="bdev_raid_remove_base_bdev", params=RaidRemoveBase, function=raid_remove_base),
)
