"""Raids answer as SPDK's, and a mirror outlives its members while its disk is in use."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Any

import pytest
import trio.testing

from tests.search import broken_invariant
from tests.service.bench import BLOCKS, INVALID, Bench, open_bench, refused
from ublk_trio.backends import Memory
from ublk_trio.service.expected import Expected
from ublk_trio.service.methods_config import save
from ublk_trio.service.service import Service

DATA = bytes(range(256)) * 16


async def raid(bench: Bench, name: str = "r") -> dict[str, Any]:
    (found,) = [each for each in await bench.call("bdev_raid_get_bdevs", category="all") if each["name"] == name]
    described = (await bench.bdev(name))["driver_specific"]["raid"]
    assert {"name": name, **described} == found
    return described  # type: ignore[no-any-return]


def members(described: dict[str, Any]) -> list[tuple[str | None, bool]]:
    return [(member["name"], member["is_configured"]) for member in described["base_bdevs_list"]]


@pytest.mark.parametrize(
    ("level", "asked", "strip", "blocks"),
    [("raid0", "raid0", 64, 2 * BLOCKS), ("raid0", "0", 4, 2 * BLOCKS), ("raid1", "raid1", 0, BLOCKS),
     ("raid1", "1", 0, BLOCKS), ("concat", "concat", 0, 2 * BLOCKS)],
)  # fmt: skip
async def test_levels(level: str, asked: str, strip: int, blocks: int) -> None:
    """Each level is made, described in SPDK's form, served, saved, and deleted; its members are claimed meanwhile."""
    async with open_bench() as bench:
        await bench.malloc("a", "b")
        params = {"strip_size_kb": strip} if strip else {}
        assert await bench.call("bdev_raid_create", name="r", raid_level=asked, base_bdevs=["a", "b"], **params) is True
        described = await raid(bench)
        assert (described["raid_level"], described["strip_size_kb"], described["state"]) == (level, strip, "online")
        assert [described[f"num_base_bdevs{of}"] for of in ("", "_discovered", "_operational")] == [2, 2, 2]
        assert members(described) == [("a", True), ("b", True)]
        shown = await bench.bdev("r")
        assert (shown["product_name"], shown["num_blocks"]) == ("Raid Volume", blocks)
        assert (await bench.bdev("a"))["claimed_by"] == "raid"
        disk = await bench.start("r")
        await disk.write(4096, DATA)
        assert await disk.read(4096, len(DATA)) == DATA
        last = save(bench.service)["subsystems"][0]["config"][-1]
        assert last["params"] == {
            "name": "r", "raid_level": level, "base_bdevs": ["a", "b"], **params, "uuid": shown["uuid"]
        }  # fmt: skip
        assert await bench.call("bdev_raid_delete", name="r") is True
        assert await bench.names() == ["a", "b"]
        assert (await bench.bdev("a"))["claimed"] is False


async def test_refusals() -> None:
    """What cannot be is refused with its reason, and leaves nothing claimed."""
    async with open_bench() as bench:
        await bench.malloc("a", "b")
        create: dict[str, Any] = {"name": "r", "raid_level": "raid1", "base_bdevs": ["a", "b"]}
        changes: list[tuple[dict[str, Any], int, str]] = [
            ({"raid_level": "raid5f"}, INVALID, "raid_level"),
            ({"raid_level": "raid0"}, INVALID, "strip_size_kb"),
            ({"raid_level": "raid0", "strip_size_kb": 3}, INVALID, "power of two"),
            ({"strip_size_kb": 64}, INVALID, "no strips"),
            ({"superblock": True}, INVALID, "superblock"),
            ({"base_bdevs": []}, INVALID, "base_bdevs"),
            ({"base_bdevs": ["removed_base_bdev_0"]}, INVALID, "all places are empty"),
            ({"base_bdevs": ["a", "a"]}, errno.EPERM, "claimed"),
            ({"name": "a"}, errno.EEXIST, "already"),
        ]
        for change, code, says in changes:
            with refused(code, says):
                await bench.call("bdev_raid_create", **create | change)
            assert [(await bench.bdev(name))["claimed"] for name in "ab"] == [False, False]
        with refused(errno.ENODEV, "made by bdev_malloc_create"):
            await bench.call("bdev_raid_delete", name="a")
        with refused(errno.EEXIST, "already"):
            await bench.call("bdev_raid_create", **create | {"name": "a", "base_bdevs": ["x"]})
        with refused(errno.ENODEV, "no member"):
            await bench.call("bdev_raid_remove_base_bdev", name="a")
        await bench.call("bdev_raid_create", name="c", raid_level="concat", base_bdevs=["a"])
        with refused(errno.EINVAL, "no mirror"):
            await bench.call("bdev_raid_add_base_bdev", raid_bdev="c", base_bdev="b")
        with refused(errno.EBUSY, "delete c"):
            await bench.call("bdev_raid_remove_base_bdev", name="a")
        assert await bench.call("bdev_raid_get_bdevs", category="offline") == []


async def test_a_stripe_goes_with_its_member() -> None:
    """A raid without redundancy goes when one member does, and its disk with it."""
    async with open_bench() as bench:
        await bench.malloc("a", "b")
        await bench.call("bdev_raid_create", name="r", raid_level="raid0", base_bdevs=["a", "b"], strip_size_kb=4)
        await bench.start("r")
        await bench.call("bdev_malloc_delete", name="b")
        assert await bench.names() == ["a"]
        assert await bench.call("ublk_get_disks") == []


@pytest.mark.parametrize("level", ["raid0", "concat"])
async def test_offline(level: str, caplog: pytest.LogCaptureFixture) -> None:
    """A raid without redundancy that lost a member keeps the others and its name, is not saved, and is not brought back by a new bdev
    of that name, until it is deleted."""
    params: dict[str, Any] = {"name": "r", "raid_level": level, "base_bdevs": ["a", "b"]}
    params |= {"strip_size_kb": 4} if level == "raid0" else {}
    async with open_bench() as bench:
        await bench.malloc("a", "b")
        await bench.call("bdev_raid_create", **params)
        uuid = (await bench.bdev("r"))["uuid"]
        with caplog.at_level(logging.WARNING, logger="ublk_trio.service"):
            await bench.call("bdev_malloc_delete", name="b")
        assert caplog.messages == ["bdev r is offline without b: it keeps the others until it is deleted"]
        (described,) = await bench.call("bdev_raid_get_bdevs", category="offline")
        assert (described["name"], described["uuid"], described["raid_level"]) == ("r", uuid, level)
        assert described["state"] == "offline"
        assert [described[f"num_base_bdevs{of}"] for of in ("", "_discovered", "_operational")] == [2, 1, 1]
        assert members(described) == [("a", True), (None, False)]
        assert await bench.call("bdev_raid_get_bdevs", category="all") == [described]
        assert (await bench.bdev("a"))["claimed_by"] == "raid"
        with refused(errno.EBUSY, "delete r"):
            await bench.call("bdev_raid_remove_base_bdev", name="a")
        await bench.malloc("b")
        assert await bench.names() == ["a", "b"]
        assert (await bench.bdev("b"))["claimed"] is False
        with refused(errno.EEXIST, "offline"):
            await bench.call("bdev_raid_create", **params)
        assert all("raid" not in call["method"] for call in save(bench.service)["subsystems"][0]["config"])
        await bench.call("bdev_passthru_create", name="p", base_bdev_name="r")
        assert await bench.call("bdev_raid_delete", name="r") is True
        assert (await bench.bdev("a"))["claimed"] is False
        await bench.call("bdev_raid_create", **params)
        assert await bench.names() == ["a", "b", "r", "p"]


async def test_an_offline_raid_goes_with_its_last_member() -> None:
    """Then its name is free; a raid of one member is never offline."""
    async with open_bench() as bench:
        for bases in (["a"], ["a", "b"]):
            await bench.malloc(*bases)
            await bench.call("bdev_raid_create", name="r", raid_level="concat", base_bdevs=bases)
            for base in bases:
                await bench.call("bdev_malloc_delete", name=base)
            assert await bench.call("bdev_raid_get_bdevs", category="all") == []
        await bench.malloc("r")


async def test_a_mirror_outlives_its_members(caplog: pytest.LogCaptureFixture) -> None:
    """A member goes, by call or with its bdev, another is rebuilt, and the disk has its bytes; the last one takes all along."""
    async with open_bench() as bench:
        await bench.malloc("a", "b", "c")
        await bench.call("bdev_raid_create", name="r", raid_level="raid1", base_bdevs=["a", "b"])
        disk = await bench.start("r")
        await disk.write(4096, DATA)
        with caplog.at_level(logging.WARNING):
            await bench.call("bdev_malloc_delete", name="a")
        assert "r goes on without a" in caplog.text
        assert members(await raid(bench)) == [(None, False), ("b", True)]
        assert (await raid(bench))["num_base_bdevs_operational"] == 1
        with refused(errno.EBUSY, "last"):
            await bench.call("bdev_raid_remove_base_bdev", name="b")
        assert await bench.call("bdev_raid_add_base_bdev", raid_bdev="r", base_bdev="c") is True
        with refused(errno.EEXIST):
            await bench.call("bdev_raid_add_base_bdev", raid_bdev="r", base_bdev="c")
        await trio.testing.wait_all_tasks_blocked()
        assert "process" not in await raid(bench)
        assert members(await raid(bench)) == [("c", True), ("b", True)]
        assert await bench.call("bdev_raid_remove_base_bdev", name="b") is True
        assert (await bench.bdev("b"))["claimed"] is False
        assert await disk.read(4096, len(DATA)) == DATA
        await bench.call("bdev_malloc_delete", name="c")
        assert await bench.names() == ["b"]
        assert await bench.call("ublk_get_disks") == []


async def test_a_rebuild_is_shown_saved_and_ended() -> None:
    """While it runs it has a progress; a saved configuration begins it again, after its bdev; it ends with the service."""
    async with open_bench() as bench:
        await bench.malloc("a")
        await bench.call("bdev_raid_create", name="r", raid_level="raid1", base_bdevs=["a"])
        await bench.malloc("b", blocks=BLOCKS // 2)
        with refused(INVALID, "bytes"):
            await bench.call("bdev_raid_add_base_bdev", raid_bdev="r", base_bdev="b")
        assert (await bench.bdev("b"))["claimed"] is False
        await bench.malloc("m")
        times = {f"{kind}_latency": 10**9 for kind in ("avg_read", "p99_read", "avg_write", "p99_write")}
        await bench.call("bdev_delay_create", name="slow", base_bdev_name="m", **times)
        await bench.call("bdev_raid_add_base_bdev", raid_bdev="r", base_bdev="slow")
        await trio.testing.wait_all_tasks_blocked()
        described = await raid(bench)
        assert described["process"] == {"type": "rebuild", "target": "slow", "progress": {"blocks": 0, "percent": 0}}
        assert members(described) == [("a", True), ("slow", True)]
        calls = save(bench.service)["subsystems"][0]["config"]
        assert [call["method"].removeprefix("bdev_") for call in calls] == [
            "malloc_create", "malloc_create", "delay_create", "raid_create", "malloc_create", "raid_add_base_bdev"
        ]  # fmt: skip
        assert calls[3]["params"]["base_bdevs"] == ["a", "removed_base_bdev_1"]


async def test_a_saved_mirror_is_made_again() -> None:
    """A member that joined late stands before its mirror, and what is loaded saves as the same."""
    async with open_bench() as bench:
        await bench.malloc("a")
        await bench.call("bdev_raid_create", name="r", raid_level="raid1", base_bdevs=["a"])
        await bench.malloc("b")
        await bench.call("bdev_raid_add_base_bdev", raid_bdev="r", base_bdev="b")
        await trio.testing.wait_all_tasks_blocked()
        assert "process" not in await raid(bench)
        saved = save(bench.service)["subsystems"][0]["config"]
    async with open_bench() as again:
        for call in saved:
            await again.call(call["method"], **call["params"])
        assert save(again.service)["subsystems"][0]["config"] == saved


async def test_a_mirror_follows_each_member_s_size() -> None:
    """Also one's that joined late; the smallest counts."""
    async with open_bench() as bench:
        await bench.malloc("a", "b")
        await bench.call("bdev_raid_create", name="r", raid_level="raid1", base_bdevs=["a"])
        await bench.call("bdev_raid_add_base_bdev", raid_bdev="r", base_bdev="b")
        await trio.testing.wait_all_tasks_blocked()
        for member, blocks in (("a", BLOCKS), ("b", 2 * BLOCKS)):
            await bench.call("bdev_malloc_resize", name=member, new_size=2)
            assert (await bench.bdev("r"))["num_blocks"] == blocks


async def test_the_places_of_a_degraded_mirror_are_saved() -> None:
    """What lacks a member, or has one that failed or is being rebuilt, has as many places when it is made again, and saves as
    the same; a bdev that is added takes the first that is empty."""
    async with open_bench() as bench:
        await bench.malloc("a", "b", "c", "d")
        times = {f"{kind}_latency": 10**9 for kind in ("avg_read", "p99_read", "avg_write", "p99_write")}
        await bench.call("bdev_delay_create", name="slow", base_bdev_name="d", **times)
        await bench.call("bdev_error_create", base_name="b")
        await bench.call("bdev_raid_create", name="r", raid_level="raid1", base_bdevs=["a", "EE_b", "c"])
        disk = await bench.start("r")
        await bench.call("bdev_error_inject_error", name="EE_b", io_type="write", error_type="failure")
        await disk.write(4096, DATA)
        await bench.call("bdev_raid_remove_base_bdev", name="a")
        assert members(await raid(bench)) == [(None, False), ("EE_b", False), ("c", True)]
        await bench.call("bdev_raid_add_base_bdev", raid_bdev="r", base_bdev="slow")
        saved = save(bench.service)["subsystems"][0]["config"]
    created = next(call["params"] for call in saved if call["method"] == "bdev_raid_create")
    assert created["base_bdevs"] == ["removed_base_bdev_0", "removed_base_bdev_1", "c"]
    async with open_bench() as again:
        for call in saved:
            await again.call(call["method"], **call["params"])
        described = await raid(again)
        assert [described[f"num_base_bdevs{of}"] for of in ("", "_operational")] == [3, 2]
        assert members(described) == [("slow", True), (None, False), ("c", True)]
        assert save(again.service)["subsystems"][0]["config"] == saved


@pytest.mark.parametrize("how", ["removed", "deleted"])
async def test_a_member_that_hangs_holds_up_nobody(how: str, autojump_clock: trio.testing.MockClock) -> None:
    """Removed by call, or with its bdev, it is gone after a bounded time; the write that waited for it is answered."""
    async with open_bench() as bench, trio.open_nursery() as nursery:
        await bench.malloc("a", "b")
        await bench.call("bdev_error_create", base_name="b")
        await bench.call("bdev_raid_create", name="r", raid_level="raid1", base_bdevs=["a", "EE_b"])
        disk = await bench.start("r")
        await bench.call("bdev_error_inject_error", name="EE_b", io_type="write", error_type="pending", num=1)
        nursery.start_soon(disk.write, 4096, DATA)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(60):
            if how == "removed":
                assert await bench.call("bdev_raid_remove_base_bdev", name="EE_b") is True
                assert (await bench.bdev("EE_b"))["claimed"] is False
            else:
                assert await bench.call("bdev_error_delete", name="EE_b") is True
                assert await bench.names() == ["a", "b", "r"]
            assert await disk.read(4096, len(DATA)) == DATA
        assert members(await raid(bench)) == [("a", True), (None, False)]


async def test_a_member_that_fails_can_come_back() -> None:
    """What it failed, the others did; it shows as out until it is added again."""
    async with open_bench() as bench:
        await bench.malloc("a", "b")
        await bench.call("bdev_error_create", base_name="b")
        await bench.call("bdev_raid_create", name="r", raid_level="raid1", base_bdevs=["a", "EE_b"])
        disk = await bench.start("r")
        await bench.call("bdev_error_inject_error", name="EE_b", io_type="write", error_type="failure")
        await disk.write(4096, DATA)
        assert members(await raid(bench)) == [("a", True), ("EE_b", False)]
        await bench.call("bdev_raid_add_base_bdev", raid_bdev="r", base_bdev="EE_b")
        await trio.testing.wait_all_tasks_blocked()
        assert members(await raid(bench)) == [("a", True), ("EE_b", True)]
        memory = bench.service.registry.get("b").backend
        assert isinstance(memory, Memory)
        copy = bytearray(len(DATA))
        memory.read(4096, memoryview(copy))
        assert copy == DATA


# Planted bugs -----------------------------------------------------------------------------------------------------------


def an_offline_raid_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def planted(service: Service, name: str) -> None:
        expected = service.expected[name]
        if not service.missing(expected.bases):
            await service._make_expected(name, expected)

    monkeypatch.setattr(Service, "_look_after", planted)


def an_offline_raid_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Expected, "hold", lambda expected, registry: None)


@pytest.mark.parametrize("plant", [an_offline_raid_is_made_again, an_offline_raid_holds_nothing])
async def test_a_planted_bug_of_offline_raids_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that would serve bytes that are not its own, and one whose members anybody may write."""
    plant(monkeypatch)
    with broken_invariant():
        await test_offline("concat", caplog)
