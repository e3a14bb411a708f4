"""What remote calls inject into a bdev is what the applications of its disk see, by kind and count, on both kernels."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from tests.both.arms import Arm
from ublk_trio.backends import ErrorInjection
from ublk_trio.backends import error_injection as module
from ublk_trio.rpc import Dispatcher
from ublk_trio.service.disks import Disk as ServedDisk
from ublk_trio.service.methods import METHODS
from ublk_trio.service.service import open_service
from ublk_trio.workload import Disk

MIB = 1 << 20
BLOCK = 4096


@attrs.frozen
class Bench:
    """A disk of a bdev into which errors can be injected."""

    #: The application's end.
    disk: Disk
    served: ServedDisk
    errors: ErrorInjection
    dispatcher: Dispatcher

    async def call(self, method: str, **params: Any) -> Any:
        return await self.dispatcher.call(method, params)

    async def inject(self, io_type: str, error_type: str, **params: Any) -> None:
        await self.call("bdev_error_inject_error", name="EE_a", io_type=io_type, error_type=error_type, **params)

    async def failures(self) -> dict[str, int]:
        """By errno, as the bdev counts them; counted anew from now on."""
        (counted,) = (await self.call("bdev_get_iostat", name="EE_a", reset_mode="all"))["bdevs"]
        failures: dict[str, int] = counted["io_error"]
        return failures

    def waited(self) -> int:
        assert self.served.device is not None
        return sum(queue.waited_total for queue in self.served.device.statistics().queues)

    def requests(self) -> dict[str, Callable[[], Awaitable[object]]]:
        """Each kind of request that a bdev knows, as an application makes it: one."""
        return {
            "read": lambda: self.disk.read(0, BLOCK),
            "write": lambda: self.disk.write(0, bytes(BLOCK)),
            "flush": self.disk.flush,
            "unmap": lambda: self.disk.discard(0, BLOCK),
            "write_zeroes": lambda: self.disk.write_zeroes(0, BLOCK),
        }


@asynccontextmanager
async def open_bench(arm: Arm, directory: Path) -> AsyncIterator[Bench]:
    image = directory / "image"
    image.write_bytes(bytes(range(256)) * (MIB // 256))
    with trio.fail_after(180):
        async with open_service(arm.kernel) as service:
            dispatcher = Dispatcher()
            dispatcher.register(METHODS, service)
            await dispatcher.call("bdev_aio_create", {"name": "a", "filename": str(image), "fallocate": True})
            await dispatcher.call("bdev_error_create", {"base_name": "a"})
            await dispatcher.call("ublk_create_target", {})
            await dispatcher.call("ublk_start_disk", {"bdev_name": "EE_a"})
            (served,) = service.disks
            errors = service.registry.get("EE_a").backend
            assert served.device is not None
            assert isinstance(errors, ErrorInjection)
            async with arm.open_disk(served.device) as disk:
                yield Bench(disk, served, errors, dispatcher)


async def outcome(request: Callable[[], Awaitable[object]]) -> int:
    """The errno that an application gets, 0 for none."""
    try:
        await request()
    except OSError as error:
        return error.errno or -1
    return 0


async def check_failures(bench: Bench) -> None:
    """So many requests of the kind that was asked for fail, with EIO, and no others."""
    await bench.failures()
    for kind, request in bench.requests().items():
        await bench.inject(kind, "failure", num=2)
        others = [await outcome(other) for name, other in bench.requests().items() if name != kind]
        assert others == [0, 0, 0, 0], f"only {kind} was to fail"
        seen = [await outcome(request) for _ in range(3)]
        assert seen == [errno.EIO, errno.EIO, 0], kind
        assert await bench.failures() == {"EIO": 2}
    await bench.inject("all", "failure", num=1)
    for kind, request in bench.requests().items():
        assert [await outcome(request) for _ in range(2)] == [errno.EIO, 0], kind
    await bench.inject("all", "failure", num=9)
    await bench.inject("clear", "failure")
    assert [await outcome(request) for request in bench.requests().values()] == [0, 0, 0, 0, 0]


async def check_out_of_resources(bench: Bench) -> None:
    """A request whose backend is out of resources so many times waits, is carried out, and fails for nobody."""
    await bench.failures()
    waited = bench.waited()
    for kind, request in bench.requests().items():
        await bench.inject(kind, "nomem", num=3)
        assert await outcome(request) == 0, kind
        assert await bench.failures() == {"ENOMEM": 3}, kind
    assert bench.waited() == waited + 5


async def check_pending(bench: Bench) -> None:
    """A request that is made to hang does, others go on, and it fails with EIO when that is cleared."""
    seen: list[int] = []

    async def hang() -> None:
        seen.append(await outcome(lambda: bench.disk.read(0, BLOCK)))

    await bench.inject("read", "pending", num=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hang)
        while not bench.errors.pending:  # noqa: ASYNC110 - there is no event to wait for
            await trio.sleep(0.01)
        assert await outcome(lambda: bench.disk.read(BLOCK, BLOCK)) == 0
        assert seen == []
        await bench.inject("clear", "pending")
    assert seen == [errno.EIO]


async def check_corrupted_data(bench: Bench) -> None:
    """One byte of one read is another one, and of the next none is; one that is written wrong stays so."""
    right = await bench.disk.read(0, BLOCK)
    wrong = right[:9] + bytes([right[9] ^ 0x55]) + right[10:]
    await bench.inject("read", "corrupt_data", num=1, corrupt_offset=9, corrupt_value=0x55)
    assert [await bench.disk.read(0, BLOCK) for _ in range(2)] == [wrong, right]
    await bench.inject("write", "corrupt_data", num=1, corrupt_offset=9, corrupt_value=0x55)
    await bench.disk.write(0, right)
    assert await bench.disk.read(0, BLOCK) == wrong


CHECKS = [check_corrupted_data, check_failures, check_out_of_resources, check_pending]


async def test_seen_as_injected(arm: Arm, tmp_path: Path) -> None:
    """Failures, hanging, corrupted data, missing resources: each is seen by the application as it was asked for."""
    async with open_bench(arm, tmp_path) as bench:
        for check in CHECKS:
            await check(bench)


# Planted bugs -----------------------------------------------------------------------------------------------------------


def one_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ErrorInjection.inject

    def planted(errors: ErrorInjection, io_type: module.IoType, error_type: module.ErrorType, **params: int) -> None:
        real(errors, io_type, error_type, **{**params, "num": params["num"] - 1})

    monkeypatch.setattr(ErrorInjection, "inject", planted)


def of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ErrorInjection._take

    def planted(errors: ErrorInjection, io_type: str) -> object:
        return real(errors, "discard" if io_type == "flush" else io_type)

    monkeypatch.setattr(ErrorInjection, "_take", planted)


@pytest.mark.parametrize("plant", [one_too_few, of_another_kind], ids=lambda plant: str(plant.__name__))
async def test_a_planted_bug_is_found(
    arm: Arm, tmp_path: Path, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One failure too few, and a flush that fails for a discard, are noticed."""
    plant(monkeypatch)
    async with open_bench(arm, tmp_path) as bench:
        with pytest.raises(AssertionError):
            await check_failures(bench)
