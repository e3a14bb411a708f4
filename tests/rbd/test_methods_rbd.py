"""The calls of rbd bdevs and their clusters, as SPDK's clients make them, on a real cluster."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.rbd.ceph import MIB, POOL, Ceph, failure, threads_of_ceph
from tests.service.bench import INVALID, Bench, open_bench, refused
from ublk_trio.backends import Rbd
from ublk_trio.bdev import Bdev
from ublk_trio.service import methods_config, methods_rbd
from ublk_trio.service.config_file import apply_config, read_config
from ublk_trio.service.cpumask import format_cpumask
from ublk_trio.service.methods_config import save
from ublk_trio.service.service import Service

#: Seconds: what takes longer hangs.
HANGS = 60.0
#: Of a CPU that this machine has.
MASK = format_cpumask({min(os.sched_getaffinity(0))})
DATA = bytes(range(256)) * 16


async def register(bench: Bench, ceph: Ceph, name: str = "c", **params: Any) -> Any:
    return await bench.call("bdev_rbd_register_cluster", name=name, config_file=ceph.config_file, **params)


async def create(bench: Bench, image: str, name: str | None = "r", **params: Any) -> Any:
    named = {} if name is None else {"name": name}
    given = {"pool_name": POOL, "cluster_name": "c", "block_size": 512, **params}
    return await bench.call("bdev_rbd_create", rbd_name=image, **named, **given)


async def test_life(ceph: Ceph) -> None:
    """Clusters and bdevs come, serve and go as SPDK's do, with an error that names what is wrong."""
    image = ceph.image()
    async with open_bench() as bench:
        assert await bench.call("bdev_rbd_get_clusters_info") == []
        with refused(errno.ENOENT, "there is no cluster 'c': register it with bdev_rbd_register_cluster"):
            await create(bench, image)
        assert await register(bench, ceph, user_id="me", config_param={"rbd_cache": "true"}) == "c"
        info = {
            "cluster_name": "c",
            "user_id": "me",
            "config_param": {"rbd_cache": "true"},
            "config_file": ceph.config_file,
        }
        assert await bench.call("bdev_rbd_get_clusters_info", name="c") == info
        assert await bench.call("bdev_rbd_get_clusters_info") == [info]
        with refused(errno.EEXIST, "choose another name"):
            await register(bench, ceph)
        with refused(errno.ENOENT, "there is no cluster 'x'"):
            await bench.call("bdev_rbd_get_clusters_info", name="x")
        assert await create(bench, image, None) == "Ceph0"
        assert await create(bench, image, None, read_only=True) == "Ceph1"
        with refused(
            errno.EBUSY, "2 bdevs use cluster 'c': delete them first, or wait until those that are being opened"
        ):
            await bench.call("bdev_rbd_unregister_cluster", name="c")
        bdev = await bench.bdev("Ceph0")
        assert bdev["product_name"] == "Ceph Rbd Disk"
        assert (bdev["block_size"], bdev["num_blocks"]) == (512, 8 * MIB // 512)
        assert bdev["driver_specific"] == {"rbd": {"pool_name": POOL, "rbd_name": image, "block_size": 512, **info}}
        supported = {name for name, can in bdev["supported_io_types"].items() if can}
        assert supported == {"read", "write", "unmap", "flush", "write_zeroes"}
        (reader,) = await bench.call("bdev_get_bdevs", name="Ceph1")
        assert {name for name, can in reader["supported_io_types"].items() if can} == {"read"}

        disk = await bench.start("Ceph0", 0)
        with refused(errno.EPERM, "claimed by ublk"):
            await bench.start("Ceph0", 1)
        await disk.write(4096, DATA)
        await disk.flush()
        await disk.discard(0, 8 * MIB)
        await disk.write_zeroes(MIB, MIB)
        await disk.write(MIB, DATA)
        await disk.flush()
        shown = await bench.start("Ceph1", 1)
        assert await shown.read(MIB, len(DATA)) == DATA
        assert await shown.read(4096, len(DATA)) == bytes(len(DATA))
        (counted,) = (await bench.call("bdev_get_iostat", name="Ceph0"))["bdevs"]
        assert counted["num_unmap_ops"] >= 1
        assert counted["bytes_written"] >= 2 * len(DATA)

        for number in (0, 1):
            await bench.call("ublk_stop_disk", ublk_id=number)
        for name in ("Ceph0", "Ceph1"):
            assert await bench.call("bdev_rbd_delete", name=name) is True
        with refused(errno.ENODEV):
            await bench.call("bdev_rbd_delete", name="Ceph0")
        assert await bench.call("bdev_rbd_unregister_cluster", name="c") is True
        with refused(errno.ENOENT):
            await bench.call("bdev_rbd_unregister_cluster", name="c")


async def test_a_connection_of_its_own(ceph: Ceph, caplog: pytest.LogCaptureFixture) -> None:
    """Without a cluster a bdev connects by its own options, and no file; what a cluster has already is passed over with a warning."""
    image = ceph.image()
    options = {"mon_host": ceph.mon_host, "auth_client_required": "none"}
    async with open_bench(target=False) as bench:
        own = {"pool_name": POOL, "rbd_name": image, "block_size": 4096, "config": options, "user_id": "me"}
        assert await bench.call("bdev_rbd_create", **own) == "Ceph0"
        assert (await bench.bdev("Ceph0"))["driver_specific"]["rbd"] == own
        await register(bench, ceph)
        await bench.call("bdev_rbd_delete", name="Ceph0")
        with caplog.at_level(logging.WARNING, logger="ublk_trio.service"):
            await create(bench, image, user_id="me", config=options)
        assert [record.getMessage() for record in caplog.records] == [
            "bdev_rbd_create: user_id is passed over: the cluster has its own",
            "bdev_rbd_create: config is passed over: the cluster has its own",
        ]


async def run_beside_a_target(ceph: Ceph) -> None:
    """Clusters that are made while a target has confined the process: with any mask that it could use before, and without."""
    usable = os.sched_getaffinity(0)
    first, last = min(usable), max(usable)
    async with open_bench(target=False) as bench:
        await bench.call("ublk_create_target", cpumask=format_cpumask({first}))
        for number, mask in enumerate((None, format_cpumask({last}), format_cpumask(usable))):
            before = threads_of_ceph()
            params = {} if mask is None else {"core_mask": mask}
            await register(bench, ceph, f"c{number}", **params)
            await create(bench, ceph.image(), f"r{number}", cluster_name=f"c{number}")
            disk = await bench.start(f"r{number}", number)
            await disk.write(0, DATA)
            await disk.flush()
            made = threads_of_ceph() - before
            assert made
            expected = {last} if mask == format_cpumask({last}) else usable
            assert [os.sched_getaffinity(task) for task in made] == [expected] * len(made)
        before = threads_of_ceph()
        options = {"mon_host": ceph.mon_host, "auth_client_required": "none"}
        own = {"pool_name": POOL, "rbd_name": ceph.image(), "block_size": 512, "config": options}
        await bench.call("bdev_rbd_create", **own)
        made = threads_of_ceph() - before
        assert [os.sched_getaffinity(task) for task in made] == [usable] * len(made)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs: on one there is nothing to choose")
async def test_cpus_beside_a_target(ceph: Ceph) -> None:
    """Ceph's threads have the process's CPUs, not those to which a target has confined it."""
    await run_beside_a_target(ceph)


async def test_refusals(ceph: Ceph) -> None:
    """What cannot be opened is said with its errno, and leaves no bdev, name or connection behind."""
    image = ceph.image()
    async with open_bench(target=False) as bench:
        with refused(errno.ENOENT, "config_file /nowhere can't be read"):
            await bench.call("bdev_rbd_register_cluster", name="c", config_file="/nowhere")
        with refused(errno.ETIMEDOUT, "no monitor answered within 1 s"):
            options = {"mon_host": "v2:127.0.0.1:1", "client_mount_timeout": "1"}
            await bench.call("bdev_rbd_register_cluster", name="c", config_file="/dev/null", config_param=options)
        with refused(INVALID, "not a cpumask"):
            await register(bench, ceph, core_mask="many")
        assert await bench.call("bdev_rbd_get_clusters_info") == []
        await register(bench, ceph, core_mask=MASK)
        with refused(errno.ENOENT, "pool 'none': there is none of that name"):
            await create(bench, image, pool_name="none")
        with refused(errno.ENOENT, "the image: there is none of that name"):
            await create(bench, "none")
        with refused(INVALID, "block_size 8192 is not possible"):
            await create(bench, image, block_size=8192)
        with refused(INVALID, "params.rbd_name"):
            await create(bench, "")
        assert await bench.names() == []
        await create(bench, image)
        with refused(errno.EEXIST, "choose another name"):
            await create(bench, image)
        with refused(INVALID, "would lose data"):
            await bench.call("bdev_rbd_resize", name="r", new_size=4)
        await bench.malloc("m")
        with refused(errno.ENODEV, "was made by bdev_malloc_create"):
            await bench.call("bdev_rbd_resize", name="m", new_size=16)


async def run_resized(ceph: Ceph, within: float = HANGS) -> None:
    """A live disk whose image grows by the call, and by another program's doing."""
    image = ceph.image(2 * MIB)
    async with open_bench() as bench:
        await register(bench, ceph)
        await create(bench, image)
        disk = await bench.start("r")
        assert await bench.call("bdev_rbd_resize", name="r", new_size=4) is True
        assert disk.size == 4 * MIB
        assert (await bench.bdev("r"))["num_blocks"] == 4 * MIB // 512
        await disk.write(4 * MIB - len(DATA), DATA)
        await trio.to_thread.run_sync(lambda: ceph.rbd("resize", "--no-progress", "--size", "8M", f"{POOL}/{image}"))
        with trio.move_on_after(within):
            while disk.size != 8 * MIB:  # noqa: ASYNC110 - the block layer has no event for it
                await trio.sleep(0.02)
        assert disk.size == 8 * MIB
        await disk.write(8 * MIB - len(DATA), DATA)
        assert await disk.read(8 * MIB - len(DATA), len(DATA)) == DATA


async def test_a_disk_follows_its_image(ceph: Ceph) -> None:
    """A resize, whoever does it, is the live disk's."""
    await run_resized(ceph)


async def test_shrunk_to_a_size_that_no_disk_has(ceph: Ceph) -> None:
    """A live disk keeps its size then; what lies beyond the image's end is EIO, and what lies before it is served."""
    image = ceph.image(2 * MIB)
    async with open_bench() as bench:
        await register(bench, ceph)
        await create(bench, image, block_size=4096)
        disk = await bench.start("r")
        command = ("resize", "--no-progress", "--allow-shrink", "--size", f"{MIB + 512}B", f"{POOL}/{image}")
        await trio.to_thread.run_sync(ceph.rbd, *command)
        assert await failure(lambda: disk.write(MIB, DATA)) == errno.EIO
        assert disk.size == 2 * MIB
        await disk.write(MIB - len(DATA), DATA)
        assert await disk.read(MIB - len(DATA), len(DATA)) == DATA


async def test_removed_under_a_disk(ceph: Ceph) -> None:
    """Deleting a bdev stops the disk that is made of it; what it wrote is in the image, and the image free."""
    image = ceph.image()
    async with open_bench() as bench:
        await register(bench, ceph)
        await create(bench, image)
        disk = await bench.start("r")
        async with trio.open_nursery() as nursery:

            async def keep_writing() -> None:
                try:
                    while True:
                        await disk.write(0, DATA)
                except OSError:
                    return

            nursery.start_soon(keep_writing)
            await disk.write(MIB, DATA)
            with trio.fail_after(HANGS):
                assert await bench.call("bdev_rbd_delete", name="r") is True
        assert await bench.call("ublk_get_disks") == []
        assert await bench.call("bdev_rbd_unregister_cluster", name="c") is True
        await register(bench, ceph)
        await create(bench, image)
        again = await bench.start("r")
        assert await again.read(MIB, len(DATA)) == DATA


async def test_limits_and_what_stands_on_it(ceph: Ceph) -> None:
    """An rbd bdev takes limits, and other bdevs stand on it, as on any; they follow its size."""
    async with open_bench() as bench:
        await register(bench, ceph)
        await create(bench, ceph.image(2 * MIB))
        await bench.call("bdev_set_qos_limit", name="r", rw_ios_per_sec=100000)
        await bench.call("bdev_passthru_create", name="p", base_bdev_name="r")
        disk = await bench.start("p")
        await disk.write(0, DATA)
        await bench.call("bdev_rbd_resize", name="r", new_size=4)
        assert disk.size == 4 * MIB
        assert await disk.read(0, len(DATA)) == DATA


async def run_saved(ceph: Ceph, directory: Path) -> None:
    """A configuration that is saved, started, and saved again."""
    first, second = ceph.image(), ceph.image()
    async with open_bench() as bench:
        await register(bench, ceph, config_param={"rbd_cache": "false"}, core_mask=MASK)
        await create(bench, first)
        await create(bench, second, "s", read_only=True, block_size=4096)
        options = {"mon_host": ceph.mon_host, "auth_client_required": "none"}
        own = {"pool_name": POOL, "rbd_name": second, "block_size": 512, "config": options}
        await bench.call("bdev_rbd_create", name="own", **own)
        disk = await bench.start("r", 3)
        await disk.write(0, DATA)
        saved = save(bench.service)
        calls = next(each["config"] for each in saved["subsystems"] if each["subsystem"] == "bdev")
        assert [call["method"] for call in calls] == ["bdev_rbd_register_cluster", *["bdev_rbd_create"] * 3]
    path = directory / "saved.json"
    path.write_text(json.dumps(saved))
    async with open_bench(target=False) as bench:
        assert await apply_config(bench.dispatcher, bench.service, read_config(path)) == []
        assert save(bench.service) == saved
        assert await bench.kernel.block_device(3).read(0, len(DATA)) == DATA
        assert (await bench.bdev("s"))["driver_specific"]["rbd"]["read_only"] is True


async def test_saved_and_started(ceph: Ceph, tmp_path: Path) -> None:
    """A saved file has clusters before their bdevs, with all that they were made with, and starts the same again."""
    await run_saved(ceph, tmp_path)


async def test_a_toml_file(ceph: Ceph, tmp_path: Path) -> None:
    """The short form makes one, too."""
    path = tmp_path / "disks.toml"
    path.write_text(
        f'[[bdev]]\nkind = "rbd"\nname = "r"\npool_name = "{POOL}"\nrbd_name = "{ceph.image()}"\nblock_size = 512\n'
        f'config = {{ mon_host = "{ceph.mon_host}", auth_client_required = "none" }}\n[[disk]]\nbdev = "r"\nid = 0\n'
    )
    async with open_bench(target=False) as bench:
        assert await apply_config(bench.dispatcher, bench.service, read_config(path)) == []
        disk = bench.kernel.block_device(0)
        await disk.write(0, DATA)
        assert await disk.read(0, len(DATA)) == DATA


# Planted bugs -----------------------------------------------------------------------------------------------------------


def nobody_is_told_of_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def follow(bdev: Bdev, backend: Rbd) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(methods_rbd, "_follow", follow)


def clusters_are_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(service: Service) -> list[Any]:
        return service.calls()

    monkeypatch.setitem(methods_config.SUBSYSTEMS, "bdev", ((), calls))


def read_only_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    right = methods_rbd._place

    def place(params: methods_rbd.RbdCreate) -> dict[str, Any]:
        return {key: value for key, value in right(params).items() if key != "read_only"}

    monkeypatch.setattr(methods_rbd, "_place", place)


@pytest.mark.parametrize(
    ("plant", "run"),
    [
        (nobody_is_told_of_sizes, lambda ceph, directory: run_resized(ceph, within=0.5)),
        (clusters_are_not_saved, run_saved),
        (read_only_is_not_saved, run_saved),
    ],
)
async def test_a_planted_bug_is_found(
    ceph: Ceph,
    tmp_path: Path,
    plant: Callable[[pytest.MonkeyPatch], None],
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What SPDK's saved files leave out, a disk that keeps its old size: each is noticed."""
    plant(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, KeyError)):
        await run(ceph, tmp_path)
