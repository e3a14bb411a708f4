"""Every method, called as clients call it: its result, its refusals, and what applications on the disks see of it."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import trio
import trio.testing

from tests.search import broken_invariant
from tests.service.bench import BLOCKS, INVALID, open_bench, refused
from ublk_trio import KernelError, KernelUnavailableError, SimKernel
from ublk_trio.bdev import Bdev, Registry
from ublk_trio.rpc import ErrorCode
from ublk_trio.service.methods import METHODS
from ublk_trio.service.methods_setup import TUNING

DATA = bytes(range(256)) * 16
MIB = 1 << 20
NO_LATENCY = {f"{kind}_latency": 0 for kind in ("avg_read", "p99_read", "avg_write", "p99_write")}


async def test_every_bdev_is_made_described_and_deleted(tmp_path: Path) -> None:
    """Each kind answers with its name, is described in SPDK's form, and is gone after its own delete and no other."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    async with open_bench(target=False) as bench:
        await bench.malloc("base")
        asked: list[tuple[str, dict[str, Any], Any, str, str]] = [
            ("malloc", {"name": "m", "block_size": 4096, "num_blocks": 16}, "m", "m", "Malloc disk"),
            ("malloc", {"block_size": 512, "num_blocks": 16}, "Malloc0", "Malloc0", "Malloc disk"),
            ("null", {"name": "n", "block_size": 512, "num_blocks": 16}, "n", "n", "Null disk"),
            ("aio", {"name": "f", "filename": str(path), "block_size": 512}, "f", "f", "AIO disk"),
            ("passthru", {"name": "p", "base_bdev_name": "base"}, "p", "p", "passthru"),
            ("delay", {"name": "d", "base_bdev_name": "base", **NO_LATENCY}, "d", "d", "delay"),
            ("error", {"base_name": "base"}, True, "EE_base", "error"),
        ]
        for kind, params, answer, name, product in asked:
            assert await bench.call(f"bdev_{kind}_create", **params) == answer
            described = await bench.bdev(name)
            assert described["product_name"] == product
            assert described["num_blocks"] * described["block_size"] > 0
            assert described["claimed"] is False
            assert described["supported_io_types"]["read"] is True
            assert described["supported_io_types"]["nvme_io"] is False
            assert described["aliases"] == [described["uuid"]]
            assert await bench.bdev(described["uuid"]) == described
            other = "null" if kind != "null" else "aio"
            with refused(errno.ENODEV, f"made by bdev_{kind}_create"):
                await bench.call(f"bdev_{other}_delete", name=name)
            with refused(errno.EEXIST, "already"):
                await bench.call(f"bdev_{kind}_create", **{"name": name} | params)
            assert await bench.call(f"bdev_{kind}_delete", name=name) is True
            assert await bench.names() == ["base"]


async def test_refusals_of_bdevs(tmp_path: Path) -> None:
    """What cannot be is refused with the field or the errno, and leaves nothing."""
    async with open_bench(target=False) as bench:
        await bench.malloc("a")
        malloc = {"name": "m", "block_size": 512, "num_blocks": 16}
        asked: list[tuple[str, dict[str, Any], int, str]] = [
            ("bdev_malloc_create", {"name": "m", "num_blocks": 16}, INVALID, "block_size"),
            ("bdev_malloc_create", malloc | {"block_size": 513}, INVALID, "block_size"),
            ("bdev_malloc_create", malloc | {"num_blocks": 0}, INVALID, "num_blocks"),
            ("bdev_malloc_create", malloc | {"md_size": 8}, INVALID, "md_size"),
            ("bdev_malloc_create", malloc | {"uuid": "x"}, INVALID, "uuid"),
            ("bdev_malloc_create", malloc | {"name": ""}, errno.EINVAL, "name"),
            ("bdev_aio_create", {"name": "f", "filename": str(tmp_path / "none")}, errno.ENOENT, "none"),
            ("bdev_get_iostat", {"name": "a", "per_channel": True}, INVALID, "per_channel"),
            ("bdev_aio_rescan", {"name": "a"}, errno.ENODEV, "made by"),
            ("bdev_null_resize", {"name": "a", "new_size": 1}, errno.ENODEV, "made by"),
            ("bdev_passthru_create", {"name": "a", "base_bdev_name": "x"}, errno.EEXIST, "'a'"),
            ("bdev_delay_create", {"name": "d", "base_bdev_name": "a"}, INVALID, "avg_read_latency"),
            ("bdev_delay_update_latency", {"delay_bdev_name": "a", "latency_type": "avg_read", "latency_us": 1},
             errno.ENODEV, "made by"),
            ("bdev_error_inject_error", {"name": "a", "io_type": "read", "error_type": "failure"}, errno.ENODEV, "made"),
            ("bdev_get_bdevs", {"name": "x"}, errno.ENODEV, "'x'"),
            ("bdev_get_iostat", {"name": "x"}, errno.ENODEV, "'x'"),
            ("bdev_get_iostat", {"name": "a", "names": ["a"]}, errno.EINVAL, "one of them"),
            ("bdev_set_qos_limit", {"name": "a"}, INVALID, "give a limit"),
            ("bdev_set_qos_limit", {"name": "a", "rw_ios_per_sec": -1}, INVALID, "rw_ios_per_sec"),
            ("framework_get_config", {"name": "nvmf"}, INVALID, "bdev"),
            ("bdev_iscsi_create", {}, int(ErrorCode.METHOD_NOT_FOUND), "bdev_iscsi_create"),
        ]  # fmt: skip
        for method, params, code, says in asked:
            with refused(code, says):
                await bench.call(method, **params)
            assert await bench.names() == ["a"], method
            assert (await bench.bdev("a"))["claimed"] is False, method


async def test_refusals_of_disks() -> None:
    """Each kind has the errno of SPDK's target, and leaves no disk."""
    async with open_bench(target=False) as bench:
        await bench.malloc("a", "b")
        with refused(errno.ENODEV, "ublk_create_target"):
            await bench.start("a")
        with refused(errno.ENOENT):
            await bench.call("ublk_destroy_target")
        with refused(INVALID, "cpumask"):
            await bench.call("ublk_create_target", cpumask="0x0")
        assert await bench.call("ublk_create_target") is True
        with refused(errno.EBUSY):
            await bench.call("ublk_create_target")
        assert await bench.call("ublk_start_disk", bdev_name="a", ublk_id=0, num_queues=9999, queue_depth=64) == 0
        asked: list[tuple[str, dict[str, Any], int]] = [
            ("ublk_start_disk", {"bdev_name": "b", "ublk_id": 0}, errno.EBUSY),
            ("ublk_start_disk", {"bdev_name": "a", "ublk_id": 1}, errno.EPERM),
            ("ublk_start_disk", {"bdev_name": "x", "ublk_id": 1}, errno.ENODEV),
            ("ublk_start_disk", {"bdev_name": "b", "ublk_id": -1}, -INVALID),
            ("ublk_start_disk", {"bdev_name": "b", "ublk_id": 1, "num_queues": 0}, -INVALID),
            ("ublk_start_disk", {"bdev_name": "b", "ublk_id": 1, "queue_depth": 0}, -INVALID),
            ("ublk_stop_disk", {"ublk_id": 1}, errno.ENODEV),
            ("ublk_get_disks", {"ublk_id": 1}, errno.ENODEV),
            ("ublk_recover_disk", {"bdev_name": "b", "ublk_id": 1}, errno.ENODEV),
        ]
        for method, params, code in asked:
            with refused(-code):
                await bench.call(method, **params)
        (disk,) = await bench.call("ublk_get_disks", ublk_id=0)
        assert (disk["ublk_device"], disk["id"], disk["queue_depth"], disk["bdev_name"]) == ("/dev/ublkb0", 0, 64, "a")
        assert 1 <= disk["num_queues"] < 9999
        assert await bench.call("ublk_stop_disk", ublk_id=0) is True
        assert await bench.call("ublk_destroy_target") is True


async def test_queues_and_depth() -> None:
    """Left out they are SPDK's, 1 and 128; more than the kernel has become what it has."""
    async with open_bench() as bench:
        await bench.malloc("a", "b")
        await bench.start("a", 0)
        await bench.start("b", 1, num_queues=9999, queue_depth=9999, mode="get-data")
        few, many = await bench.call("ublk_get_disks")
        assert (few["num_queues"], few["queue_depth"]) == (1, 128)
        assert many["num_queues"] == bench.kernel.cpus
        assert many["queue_depth"] == 4096


async def test_an_id_of_0_and_none() -> None:
    """0 is an id, no id is all disks; a disk that is started without one gets one that is free."""
    async with open_bench() as bench:
        await bench.malloc("a", "b", "c")
        await bench.start("a", 0)
        given = await bench.call("ublk_start_disk", bdev_name="b")
        await bench.start("c", given + 1)
        assert given > 0
        assert [disk["bdev_name"] for disk in await bench.call("ublk_get_disks", ublk_id=0)] == ["a"]
        assert [disk["id"] for disk in await bench.call("ublk_get_disks")] == [0, given, given + 1]


async def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that cannot open it is refused with the errno, and may be created later."""
    async with open_bench(target=False) as bench:
        for error, code in ((KernelError(errno.EACCES, "run as root"), errno.EACCES),
                            (KernelUnavailableError("modprobe ublk_drv"), errno.ENODEV)):  # fmt: skip
            with monkeypatch.context() as patch:
                patch.setattr(SimKernel, "open_control", Mock(side_effect=error))
                with refused(code, str(error)):
                    await bench.call("ublk_create_target")
        assert await bench.call("ublk_create_target") is True


async def test_stopped_only_if_unused() -> None:
    """A disk that somebody has open is EBUSY, and goes on; closed, it is stopped."""
    async with open_bench() as bench:
        await bench.malloc("a")
        disk = await bench.start("a")
        with disk.open():
            with refused(errno.EBUSY):
                await bench.call("ublk_stop_disk", ublk_id=0, if_unused=True)
            await disk.write(0, DATA)
        assert await bench.call("ublk_stop_disk", ublk_id=0, if_unused=True) is True
        assert await bench.call("ublk_get_disks") == []


async def test_too_many_disks() -> None:
    """What the driver's limit refuses is ENOTSUP, and the bdev is free again."""
    kernel = SimKernel(paranoid=True, version=(6, 8), devices_max=1)
    async with open_bench(kernel=kernel) as bench:
        await bench.malloc("a", "b")
        await bench.start("a", 0)
        with refused(errno.ENOTSUP, "ublks_max"):
            await bench.start("b", 1)
        assert (await bench.bdev("b"))["claimed"] is False
        await bench.call("ublk_stop_disk", ublk_id=0)
        await bench.start("b", 1)


async def test_a_stack_goes_with_its_base() -> None:
    """What stands on a bdev that is deleted goes too, and the disk on top."""
    async with open_bench() as bench:
        await bench.malloc("a", "other")
        await bench.call("bdev_passthru_create", name="p", base_bdev_name="a")
        await bench.call("bdev_delay_create", name="d", base_bdev_name="p", **NO_LATENCY)
        disk = await bench.start("d")
        await disk.write(0, DATA)
        assert await bench.call("bdev_malloc_delete", name="a") is True
        assert await bench.names() == ["other"]
        assert await bench.call("ublk_get_disks") == []


@pytest.mark.parametrize("kind", ["malloc", "null", "aio"])
async def test_a_disk_follows_its_bdev_s_size(kind: str, tmp_path: Path) -> None:
    """Resized or rescanned below a stack, bdev and disk have the new size at once."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    async with open_bench() as bench:
        if kind == "aio":
            await bench.call("bdev_aio_create", name="a", filename=str(path), block_size=512)
        else:
            await bench.call(f"bdev_{kind}_create", name="a", block_size=512, num_blocks=BLOCKS)
        await bench.call("bdev_passthru_create", name="p", base_bdev_name="a")
        disk = await bench.start("p")
        assert disk.size == MIB
        if kind == "aio":
            path.write_bytes(bytes(2 * MIB))
            assert await bench.call("bdev_aio_rescan", name="a") is True
        else:
            assert await bench.call(f"bdev_{kind}_resize", name="a", new_size=2) is True
        assert (await bench.bdev("p"))["num_blocks"] == 2 * BLOCKS
        assert disk.size == 2 * MIB
        await disk.write(2 * MIB - 4096, DATA)
        if kind != "null":
            assert await disk.read(2 * MIB - 4096, 4096) == DATA


async def test_a_kernel_that_cannot_resize(caplog: pytest.LogCaptureFixture) -> None:
    """The bdev is resized, the disk keeps its size and goes on, and a warning says so."""
    async with open_bench(kernel=SimKernel(paranoid=True, version=(6, 12))) as bench:
        await bench.malloc("a")
        disk = await bench.start("a")
        with caplog.at_level(logging.WARNING, logger="ublk_trio.service"):
            assert await bench.call("bdev_malloc_resize", name="a", new_size=2) is True
        assert "disk 0 keeps its size" in caplog.text
        assert (await bench.bdev("a"))["num_blocks"] == 2 * BLOCKS
        assert disk.size == MIB
        await disk.write(0, DATA)
        assert await disk.read(0, 4096) == DATA


async def test_limits_of_a_live_disk(autojump_clock: trio.testing.MockClock) -> None:
    """Set while the disk is in use they hold at once; 0 lifts them."""
    async with open_bench() as bench:
        await bench.malloc("a")
        disk = await bench.start("a")

        async def seconds() -> float:
            begin = trio.current_time()
            for _ in range(300):
                await disk.write(0, bytes(512))
            return trio.current_time() - begin

        free = await seconds()
        assert await bench.call("bdev_set_qos_limit", name="a", rw_ios_per_sec=1000) is True
        assert (await bench.bdev("a"))["assigned_rate_limits"]["rw_ios_per_sec"] == 1000
        assert 0.2 < await seconds() < 0.5
        await bench.call("bdev_set_qos_limit", name="a", rw_ios_per_sec=0)
        assert await seconds() <= free + 0.01


async def test_injected_errors_are_seen() -> None:
    """So many requests fail as was asked for, data is corrupted where it was, and clear ends it."""
    async with open_bench() as bench:
        await bench.malloc("a")
        await bench.call("bdev_error_create", base_name="a")
        disk = await bench.start("EE_a")

        async def inject(io_type: str, error_type: str, **params: Any) -> None:
            method = "bdev_error_inject_error"
            assert await bench.call(method, name="EE_a", io_type=io_type, error_type=error_type, **params) is True

        await disk.write(0, DATA)
        await inject("read", "failure", num=2)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                await disk.read(0, 4096)
        assert await disk.read(0, 4096) == DATA
        await inject("read", "corrupt_data", corrupt_offset=3, corrupt_value=7)
        changed = await disk.read(0, 4096)
        assert [number for number, byte in enumerate(changed) if byte != DATA[number]] == [3]
        await inject("read", "nomem")
        assert await disk.read(0, 4096) == DATA
        await inject("all", "failure", num=1000)
        await inject("clear", "failure")
        assert await disk.read(0, 4096) == DATA


async def test_counters() -> None:
    """Operations, bytes and errors of each bdev, by name or all of them."""
    async with open_bench() as bench:
        await bench.malloc("a", "b")
        disk = await bench.start("a")
        (before,) = (await bench.call("bdev_get_iostat", name="a"))["bdevs"]
        for _ in range(3):
            await disk.write(0, DATA)
        await disk.read(0, 8192)
        await disk.discard(0, 4096)
        stats = await bench.call("bdev_get_iostat")
        assert stats["tick_rate"] == 10**9
        assert stats["ticks"] > 0
        after, other = stats["bdevs"]
        assert (after["name"], other["name"], other["num_write_ops"]) == ("a", "b", 0)
        keys = ("num_write_ops", "bytes_written", "num_read_ops", "bytes_read", "num_unmap_ops", "bytes_unmapped")
        assert [after[key] - before[key] for key in keys] == [3, 3 * 4096, 1, 8192, 1, 4096]
        assert after["max_write_latency_ticks"] >= after["min_write_latency_ticks"] > 0
        assert after["io_error"] == {}
        await bench.call("bdev_get_iostat", names=["a"], reset_mode="all", per_channel=False)
        (again,) = (await bench.call("bdev_get_iostat", name="a"))["bdevs"]
        assert (again["num_write_ops"], again["bytes_read"]) == (0, 0)
        other_disk = await bench.start("b", 1)
        for each in (disk, other_disk):
            await each.write(0, DATA)
        await bench.call("bdev_get_iostat", reset_mode="all")
        assert [each["num_write_ops"] for each in (await bench.call("bdev_get_iostat"))["bdevs"]] == [0, 0]


async def test_waiting_for_a_bdev() -> None:
    """With a timeout, the answer comes as soon as the bdev is there."""
    async with open_bench(target=False) as bench, trio.open_nursery() as nursery:
        found: list[Any] = []

        async def wait() -> None:
            found.append(await bench.call("bdev_get_bdevs", name="late", timeout=60_000))

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await bench.malloc("late")
        await trio.testing.wait_all_tasks_blocked()
        assert found[0][0]["name"] == "late"


async def test_a_latency_is_changed_under_a_live_disk(autojump_clock: trio.testing.MockClock) -> None:
    """Requests to come take as long as they are told to."""
    async with open_bench() as bench:
        await bench.malloc("a")
        await bench.call("bdev_delay_create", name="d", base_bdev_name="a", **NO_LATENCY)
        disk = await bench.start("d")
        for kind in ("avg_write", "p99_write"):
            update = {"delay_bdev_name": "d", "latency_type": kind, "latency_us": 2_000_000}
            assert await bench.call("bdev_delay_update_latency", **update) is True
        begin = trio.current_time()
        await disk.write(0, DATA)
        assert 1.9 < trio.current_time() - begin < 3


async def test_subsystems() -> None:
    """There are two, the disks depend on the bdevs, and each has its calls."""
    async with open_bench() as bench:
        await bench.malloc("a")
        await bench.start("a", 3)
        assert await bench.call("framework_get_subsystems") == [
            {"subsystem": "bdev", "depends_on": []},
            {"subsystem": "ublk", "depends_on": ["bdev"]},
        ]
        bdevs = await bench.call("framework_get_config", name="bdev")
        disks = await bench.call("framework_get_config", name="ublk", with_batches=True)
        assert [call["method"] for call in bdevs] == ["bdev_malloc_create"]
        assert [call["method"] for call in disks] == ["ublk_create_target", "ublk_start_disk"]
        assert disks[1]["params"] == {"bdev_name": "a", "ublk_id": 3, "num_queues": 1, "queue_depth": 128}


@pytest.mark.parametrize("disabled", [False, True])
async def test_disable_user_copy(disabled: bool) -> None:
    """A target that was created without user copy starts no disk with it; what it has is saved."""
    async with open_bench(target=False) as bench:
        await bench.call("ublk_create_target", disable_user_copy=disabled)
        await bench.malloc("a", "b", "c")
        await bench.start("a", 0)
        await bench.start("b", 1, mode="get-data")
        modes = [None, "get-data"]
        if disabled:
            with refused(errno.ENOTSUP, "created with disable_user_copy"):
                await bench.start("c", 2, mode="user-copy")
            assert (await bench.bdev("c"))["claimed"] is False
        else:
            disk = await bench.start("c", 2, mode="user-copy")
            await disk.write(4096, b"c" * 4096)
            assert await disk.read(4096, 4096) == b"c" * 4096
            modes.append("user-copy")
        target, *disks = await bench.call("framework_get_config", name="ublk")
        assert target["params"] == {"disable_user_copy": disabled}
        assert [disk["params"].get("mode") for disk in disks] == modes


def forgets_to_tell_of_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    async def planted(bdev: Bdev) -> None:
        bdev._limited.settle()

    monkeypatch.setattr(Bdev, "resized", planted)


def limits_wait_for_the_next_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bdev, "set_limits", lambda bdev, limits: bdev._limited.set_limits(limits))


def a_base_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Registry, "_remover", lambda registry, bdev: lambda: None)


async def test_planted_bugs_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tests above fail on each of these bugs."""
    with monkeypatch.context() as planted:
        forgets_to_tell_of_a_size(planted)
        with broken_invariant():
            await test_a_disk_follows_its_bdev_s_size("malloc", tmp_path)
    with monkeypatch.context() as planted:
        limits_wait_for_the_next_user(planted)
        with broken_invariant():
            await test_limits_of_a_live_disk(trio.testing.MockClock())
    with monkeypatch.context() as planted:
        a_base_goes_alone(planted)
        with broken_invariant(), trio.fail_after(1):
            await test_a_stack_goes_with_its_base()


async def test_no_method_without_a_test() -> None:
    """Each method is called in a test of this directory, or of the one for Ceph."""
    tests = Path(__file__).parent.parent
    text = "".join(path.read_text() for place in ("service", "rbd") for path in (tests / place).glob("*.py"))
    kinds = ("malloc", "null", "aio", "passthru", "delay", "error")
    loops = {f"bdev_{kind}_{what}" for kind in kinds for what in ("create", "delete", "resize")}
    loops |= TUNING.keys()
    missing = [m.name for m in METHODS if f'"{m.name}"' not in text and m.name not in loops]
    assert not missing
