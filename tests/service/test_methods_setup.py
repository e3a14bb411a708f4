"""What a saved file of SPDK's sets is taken and changes nothing; the statistics of buffers are those of live disks."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.service.bench import INVALID, open_bench, refused
from ublk_trio.rpc import ErrorCode
from ublk_trio.service.methods_config import save
from ublk_trio.service.methods_setup import TUNING

METHOD_NOT_FOUND = int(ErrorCode.METHOD_NOT_FOUND)


async def test_set_up_calls(caplog: pytest.LogCaptureFixture) -> None:
    """They answer true, the log says what has no meaning, and nothing of them is saved; misspelt ones are refused."""
    async with open_bench(target=False) as bench:
        await bench.malloc("a")
        before = save(bench.service)
        with caplog.at_level(logging.WARNING, logger="ublk_trio.service"):
            assert await bench.call("bdev_set_options", bdev_io_pool_size=65535, bdev_auto_examine=True) is True
            assert await bench.call("iobuf_set_options", small_pool_count=8192, large_pool_count=1024) is True
        assert "bdev_set_options is passed over: there is no pool of requests here" in caplog.text
        assert await bench.call("bdev_wait_for_examine") is True
        assert await bench.call("bdev_examine", name="a") is True
        with refused(errno.ENODEV):
            await bench.call("bdev_examine", name="x")
        with refused(INVALID, "bdev_io_pool_size"):
            await bench.call("bdev_set_options", bdev_io_pool_siz=1)
        assert save(bench.service) == before


async def test_what_only_tunes_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever its parameters are, a warning names it, and nothing changes; what makes something is not to be had."""
    async with open_bench(target=False) as bench:
        before = save(bench.service)
        for method in TUNING:
            caplog.clear()
            assert await bench.call(method, period_us=100000, enable=False, anything=["at", "all"]) is True
            (record,) = caplog.records
            assert record.getMessage() == f"{method} is passed over: there is no {TUNING[method]} here"
        for method in ("bdev_nvme_attach_controller", "bdev_iscsi_create", "nvmf_create_subsystem"):
            with refused(METHOD_NOT_FOUND, method):
                await bench.call(method)
        assert save(bench.service) == before


async def test_what_would_make_a_bdev_faster_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The bdev is made, and a warning says which of its parameters did nothing; what SPDK always saves is no warning."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    async with open_bench(target=False) as bench:
        size = {"block_size": 512, "num_blocks": 16}
        asked: list[tuple[str, dict[str, Any], str, Any, Any]] = [
            ("bdev_malloc_create", {"name": "m", **size}, "numa_id", 1, -1),
            ("bdev_null_create", {"name": "n", **size}, "optimal_write_size", 8, 0),
            ("bdev_aio_create", {"name": "f", "filename": str(path), "block_size": 512}, "nowait", True, False),
        ]
        for method, params, name, value, usual in asked:
            caplog.clear()
            await bench.call(method, **params, **{name: value})
            assert [record.getMessage() for record in caplog.records] == [
                f"{method}: {name} is passed over: it changes nothing here"
            ]
            caplog.clear()
            await bench.call(method.replace("_create", "_delete"), name=params["name"])
            await bench.call(method, **params, **{name: usual})
            assert caplog.records == []
        assert await bench.names() == ["m", "n", "f"]


@pytest.mark.parametrize("mode", ["get-data", "user-copy"])
async def test_buffer_statistics(mode: str) -> None:
    """Requests that found a buffer, and those that waited for one, of disks that have pools; none, and all is 0."""
    nothing = {"cache": 0, "main": 0, "retry": 0, "cache_size": 0}
    async with open_bench() as bench:
        await bench.malloc("a", "b")
        assert await bench.call("iobuf_get_stats") == [{"module": "ublk", "small_pool": nothing, "large_pool": nothing}]
        await bench.start("b", 1, mode="copy")
        disk = await bench.start("a", 0, mode=mode, queue_depth=64)
        (before,) = await bench.call("iobuf_get_stats")
        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(disk.write, number * 8192, bytes(4096))
        (after,) = await bench.call("iobuf_get_stats")
        assert after["small_pool"] == nothing
        large = {key: after["large_pool"][key] - before["large_pool"][key] for key in nothing}
        assert large["cache"] + large["retry"] == 64
        assert large["retry"] > 0
        assert after["large_pool"]["cache_size"] == before["large_pool"]["cache_size"] > 0
        await bench.call("ublk_stop_disk", ublk_id=0)
        assert (await bench.call("iobuf_get_stats"))[0]["large_pool"] == nothing
