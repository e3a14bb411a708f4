"""A service that runs as an ordinary user has disks by call, which are that user's; and a saved configuration says so."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import trio
from trio.testing import MockClock

from tests.service.bench import INVALID, open_bench, refused
from ublk_trio import DeviceOptions, KernelUnavailableError, SimKernel, UsageError
from ublk_trio.control import Control, open_control
from ublk_trio.kernel_sim.char_device import Node
from ublk_trio.service import methods_config, methods_ublk
from ublk_trio.service.methods_config import save
from ublk_trio.uapi import DevInfo, Feature

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


class _Locked(SimKernel):
    """As a real one without the udev rule: root's alone."""

    def open_control(self) -> NoReturn:
        raise KernelUnavailableError("cannot open /dev/ublk-control: EACCES (Permission denied)", errno.EACCES)


async def test_a_driver_that_cannot_be_opened() -> None:
    """The code of a refused target is the errno of opening the driver, and the target may be asked for again."""
    async with open_bench(kernel=_Locked(), target=False) as bench:
        for _ in range(2):
            with refused(errno.EACCES, "cannot open /dev/ublk-control"):
                await bench.call("ublk_create_target")
        with refused(errno.ENOENT):
            await bench.call("ublk_destroy_target")


async def test_without_the_udev_rule(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that stays root's is EACCES, which is not the code of too many disks; the bdev is free again."""
    add_device = Control.add_device
    kernel = users_kernel()

    async def add(control: Control, info: DevInfo) -> DevInfo:
        added = await add_device(control, info)
        kernel.devices[added.dev_id].node = Node(uid=0, gid=0)
        return added

    async with open_bench(kernel=kernel, unprivileged=True) as bench:
        await bench.malloc("a")
        with monkeypatch.context() as patched:
            patched.setattr(Control, "add_device", add)
            with refused(errno.EACCES, "as root: `ublk-trio udev-rule --install`"):
                await bench.start("a", 4)
        assert await bench.call("ublk_get_disks") == []
        assert (await bench.bdev("a"))["claimed"] is False
        # Only root can take away what was begun; here it is the user who gets it after all.
        kernel.devices[4].node = Node(uid=kernel.uid, gid=kernel.gid)
        async with open_control(kernel) as control:
            await control.device_info(4)
            await control.delete_device(4)
