"""A file that SPDK saved starts here: its bdevs and disks are made as they were, and of the rest each thing gets a line.

`spdk_saved.json` has what a target with a mirror of memory and a file, a delayed disk and a limited one saves (SPDK of 2026): first what every
SPDK program sets; vbdevs before what they stand on; memory disks as a batch; files and raids last.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.service.bench import Bench, open_bench
from ublk_trio import UsageError
from ublk_trio.backends import Memory, ThreadedFile
from ublk_trio.service import methods_raid
from ublk_trio.service.config_file import apply_config, read_config
from ublk_trio.service.methods_config import save
from ublk_trio.service.service import Service

SAVED = Path(__file__).with_name("spdk_saved.json").read_text()
MIB = 1 << 20
DATA = bytes(range(256)) * 16


def saved_file(directory: Path, change: Callable[[dict[str, Any]], None] | None = None) -> str:
    """The file, with the image of its AIO bdev in the directory, and a CPU that this machine has."""
    image = directory / "aio0.img"
    image.write_bytes(bytes(16 * MIB))
    mask = f'"cpumask": "{1 << min(os.sched_getaffinity(0)):x}"'
    document = json.loads(SAVED.replace("/srv/aio0.img", str(image)).replace('"cpumask": "1"', mask))
    if change is not None:
        change(document)
    path = directory / "saved.json"
    path.write_text(json.dumps(document))
    return str(path)


def bdev_calls(document: dict[str, Any]) -> Any:
    return next(each["config"] for each in document["subsystems"] if each["subsystem"] == "bdev")


async def load(bench: Bench, path: str, *, keep_going: bool = False) -> list[UsageError]:
    return await apply_config(bench.dispatcher, bench.service, read_config(path), keep_going=keep_going)


async def run_whole(directory: Path) -> None:
    """Start it; look at every bdev and disk, write and read; save what it is, and start that."""
    async with open_bench(target=False) as bench:
        assert await load(bench, saved_file(directory)) == []
        disks = [(disk["id"], disk["bdev_name"], disk["queue_depth"]) for disk in await bench.call("ublk_get_disks")]
        assert disks == [(1, "Raid0", 512), (2, "Delay0", 128), (3, "Malloc2", 64)]
        bdevs = {bdev["name"]: bdev for bdev in await bench.call("bdev_get_bdevs")}
        claims = {name: bdev.get("claimed_by") for name, bdev in bdevs.items()}
        assert claims == {
            "Malloc0": "raid", "Malloc1": "delay", "Delay0": "ublk", "Malloc2": "ublk", "Aio0": "raid", "Raid0": "ublk"
        }  # fmt: skip
        assert bdevs["Raid0"]["uuid"] == "5f0a1b2c-0000-4000-8000-000000000004"
        assert bdevs["Delay0"]["driver_specific"]["delay"]["p99_read_latency"] == 100
        assert bdevs["Malloc2"]["assigned_rate_limits"]["r_mbytes_per_sec"] == 800
        for number in (1, 2, 3):
            disk = bench.kernel.block_device(number)
            await disk.write(4096, DATA)
            assert await disk.read(4096, len(DATA)) == DATA
        memory, file = (bench.service.registry.get(name).backend for name in ("Malloc0", "Aio0"))
        assert isinstance(memory, Memory)
        assert isinstance(file, ThreadedFile)
        copy = bytearray(len(DATA))
        memory.read(4096, memoryview(copy))
        assert copy == DATA, "one half of the mirror"
        assert (directory / "aio0.img").read_bytes()[4096 : 4096 + len(DATA)] == DATA, "the other half"
        saved = save(bench.service)
    (directory / "again.json").write_text(json.dumps(saved))
    async with open_bench(target=False) as again:
        assert await load(again, str(directory / "again.json")) == []
        assert save(again.service) == saved


async def test_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the module says. Each foreign subsystem and each setting has one warning, and nothing else has any."""
    with caplog.at_level(logging.WARNING, logger="ublk_trio.service"):
        await run_whole(tmp_path)
    lines = [record.getMessage().removeprefix(f"{tmp_path}/saved.json: ") for record in caplog.records]
    assert lines == [
        "subsystems[0]: subsystem fsdev is not one of ours, and is left out",
        "subsystems[2]: subsystem iobuf is not one of ours, and is left out",
        "subsystems[3]: subsystem sock is not one of ours, and is left out",
        "subsystems[5]: subsystem accel is not one of ours, and is left out",
        "subsystems[10]: subsystem nvmf is not one of ours, and is left out",
        "subsystems[11]: subsystem iscsi is not one of ours, and is left out",
        "subsystems[13]: subsystem vhost_blk is not one of ours, and is left out, with what these make: "
        "vhost_create_blk_controller",
        "subsystems[14]: subsystem scheduler is not one of ours, and is left out",
        "bdev_set_options is passed over: there is no pool of requests here",
        "bdev_raid_set_options is passed over: there is no choice of how a rebuild copies here",
        "bdev Delay0 is made as soon as there is Malloc1",
        "bdev_iscsi_set_options is passed over: there is no iSCSI bdev here",
        "bdev_nvme_set_options is passed over: there is no NVMe bdev here",
        "bdev_nvme_set_hotplug is passed over: there is no NVMe bdev here",
        "bdev_enable_histogram is passed over: there is no histogram of latencies here",
    ]


@pytest.mark.parametrize("method", ["bdev_nvme_attach_controller", "bdev_iscsi_create"])
async def test_what_cannot_be_had(method: str, tmp_path: Path) -> None:
    """A bdev of another kind is refused by name, with its place, and nothing is left; with keep_going all else is made."""

    def add(document: dict[str, Any]) -> None:
        bdev_calls(document).insert(0, {"method": method, "params": {"name": "Nvme0", "traddr": "0000:01:00.0"}})

    path = saved_file(tmp_path, add)
    async with open_bench(target=False) as bench:
        with pytest.raises(UsageError, match=rf"saved.json: subsystems\[6\].config\[0\]: {method}: .*keep-going"):
            await load(bench, path)
    async with open_bench(target=False) as bench:
        (failure,) = await load(bench, path, keep_going=True)
        assert method in str(failure)
        assert len(await bench.call("ublk_get_disks")) == 3


async def test_what_nothing_makes(tmp_path: Path) -> None:
    """A bdev that waits for one that does not come is told, with the place of the call that asked for it."""

    def misspell(document: dict[str, Any]) -> None:
        bdev_calls(document)[9]["params"]["base_bdevs"] = ["Malloc0", "Aoi0"]

    path = saved_file(tmp_path, misspell)
    async with open_bench(target=False) as bench:
        start, waits = await load(bench, path, keep_going=True)
        assert "ublk_start_disk: there is no bdev 'Raid0'" in str(start)
        assert "config[9]: bdev_raid_create: bdev Raid0 waits for Aoi0, which nothing makes" in str(waits)
        assert [disk["id"] for disk in await bench.call("ublk_get_disks")] == [2, 3]


# Planted bugs -----------------------------------------------------------------------------------------------------------


def nothing_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "missing", lambda service, bases: [])


def half_a_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods_raid, "_places", lambda params: params.base_bdevs[:1])


@pytest.mark.parametrize(
    ("plant", "error"),
    [(nothing_is_expected, UsageError), (half_a_mirror, AssertionError)],
)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    error: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A vbdev that is refused, a raid without its second half: each is noticed."""
    plant(monkeypatch)
    with pytest.raises(error):
        trio.run(run_whole, tmp_path)
