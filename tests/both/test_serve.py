"""What an application sees of a disk, and what is left of it, on both kernels."""

from __future__ import annotations

import errno
import logging
import random

import pytest
import trio

from tests.both.arms import Arm
from ublk_trio import (
    Backend,
    DataMode,
    Device,
    DeviceOptions,
    KernelError,
    Memory,
    StuckError,
    UsageError,
    open_target,
    serve_device,
)
from ublk_trio.control import open_control
from ublk_trio.device import already_gone_is_fine
from ublk_trio.handlers import Serve
from ublk_trio.queue import Queue
from ublk_trio.workload import Disk, Workload, WorkloadReport

MIB = 1 << 20
#: Every two of serving, mode and number of queues together: a guest takes seconds for each.
WAYS = [
    pytest.param(serve, mode, queues, id=f"{serve}-{mode.value}-{queues}q")
    for serve, mode, queues in [
        ("inline", DataMode.COPY, 1),
        ("async", DataMode.COPY, 2),
        ("inline", DataMode.GET_DATA, 2),
        ("async", DataMode.GET_DATA, 1),
        ("inline", DataMode.USER_COPY, 1),
        ("async", DataMode.USER_COPY, 2),
    ]
]


class Ram(Memory):
    """A memory disk that counts what it is asked for."""

    def __init__(self, size: int = 8 * MIB) -> None:
        super().__init__(size)
        self.calls: list[str] = []

    def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        self.calls.append("write fua" if fua else "write")
        return super().write(offset, data, fua=fua)

    def flush(self) -> None:
        self.calls.append("flush")


@pytest.mark.parametrize(("serve", "mode", "queues"), WAYS)
async def test_every_byte(arm: Arm, serve: Serve, mode: DataMode, queues: int) -> None:
    """What was written is what is read, for every operation, size and way of serving."""
    options = DeviceOptions(serve=serve, mode=mode, queues=queues, depth=16, max_io_bytes=64 * 1024, pool_buffers=3)
    with trio.fail_after(60):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(Ram(), options)
            async with arm.open_disk(device) as disk:
                report = WorkloadReport(disk=device.path)
                await Workload(seed=queues, seconds=50.0, operations=25, region_bytes=256 * 1024).run(disk, report)
                statistics = device.statistics()
    assert report.faults == []
    assert min(report.reads, report.writes, report.others, report.bytes_verified) > 0
    assert statistics.failed == 0
    assert statistics.requests >= report.reads + report.writes


async def test_kernel_adjusted_values(arm: Arm) -> None:
    """Queues and buffer size are what the kernel gave, not what was asked for."""
    with trio.fail_after(30):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(Ram(), DeviceOptions(queues=4096, depth=2))
            assert device.info.nr_hw_queues < 4096
            assert len(device.statistics().queues) == device.info.nr_hw_queues


class Zeroes(Backend):
    """A disk that can be zeroed, and nothing of it discarded."""

    def __init__(self) -> None:
        self.size = MIB
        self._memory = Memory(MIB)

    def read(self, offset: int, buffer: memoryview) -> None:
        self._memory.read(offset, buffer)

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        self._memory.write(offset, data, fua=fua)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._memory.write(offset, memoryview(bytes(length)), fua=False)


async def test_zeroing_without_discarding(arm: Arm) -> None:
    """A disk whose backend can write zeroes but not discard starts, and zeroes."""
    with trio.fail_after(30):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(Zeroes(), DeviceOptions(depth=2))
            async with arm.open_disk(device) as disk:
                await disk.write(0, b"x" * 4096)
                await disk.write_zeroes(0, 4096)
                assert await disk.read(0, 4096) == bytes(4096)


async def test_flush_and_fua_reach_the_backend(arm: Arm) -> None:
    """fsync becomes a flush, and a write that asks for FUA arrives with it: a backend with a cache can be honest."""
    backend = Ram()
    with trio.fail_after(30):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(backend)
            async with arm.open_disk(device) as disk:
                backend.calls.clear()
                await disk.write(0, bytes(4096))
                await disk.flush()
                await disk.write(4096, bytes(4096), fua=True)
                # The real kernel follows a direct write with RWF_DSYNC by a flush of its own.
                assert backend.calls[:3] == ["write", "flush", "write fua"]


async def test_read_only(arm: Arm) -> None:
    """A read-only disk reads, and refuses writes without asking the backend."""
    backend = Ram()
    with trio.fail_after(30):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(backend, DeviceOptions(read_only=True))
            async with arm.open_disk(device) as disk:
                assert await disk.read(0, 4096) == bytes(4096)
                with pytest.raises(OSError, match=r".") as caught:
                    await disk.write(0, bytes(4096))
                assert caught.value.errno in (errno.EPERM, errno.EROFS, errno.EBADF)
    assert "write" not in backend.calls


# Backends that misbehave ----------------------------------------------------------------------------------------------


class Trouble(Backend):
    """Does what its next entry of `script` says for offset 0; is an ordinary disk elsewhere."""

    def __init__(self) -> None:
        self.size = 8 * MIB
        self.data = bytearray(self.size)
        self.script: object = None
        self.hanging = trio.Event()

    async def _act(self, length: int) -> int | None:
        match self.script:
            case BaseException() as exception:
                raise exception
            case int() as count:
                return count
            case "hang":
                self.hanging.set()
                await trio.sleep_forever()
            case "slow":
                with trio.fail_after(0.01):
                    await trio.sleep_forever()
        return None

    async def read(self, offset: int, buffer: memoryview) -> int | None:
        buffer[:] = self.data[offset : offset + len(buffer)]
        return await self._act(len(buffer)) if offset == 0 else None

    async def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        self.data[offset : offset + len(data)] = data
        return await self._act(len(data)) if offset == 0 else None


class Scarce(Memory):
    """Refuses two calls of three for want of resources."""

    def __init__(self) -> None:
        super().__init__(MIB)
        self.calls = 0

    def _spend(self) -> None:
        self.calls += 1
        if self.calls % 3:
            raise OSError(errno.ENOMEM, "no resources")

    def read(self, offset: int, buffer: memoryview) -> int | None:
        self._spend()
        return super().read(offset, buffer)

    def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        self._spend()
        return super().write(offset, data, fua=fua)


@pytest.mark.parametrize(("serve", "mode", "queues"), WAYS)
async def test_backend_without_resources(arm: Arm, serve: Serve, mode: DataMode, queues: int) -> None:
    """A request that the backend has no resources for waits and is tried again: the application sees no error, and its data."""
    options = DeviceOptions(serve=serve, mode=mode, queues=queues, depth=8, pool_buffers=2, max_io_bytes=64 * 1024)
    with trio.fail_after(60):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(Scarce(), options)
            async with arm.open_disk(device) as disk:
                report = WorkloadReport(disk=device.path)
                await Workload(seed=1, seconds=40.0, operations=10, region_bytes=64 * 1024).run(disk, report)
                statistics = device.statistics()
    assert report.faults == []
    assert statistics.failed == 0
    assert sum(queue.waited_total for queue in statistics.queues) > 0
    assert sum(queue.waiting for queue in statistics.queues) == 0


@pytest.mark.parametrize(
    ("script", "seen"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.EIO, "broken"), errno.EIO),
        (OSError(errno.ENODATA, "medium"), errno.ENODATA),
        (OSError("without a number"), errno.EIO),
        (RuntimeError("a bug"), errno.EIO),
        (ExceptionGroup("nursery", [OSError(errno.ENOSPC, "full")]), errno.ENOSPC),
        (2048, errno.EIO),
        (-5, errno.EIO),
        (8192, errno.EIO),
        ("slow", errno.ETIMEDOUT),
    ],
    ids=repr,
)
async def test_failing_write(arm: Arm, script: object, seen: int, caplog: pytest.LogCaptureFixture) -> None:
    """A write that the backend fails, or does only in part, fails with the right errno, and only that one."""
    caplog.set_level(logging.CRITICAL)
    backend = Trouble()
    with trio.fail_after(30):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(backend)
            async with arm.open_disk(device) as disk:
                backend.script = script
                with pytest.raises(OSError, match=r".") as caught:
                    await disk.write(0, bytes(4096))
                assert caught.value.errno == seen
                await disk.write(4096, b"x" * 4096)
                backend.script = None
                assert await disk.read(4096, 4096) == b"x" * 4096


@pytest.mark.parametrize("mode", [DataMode.COPY, DataMode.USER_COPY])
async def test_short_read_is_asked_again(arm: Arm, mode: DataMode) -> None:
    """A short read gives the application all its bytes: the kernel asks for the rest, or the queue does where the kernel would not."""
    backend = Trouble()
    backend.data[:] = random.Random(1).randbytes(len(backend.data))
    with trio.fail_after(30):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(backend, DeviceOptions(mode=mode))
            async with arm.open_disk(device) as disk:
                backend.script = 4096
                assert await disk.read(0, 16384) == backend.data[:16384]
                backend.script = 0
                with pytest.raises(OSError, match=r".") as caught:
                    await disk.read(0, 4096)
                assert caught.value.errno == errno.EIO


class Errors:
    """What an application sees of a read that fails."""

    def __init__(self) -> None:
        self.seen: list[int | None] = []
        self._happened = trio.Event()

    async def expect(self, disk: Disk) -> None:
        try:
            await disk.read(0, 4096)
        except OSError as error:
            self.seen.append(error.errno)
        self._happened.set()

    async def wait(self) -> None:
        await self._happened.wait()


async def test_hanging_backend(arm: Arm, caplog: pytest.LogCaptureFixture) -> None:
    """A request that hangs holds up no other; stop fails it with EIO after the grace time and leaves nothing."""
    backend = Trouble()
    errors = Errors()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery, open_target(arm.kernel) as target:
            device = await target.start_device(backend, DeviceOptions(grace_seconds=0.3))
            async with arm.open_disk(device) as disk:
                backend.script = "hang"
                nursery.start_soon(errors.expect, disk)
                await backend.hanging.wait()
                await disk.write(8192, b"y" * 4096)
                assert await disk.read(8192, 4096) == b"y" * 4096
                begin = trio.current_time()
                device.ask_to_stop()
                await errors.wait()
            await target.wait_device(device)
            assert trio.current_time() - begin >= 0.3
    assert errors.seen == [errno.EIO]
    assert "not answered within the grace time" in caplog.text
    assert "READ of 4096 bytes at 0" in caplog.text


async def test_traceback_logged_once_per_kind(arm: Arm, caplog: pytest.LogCaptureFixture) -> None:
    """A bug in a backend is logged with its traceback the first time, and not a thousand times."""
    backend = Trouble()
    with trio.fail_after(30):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(backend)
            async with arm.open_disk(device) as disk:
                backend.script = ZeroDivisionError("planted")
                for _ in range(5):
                    with pytest.raises(OSError, match=r"."):
                        await disk.write(0, bytes(4096))
    records = [record for record in caplog.records if record.name == "ublk_trio.backend"]
    assert len(records) == 1
    assert records[0].exc_info is not None


# Life and death of devices --------------------------------------------------------------------------------------------


async def test_id_in_use(arm: Arm) -> None:
    """Asking for an id that is taken fails with EEXIST and a mend, and does not touch the device that has it."""
    with trio.fail_after(30):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(Ram(), DeviceOptions(dev_id=5))
            with pytest.raises(KernelError, match=r"EEXIST.*the id is in use") as caught:
                await target.start_device(Ram(), DeviceOptions(dev_id=5))
            assert caught.value.errno == errno.EEXIST
            async with arm.open_disk(device) as disk:
                await disk.write(0, b"z" * 512)
                assert await disk.read(0, 512) == b"z" * 512
            assert arm.kernel.device_ids() == [5]


@pytest.mark.parametrize("seed", range(3))
async def test_many_devices_in_any_order(arm: Arm, seed: int) -> None:
    """Eight disks start and stop in any order, one by one or all with the target."""
    chance = random.Random(seed)
    with trio.fail_after(60):
        async with open_target(arm.kernel) as target:
            live: list[Device] = []
            for _ in range(16):
                if live and (len(live) == 8 or chance.random() < 0.4):
                    await target.stop_device(live.pop(chance.randrange(len(live))))
                else:
                    live.append(await target.start_device(Ram(MIB), DeviceOptions(depth=8, queues=2)))
                assert [device.dev_id for device in target.devices] == sorted(device.dev_id for device in live)
    assert arm.kernel.device_ids() == []


async def test_error_in_the_block_comes_out_plainly(arm: Arm) -> None:
    """An error in the block is what the user gets, not a group, and the devices are gone."""
    with trio.fail_after(30):
        with pytest.raises(ZeroDivisionError):
            await _fail_in_the_block(arm)
    assert arm.kernel.device_ids() == []


async def _fail_in_the_block(arm: Arm) -> None:
    async with open_target(arm.kernel) as target:
        await target.start_device(Ram())
        raise ZeroDivisionError


async def test_cancelled_target(arm: Arm) -> None:
    """Cancelling around a target stops and deletes its devices before the scope ends."""
    with trio.fail_after(30):
        with trio.CancelScope() as scope:
            async with open_target(arm.kernel) as target:
                await target.start_device(Ram())
                await target.start_device(Ram())
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
    assert arm.kernel.device_ids() == []


async def test_serve_device_in_ones_own_nursery(arm: Arm) -> None:
    """A device is an ordinary task: `nursery.start` reports it live, cancelling the nursery takes it away."""
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            device: Device = await nursery.start(serve_device, arm.kernel, Ram(), DeviceOptions(queues=2))
            async with arm.open_disk(device) as disk:
                assert await disk.read(0, 4096) == bytes(4096)
            nursery.cancel_scope.cancel()
    assert arm.kernel.device_ids() == []


class Closing(Ram):
    """Counts openings and closings; may fail to open, or have an impossible size."""

    opened = closed = 0

    async def open(self) -> None:
        self.opened += 1

    async def aclose(self) -> None:
        self.closed += 1


async def test_failed_start_leaves_nothing(arm: Arm) -> None:
    """A start that fails half way closes what it opened."""
    backend = Closing()
    backend.size = 1000
    with trio.fail_after(30):
        async with open_target(arm.kernel) as target:
            with pytest.raises(UsageError, match="not a multiple of block_size"):
                await target.start_device(backend)
            assert arm.kernel.device_ids() == []
    assert (backend.opened, backend.closed) == (1, 1)


async def test_stopped_by_somebody_else(arm: Arm) -> None:
    """A device that another program stops through the kernel ends here too, without an error."""
    with trio.fail_after(30):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(Ram())
            async with open_control(arm.kernel) as control:
                await control.stop_device(device.dev_id)
                with already_gone_is_fine():
                    await control.delete_device(device.dev_id)
            await target.wait_device(device)
            assert target.devices == ()


async def test_bug_in_a_queue_stops_its_device_only(arm: Arm, caplog: pytest.LogCaptureFixture) -> None:
    """A queue that fails answers what it holds, its device stops cleanly, the error reaches who waits for it, others go on."""
    caplog.set_level(logging.CRITICAL)
    with trio.fail_after(30):
        async with open_target(arm.kernel) as target:
            broken = await target.start_device(Ram())
            healthy = await target.start_device(Ram())
            queue = broken._queues[0]

            def bug(request: object) -> int:
                raise KeyError("planted")

            queue.serve = bug  # type: ignore[method-assign, assignment]
            async with arm.open_disk(broken) as disk:
                with pytest.raises(OSError, match=r"."):
                    await disk.read(0, 4096)
            with pytest.raises(KeyError, match="planted"):
                await target.wait_device(broken)
            async with arm.open_disk(healthy) as disk:
                assert await disk.read(0, 4096) == bytes(4096)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (DeviceOptions(queues=0), "queues is 0: give 1 to 4096"),
        (DeviceOptions(depth=4097), "depth is 4097: give 1 to 4096"),
        (DeviceOptions(max_io_bytes=5000), "max_io_bytes is 5000: give a multiple of 4096"),
        (DeviceOptions(dev_id=-2), "the device id is -2"),
    ],
)
async def test_impossible_options(arm: Arm, options: DeviceOptions, message: str) -> None:
    """What no kernel accepts is refused before the kernel is asked, in words."""
    async with open_target(arm.kernel) as target:
        with pytest.raises(UsageError, match=message):
            await target.start_device(Ram(), options)


async def test_queue_that_cannot_fetch(
    arm: Arm, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue that fails before its tags are fetched ends the start with its error, within the bounds, and leaves nothing."""
    caplog.set_level(logging.CRITICAL)

    def bug(queue: Queue) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(Queue, "_fetch_all", bug)
    monkeypatch.setattr("ublk_trio.device.REFUSE_SECONDS", 0.2)
    with trio.fail_after(30):
        async with open_target(arm.kernel) as target:
            with pytest.raises((KeyError, StuckError)):
                await target.start_device(Ram(), DeviceOptions(grace_seconds=0.2))
            assert arm.kernel.device_ids() == []


class Returns(Trouble):
    """Gives the data back instead of filling the buffer: the most natural mistake."""

    def __init__(self, *, waits: bool) -> None:
        super().__init__()
        self.waits = waits

    async def read(self, offset: int, buffer: memoryview) -> int | None:
        if self.waits:
            await trio.lowlevel.checkpoint()
        return bytes(len(buffer))  # type: ignore[return-value]


@pytest.mark.parametrize("waits", [False, True])
async def test_wrong_result(arm: Arm, waits: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A method that returns the wrong thing fails the request, and the log says how to mend it."""
    with trio.fail_after(30):
        async with open_target(arm.kernel) as target:
            device = await target.start_device(Returns(waits=waits))
            async with arm.open_disk(device) as disk:
                with pytest.raises(OSError, match=r"."):
                    await disk.read(0, 4096)
    assert "the method returned bytes: fill the buffer in place" in caplog.text


async def test_not_a_backend(arm: Arm) -> None:
    """What is not a backend is refused in words; so is a start in a target that has ended."""

    class PlainOpen(Ram):
        def open(self) -> None:  # type: ignore[override]
            pass

    async with open_target(arm.kernel) as target:
        for wrong, message in ((Ram, "is not a backend"), (PlainOpen(), "open must be `async def`")):
            with pytest.raises(UsageError, match=message):
                await target.start_device(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the target is closed"):
        await target.start_device(Ram())


def test_unknown_choices() -> None:
    """A mode or a way of serving that is not known is an error, never another one."""
    with pytest.raises(UsageError, match="mode is 'copi': known are copy, get-data, user-copy"):
        DeviceOptions(mode="copi")
    with pytest.raises(UsageError, match="serve is 'asinc': known are inline, async"):
        DeviceOptions(serve="asinc").check(page_size=4096)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="depth is '8': give 1 to 4096"):
        DeviceOptions(depth="8").check(page_size=4096)  # type: ignore[arg-type]


async def test_stopped_by_somebody_else_who_takes_the_id(arm: Arm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that another program deletes does not, on its way out, delete the next one that gets its id."""
    taken = trio.Event()
    delete = Device._delete

    async def delete_late(device: Device, dev_id: int) -> None:
        await taken.wait()
        await delete(device, dev_id)

    with trio.fail_after(30):
        async with (
            open_target(arm.kernel) as target,
            open_target(arm.kernel) as other,
            open_control(arm.kernel) as control,
        ):
            first = await target.start_device(Ram(MIB), DeviceOptions(depth=4))
            with monkeypatch.context() as patch:
                patch.setattr(Device, "_delete", delete_late)
                await control.stop_device(first.dev_id)
                with already_gone_is_fine():
                    await control.delete_device(first.dev_id)
                second = await other.start_device(Ram(MIB), DeviceOptions(dev_id=first.dev_id, depth=4))
                taken.set()
                await target.wait_device(first)
            async with arm.open_disk(second) as disk:
                assert await disk.read(0, 4096) == bytes(4096)
