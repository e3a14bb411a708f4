"""What stands on bdevs may be asked for before they are there, in any order, and is made as soon as they are; so is what went with them."""

from __future__ import annotations

import errno
import itertools
import logging
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import trio
import trio.testing

from tests.search import broken_invariant
from tests.service.bench import Bench, open_bench, refused
from ublk_trio.backends import Passthru
from ublk_trio.bdev import Bdev, Registry
from ublk_trio.service.expected import Expected
from ublk_trio.service.methods_config import save
from ublk_trio.service.service import Service

NO_LATENCY = {f"{kind}_latency": 0 for kind in ("avg_read", "p99_read", "avg_write", "p99_write")}
MALLOC = {"block_size": 512, "num_blocks": 2048}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "a": ("bdev_malloc_create", {"name": "a", **MALLOC}),
    "b": ("bdev_malloc_create", {"name": "b", **MALLOC}),
    "d": ("bdev_delay_create", {"name": "d", "base_bdev_name": "a", **NO_LATENCY}),
    "EE_b": ("bdev_error_create", {"base_name": "b"}),
    "r": ("bdev_raid_create", {"name": "r", "raid_level": "raid1", "base_bdevs": ["d", "EE_b"]}),
    "p": ("bdev_passthru_create", {"name": "p", "base_bdev_name": "r"}),
}
#: What each of them stands on.
BELOW: dict[str, set[str]] = {"a": set(), "b": set(), "d": {"a"}, "EE_b": {"b"}, "r": {"d", "EE_b"}, "p": {"r"}}


def made_of(asked: set[str]) -> set[str]:
    """What can be made when these were asked for."""
    made: set[str] = set()
    while more := {name for name in asked - made if made >= BELOW[name]}:
        made |= more
    return made


async def run_order(order: tuple[str, ...]) -> None:
    """Ask in that order: after each call there is what can be made, and nothing else; at the end the topmost holds data."""
    async with open_bench() as bench:
        for number, name in enumerate(order, start=1):
            method, params = CALLS[name]
            await bench.call(method, **params)
            asked = set(order[:number])
            assert set(await bench.names()) == made_of(asked), order[:number]
            assert bench.service.expected.keys() == asked - made_of(asked), order[:number]
        disk = await bench.start("p")
        await disk.write(4096, b"expected" * 512)
        assert await disk.read(4096, 4096) == b"expected" * 512


async def test_any_order() -> None:
    """As the module says: each order of five bdevs, after what stands on top of them."""
    for order in itertools.permutations(name for name in CALLS if name != "p"):
        await run_order(("p", *order))


async def configuring(bench: Bench) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await bench.call("bdev_raid_get_bdevs", category="configuring")
    return found


async def test_while_they_are_awaited(caplog: pytest.LogCaptureFixture) -> None:
    """The log says what is awaited; the name is taken, the call is saved, a raid is shown as SPDK shows it, all can be deleted."""
    async with open_bench() as bench:
        await bench.malloc("a")
        with caplog.at_level(logging.WARNING, logger="ublk_trio.service"):
            assert await bench.call("bdev_passthru_create", name="p", base_bdev_name="x") == "p"
            assert await bench.call(CALLS["r"][0], **CALLS["r"][1] | {"base_bdevs": ["a", "y"]}) is True
        assert [record.getMessage() for record in caplog.records] == [
            "bdev p is made as soon as there is x",
            "bdev r is made as soon as there is y",
        ]
        with refused(errno.EEXIST, "waits for x"):
            await bench.malloc("p")
        with refused(errno.EEXIST, "waits for x"):
            await bench.call("bdev_passthru_create", name="p", base_bdev_name="x")
        with refused(errno.ENODEV):
            await bench.start("p")
        (raid,) = await configuring(bench)
        assert (raid["name"], raid["state"], raid["raid_level"]) == ("r", "configuring", "raid1")
        assert [raid[f"num_base_bdevs{of}"] for of in ("", "_discovered", "_operational")] == [2, 1, 2]
        members = [(member["name"], member["is_configured"]) for member in raid["base_bdevs_list"]]
        assert members == [("a", True), ("y", False)]
        assert await bench.call("bdev_raid_get_bdevs", category="all") == [raid]
        assert await bench.call("bdev_raid_get_bdevs", category="online") == []
        assert (await bench.bdev("a"))["claimed_by"] == "raid"
        with refused(errno.EPERM, "claimed by raid"):
            await bench.start("a")
        with refused(errno.EBUSY, "delete r"):
            await bench.call("bdev_raid_remove_base_bdev", name="a")
        saved = save(bench.service)["subsystems"][0]["config"][1:]
        assert [(call["method"], call["params"]["name"]) for call in saved] == [
            ("bdev_passthru_create", "p"),
            ("bdev_raid_create", "r"),
        ]
        assert await bench.call("bdev_raid_delete", name="r") is True
        assert (await bench.bdev("a"))["claimed"] is False
        with refused(errno.ENODEV):
            await bench.call("bdev_malloc_delete", name="p")
        assert await bench.call("bdev_passthru_delete", name="p") is True
        with refused(errno.ENODEV):
            await bench.call("bdev_passthru_delete", name="p")
        await bench.malloc("x", "y")
        assert await bench.names() == ["a", "x", "y"]


async def test_what_cannot_be_made_after_all(caplog: pytest.LogCaptureFixture) -> None:
    """Two want the same base: the first gets it, the other does not, and the log says why; the base's own call is well."""
    async with open_bench() as bench:
        for name in "pq":
            await bench.call("bdev_passthru_create", name=name, base_bdev_name="a")
        with caplog.at_level(logging.WARNING, logger="ublk_trio.service"):
            await bench.malloc("a")
        assert await bench.names() == ["a", "p"]
        assert "bdev q, which was expected, is not made" in caplog.text
        assert "claimed by passthru" in caplog.text
        assert bench.service.expected == {}


async def test_a_free_name_is_none_that_is_awaited() -> None:
    """What is made without a name gets another than one that waits."""
    async with open_bench() as bench:
        await bench.call("bdev_passthru_create", name="Malloc0", base_bdev_name="x")
        assert await bench.call("bdev_malloc_create", **MALLOC) == "Malloc1"


async def test_by_uuid() -> None:
    """A base may be named by its UUID here too."""
    uuid = "0e5b3c40-1d0f-4f7f-9b6a-3a3f8f6b0001"
    async with open_bench() as bench:
        await bench.call("bdev_passthru_create", name="p", base_bdev_name=uuid.upper())
        await bench.call("bdev_malloc_create", name="a", uuid=uuid, **MALLOC)
        assert await bench.names() == ["a", "p"]


async def test_a_raid_claims_each_member_as_it_comes_and_lets_go() -> None:
    """A raid that waits has all members that are there, and no other; one that is claimed already is refused; one that goes is free
    to go, and is waited for again."""
    async with open_bench() as bench:
        await bench.malloc("a", "b")
        await bench.start("b")
        create: dict[str, Any] = {"name": "r", "raid_level": "concat", "base_bdevs": ["a", "b", "x"]}
        for bases in (["a", "b", "x"], ["a", "a", "x"]):
            with refused(errno.EPERM, "claimed by"):
                await bench.call("bdev_raid_create", **create | {"base_bdevs": bases})
            assert (await bench.bdev("a"))["claimed"] is False
            assert await configuring(bench) == []
        await bench.call("bdev_raid_create", **create | {"base_bdevs": ["a", "x", "y"]})
        await bench.malloc("x")
        assert [(await bench.bdev(name))["claimed_by"] for name in "ax"] == ["raid", "raid"]
        (raid,) = await configuring(bench)
        assert [member["uuid"] for member in raid["base_bdevs_list"][:2]] == [
            (await bench.bdev(name))["uuid"] for name in "ax"
        ]
        await bench.call("bdev_malloc_delete", name="a")
        (raid,) = await configuring(bench)
        members = [(member["name"], member["is_configured"]) for member in raid["base_bdevs_list"]]
        assert members == [("a", False), ("x", True), ("y", False)]
        await bench.malloc("y")
        assert await bench.names() == ["b", "x", "y"]
        await bench.malloc("a")
        assert await bench.names() == ["b", "x", "y", "a", "r"]


# What went with its base ------------------------------------------------------------------------------------------------


async def test_what_stood_on_a_removed_bdev_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    """A whole stack goes with its base, and its disk; when the base is made again the stack is, as it was created, and the disk not.
    Meanwhile its names are taken, and nothing of it is saved."""
    uuid = "0e5b3c40-1d0f-4f7f-9b6a-3a3f8f6b0001"
    async with open_bench() as bench:
        await bench.malloc("a")
        await bench.call("bdev_delay_create", name="d", base_bdev_name="a", **NO_LATENCY)
        await bench.call("bdev_passthru_create", name="p", base_bdev_name="d", uuid=uuid)
        await bench.call("bdev_delay_update_latency", delay_bdev_name="d", latency_type="avg_read", latency_us=7)
        for _ in range(2):
            disk = await bench.start("p")
            await disk.write(4096, b"lost" * 1024)
            with caplog.at_level(logging.WARNING, logger="ublk_trio.service"):
                await bench.call("bdev_malloc_delete", name="a")
            assert [record.getMessage() for record in caplog.records] == [
                "bdev p is made again as soon as there is d",
                "bdev d is made again as soon as there is a",
            ]
            caplog.clear()
            assert await bench.names() == []
            assert await bench.call("ublk_get_disks") == []
            with refused(errno.EEXIST, "waits for a"):
                await bench.malloc("d")
            assert save(bench.service)["subsystems"][0]["config"] == []
            await bench.malloc("a")
            assert await bench.names() == ["a", "d", "p"]
            assert (await bench.bdev("p"))["uuid"] == uuid
            assert (await bench.bdev("d"))["driver_specific"]["delay"]["avg_read_latency"] == 0
            assert await bench.call("ublk_get_disks") == []
        disk = await bench.start("p")
        assert await disk.read(4096, 4096) == bytes(4096)


async def test_what_was_deleted_does_not_come_back() -> None:
    """By its own call, before its base went or after."""
    async with open_bench() as bench:
        for first, second in (("passthru", "malloc"), ("malloc", "passthru")):
            await bench.malloc("a")
            await bench.call("bdev_passthru_create", name="p", base_bdev_name="a")
            for kind in (first, second):
                assert await bench.call(f"bdev_{kind}_delete", name={"passthru": "p", "malloc": "a"}[kind]) is True
            assert bench.service.expected == {}
            await bench.malloc("a")
            assert await bench.names() == ["a"]
            await bench.call("bdev_malloc_delete", name="a")


async def test_an_error_bdev_does_not_come_back() -> None:
    """SPDK's forgets its entry when it goes, however that was."""
    async with open_bench() as bench:
        await bench.malloc("a")
        await bench.call("bdev_error_create", base_name="a")
        await bench.call("bdev_malloc_delete", name="a")
        assert bench.service.expected == {}
        await bench.malloc("a")
        assert await bench.names() == ["a"]


async def test_a_base_that_goes_while_what_stands_on_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is expected still."""
    async with open_bench() as bench, trio.open_nursery() as nursery:
        gone = trio.Event()

        async def slow(backend: Passthru) -> None:
            await super(Passthru, backend).open()
            if type(backend) is Passthru:
                nursery.start_soon(delete)
                await trio.testing.wait_all_tasks_blocked()

        async def delete() -> None:
            await bench.call("bdev_malloc_delete", name="a")
            gone.set()

        await bench.call("bdev_passthru_create", name="p", base_bdev_name="a")
        monkeypatch.setattr(Passthru, "open", slow)
        await bench.malloc("a")
        await gone.wait()
        monkeypatch.undo()
        assert await bench.names() == []
        await bench.malloc("a")
        assert await bench.names() == ["a", "p"]


# Planted bugs -----------------------------------------------------------------------------------------------------------


def one_base_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Service.missing
    monkeypatch.setattr(Service, "missing", lambda service, bases: missing(service, list(bases)[:1]))


def it_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    async def planted(service: Service, name: str, expected: Expected) -> None:
        service.expected.pop(name)

    monkeypatch.setattr(Service, "_make_expected", planted)


def it_is_still_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    make = Service._make_expected

    async def planted(service: Service, name: str, expected: Expected) -> None:
        await make(service, name, expected)
        service.expected.setdefault(name, expected)

    monkeypatch.setattr(Service, "_make_expected", planted)


def what_is_lost_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "_lost", lambda service, bdev: None)


def deletion_does_not_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Registry._begin_removal
    monkeypatch.setattr(Registry, "_begin_removal", lambda registry, bdev, *, lost: begin(registry, bdev, lost=True))


def what_is_lost_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Service._lost

    def planted(service: Service, bdev: Bdev) -> None:
        lost(service, bdev)
        service.expected[bdev.name].lost = False

    monkeypatch.setattr(Service, "_lost", planted)


def it_claims_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Expected, "hold", lambda expected, registry: None)


def it_keeps_its_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Expected, "release", lambda expected: None)


Plant: TypeAlias = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize("plant", [one_base_is_enough, it_is_never_made, it_is_still_expected, it_keeps_its_claims])
def test_a_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each breaks the invariant in an order in which the topmost wait, and the second base comes last."""
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        trio.run(run_order, ("p", "r", "d", "EE_b", "a", "b"))


@pytest.mark.parametrize("plant", [what_is_lost_is_forgotten, what_is_lost_is_saved])
async def test_a_planted_bug_of_loss_is_found(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Noticed by what stands on a removed bdev."""
    plant(monkeypatch)
    with broken_invariant():
        await test_what_stood_on_a_removed_bdev_comes_back(caplog)


async def test_a_planted_bug_of_deletion_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noticed by what was deleted."""
    deletion_does_not_forget(monkeypatch)
    with broken_invariant():
        await test_what_was_deleted_does_not_come_back()


@pytest.mark.parametrize("plant", [it_claims_nothing, it_keeps_its_claims])
async def test_a_planted_bug_of_claims_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noticed by a raid that waits."""
    plant(monkeypatch)
    with broken_invariant():
        await test_a_raid_claims_each_member_as_it_comes_and_lets_go()
