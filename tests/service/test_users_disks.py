"""A service that runs as an ordinary user has disks by call, which are that user's; and a saved configuration says so."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import Any

import pytest
import trio

from tests.service.bench import INVALID, open_bench, refused
from ublk_trio import DeviceOptions, SimKernel, UsageError
from ublk_trio.service import methods_config, methods_ublk
from ublk_trio.service.methods_config import save
from ublk_trio.uapi import Feature

DATA = bytes(range(256)) * 16


def users_kernel() -> SimKernel:
    return SimKernel(privileged=False, paranoid=True)


async def run_life(*, by_service: bool) -> None:
    """Start one, use it, recover none of it, save it, stop it; make it again from what was saved."""
    asked: dict[str, Any] = {} if by_service else {"unprivileged": True}
    async with open_bench(kernel=users_kernel(), unprivileged=by_service) as bench:
        await bench.malloc("a")
        disk = await bench.start("a", 4, num_queues=2, **asked)
        await disk.write(4096, DATA)
        assert await disk.read(4096, len(DATA)) == DATA
        (served,) = bench.service.disks
        assert served.device is not None
        assert Feature.UNPRIVILEGED_DEV in served.device.info.flags
        assert not served.device.info.flags & Feature.USER_RECOVERY
        saved = save(bench.service)["subsystems"]
        assert saved[1]["config"][1]["params"] == {
            "bdev_name": "a", "ublk_id": 4, "num_queues": 2, "queue_depth": 128, "unprivileged": True
        }  # fmt: skip
        assert await bench.call("ublk_stop_disk", ublk_id=4) is True
    async with open_bench(kernel=users_kernel(), target=False) as again:
        for subsystem in saved:
            for call in subsystem["config"]:
                await again.call(call["method"], **call["params"])
        assert save(again.service)["subsystems"] == saved
        await again.call("bdev_malloc_delete", name="a")
        assert await again.call("ublk_get_disks") == []


@pytest.mark.parametrize("by_service", [False, True])
async def test_life(by_service: bool) -> None:
    """As the module says: asked for with the disk, or of the service once for all."""
    await run_life(by_service=by_service)


async def test_refusals() -> None:
    """Root has none, a user has no others, and none has a recovery: each is said, and leaves no disk and no claim."""
    kernels: list[tuple[SimKernel, dict[str, Any], int, str]] = [
        (SimKernel(paranoid=True), {"unprivileged": True}, INVALID, "root's disks are never unprivileged"),
        (users_kernel(), {}, errno.EPERM, "an ordinary user can make an unprivileged one"),
        (users_kernel(), {"unprivileged": True, "recovery": "reissue"}, INVALID, "no recovery"),
        (users_kernel(), {"unprivileged": 1}, INVALID, "params.unprivileged"),
    ]
    for kernel, params, code, says in kernels:
        async with open_bench(kernel=kernel) as bench:
            await bench.malloc("a")
            with refused(code, says):
                await bench.start("a", **params)
            assert await bench.call("ublk_get_disks") == []
            assert (await bench.bdev("a"))["claimed"] is False


async def test_off_is_no_recovery() -> None:
    """What says that it has none may be started."""
    async with open_bench(kernel=users_kernel()) as bench:
        await bench.malloc("a")
        await bench.start("a", unprivileged=True, recovery="off")


# Planted bugs -----------------------------------------------------------------------------------------------------------


def it_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    start_call = methods_config._start_call

    def planted(disk: Any) -> Any:
        call = start_call(disk)
        call.params.pop("unprivileged")  # type: ignore[attr-defined]
        return call

    monkeypatch.setattr(methods_config, "_start_call", planted)


def it_has_root_s_recovery(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(**chosen: Any) -> DeviceOptions:
        return DeviceOptions(**chosen | {"recovery": "reissue"})

    monkeypatch.setattr(methods_ublk, "DeviceOptions", planted)


@pytest.mark.parametrize(("plant", "error"), [(it_is_not_saved, AssertionError), (it_has_root_s_recovery, UsageError)])
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is noticed in a disk's life."""
    plant(monkeypatch)
    with pytest.raises(error):
        trio.run(functools.partial(run_life, by_service=False))
