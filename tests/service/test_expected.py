"""What stands on bdevs may be asked for before they are there, in any order, and is then made as soon as they are."""

from __future__ import annotations

import errno
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import trio

from tests.service.bench import Bench, open_bench, refused
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
        assert (await bench.bdev("a"))["claimed"] is False
        saved = save(bench.service)["subsystems"][0]["config"][1:]
        assert [(call["method"], call["params"]["name"]) for call in saved] == [
            ("bdev_passthru_create", "p"),
            ("bdev_raid_create", "r"),
        ]
        assert await bench.call("bdev_raid_delete", name="r") is True
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


async def test_by_uuid() -> None:
    """A base may be named by its UUID here too."""
    uuid = "0e5b3c40-1d0f-4f7f-9b6a-3a3f8f6b0001"
    async with open_bench() as bench:
        await bench.call("bdev_passthru_create", name="p", base_bdev_name=uuid.upper())
        await bench.call("bdev_malloc_create", name="a", uuid=uuid, **MALLOC)
        assert await bench.names() == ["a", "p"]


# Planted bugs -----------------------------------------------------------------------------------------------------------


def one_base_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Service.missing
    monkeypatch.setattr(Service, "missing", lambda service, bases: missing(service, list(bases)[:1]))


def it_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    async def planted(service: Service, name: str) -> None:
        service.expected.pop(name)

    monkeypatch.setattr(Service, "_make_expected", planted)


def it_is_still_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    make = Service._make_expected

    async def planted(service: Service, name: str) -> None:
        expected = service.expected[name]
        await make(service, name)
        service.expected.setdefault(name, expected)

    monkeypatch.setattr(Service, "_make_expected", planted)


@pytest.mark.parametrize("plant", [one_base_is_enough, it_is_never_made, it_is_still_expected])
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each breaks the invariant in an order in which the topmost wait, and the second base comes last."""
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        trio.run(run_order, ("p", "r", "d", "EE_b", "a", "b"))
