"""A target with workers: threads pinned to their CPUs serve every byte, and none is left, however the target ends."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from pathlib import Path

import pytest
import trio

from tests.kernel.leftovers import Leftovers
from tests.kernel.programs import RELEASE, Load, exists, fio_verify, make_file, operated_server, run, wait_until
from tests.kernel.test_remote_calls import Client, read, write
from ublk_trio import (
    DataMode,
    Device,
    DeviceOptions,
    File,
    KernelError,
    Memory,
    RealKernel,
    Recovery,
    Target,
    open_target,
)
from ublk_trio.control import open_control

MIB = 1 << 20
#: A guest has two. Where there is more than one, there is more than one worker.
CPUS = sorted(os.sched_getaffinity(0))[:2]
MASK = f"{sum(1 << cpu for cpu in CPUS):#x}"


def status_of(pid: int, thread_id: int) -> dict[str, str]:
    """What the kernel says of a thread."""
    lines = Path(f"/proc/{pid}/task/{thread_id}/status").read_text(encoding="ascii").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def workers_of(pid: int) -> dict[str, dict[str, str]]:
    """The workers of a process, by name. A thread that was waited for is still listed for a moment."""
    found = {}
    for path in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = status_of(pid, int(path.name))
            if status["Name"].startswith("ublk-cpu"):
                found[status["Name"]] = status
    return found


def check_pinned(pid: int) -> None:
    """One worker for each CPU, there and nowhere else, which takes no signals."""
    workers = workers_of(pid)
    assert sorted(workers) == [f"ublk-cpu{cpu}" for cpu in CPUS]
    for cpu in CPUS:
        status = workers[f"ublk-cpu{cpu}"]
        assert status["Cpus_allowed_list"] == str(cpu)
        # All but SIGKILL, SIGSTOP and the two that the C library keeps to itself.
        ours = sum(1 << number - 1 for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
        assert int(status["SigBlk"], 16) & ours == ours


def placement(device: Device) -> list[int | None]:
    return [queue.cpu for queue in device.statistics().queues]


async def use_every_queue(device: Device) -> None:
    """Read from each CPU: each has one of the queues, and each queue has some."""
    for cpu in sorted(os.sched_getaffinity(0)):
        await run(
            "taskset", "-c", str(cpu), "dd", f"if={device.path}", "of=/dev/null", "bs=64K", "count=4", "iflag=direct"
        )


async def test_every_byte() -> None:
    """fio's bytes are right in every mode; queues are on the workers in turn, device after device; each worker does its part."""
    async with open_target(RealKernel(), cpus=CPUS) as target:
        assert [worker.cpu for worker in target.workers] == CPUS
        check_pinned(os.getpid())
        first = await target.start_device(Memory(32 * MIB), DeviceOptions(queues=1, serve="inline"))
        options = DeviceOptions(queues=2, serve="async", mode=DataMode.GET_DATA, pool_buffers=4)
        pooled = await target.start_device(Memory(32 * MIB), options)
        assert pooled.info.nr_hw_queues == len(CPUS)
        assert placement(first) == CPUS[:1]
        assert placement(pooled) == (CPUS[1:] + CPUS)[: len(CPUS)]
        await target.stop_device(first)
        copied = await target.start_device(Memory(32 * MIB), DeviceOptions(queues=2, serve="inline"))
        options = DeviceOptions(queues=2, serve="inline", mode=DataMode.USER_COPY, pool_buffers=4)
        moved = await target.start_device(Memory(32 * MIB), options)
        for device in (pooled, copied, moved):
            await fio_verify(device.path)
            await use_every_queue(device)
            assert all(queue.requests for queue in device.statistics().queues)
    await wait_until(lambda: workers_of(os.getpid()) == {})


@pytest.mark.any_kernel
async def test_a_fork_has_no_workers() -> None:
    """A forked child has none of these threads: there closing a worker and its rings returns at once, and here all goes on."""
    async with open_target(RealKernel(), cpus=CPUS) as target:
        device = await target.start_device(Memory(MIB), DeviceOptions(queues=2))
        child = os.fork()
        if child == 0:
            # Ends a child that waits; SIGALRM's usual effect.
            signal.alarm(30)
            try:
                for queue in device._queues:
                    queue.ring.close()
                for worker in target.workers:
                    worker.close()
                os._exit(0)
            finally:
                os._exit(1)
        _, status = await trio.to_thread.run_sync(os.waitpid, child, 0)
        assert status == 0
        check_pinned(os.getpid())
        assert await trio.to_thread.run_sync(read, device.path, MIB) == bytes(MIB)


async def test_a_cpu_that_there_is_not() -> None:
    """It is EINVAL in one line, and those workers that were there already end."""
    before = Leftovers.look()
    with pytest.raises(KernelError, match="CPU 4095") as raised:
        async with open_target(RealKernel(), cpus=[*CPUS, 4095]):
            pass
    assert raised.value.errno == errno.EINVAL
    assert "\n" not in str(raised.value)
    assert before.wait_for_new() == []


async def _released_and_recovered(target: Target, device: Device, image: Path) -> Device:
    dev_id = device.dev_id
    await target.release_device(device)
    return await target.recover_device(dev_id, File(image))


async def test_ends_under_load(tmp_path: Path) -> None:
    """A device that is stopped, and one whose target is cancelled, answer all and leave nothing; one that is released loses no byte."""
    image = make_file(tmp_path / "image", 16 * MIB)
    with trio.fail_after(300):
        async with trio.open_nursery() as nursery, open_target(RealKernel(), cpus=CPUS) as target:
            options = DeviceOptions(queues=2, depth=16, max_io_bytes=64 * 1024)
            stopped = await target.start_device(Memory(16 * MIB), options)
            load = Load(stopped.path)
            await nursery.start(load.run)
            await target.stop_device(stopped)
            await load.ended.wait()
            load.check_disk_went_away()

            kept = DeviceOptions(queues=2, depth=16, max_io_bytes=64 * 1024, recovery=Recovery.REISSUE)
            device = await target.start_device(File(image), kept)
            await trio.to_thread.run_sync(write, device.path, b"kept" * 1024)
            # Before, the driver warns when a disk is taken over from a thread that still runs, as it does within one process.
            if RELEASE >= (6, 15):
                device = await _released_and_recovered(target, device, image)
            assert {queue.cpu for queue in device.statistics().queues} == set(CPUS)
            assert await trio.to_thread.run_sync(read, device.path, 4096) == b"kept" * 1024

            cancelled = Load(device.path)
            await nursery.start(cancelled.run)
            target._nursery.cancel_scope.cancel()
        cancelled.check_disk_went_away()
    await wait_until(lambda: workers_of(os.getpid()) == {})


async def test_killed_server(tmp_path: Path) -> None:
    """A server that is killed under load leaves a disk to remove; another one takes over a disk that may outlive its server."""
    with trio.fail_after(300):
        await _killed_and_recovered(str(tmp_path / "rpc.sock"), make_file(tmp_path / "image", 16 * MIB))


async def _killed_and_recovered(socket: str, image: Path) -> None:
    async with operated_server(socket) as server, trio.open_nursery() as nursery:
        client = Client(socket)
        await client("bdev_aio_create", name="a", filename=str(image))
        await client.malloc("m", 16 * MIB)
        await client("ublk_create_target", cpumask=MASK)
        check_pinned(server.pid)
        await client("ublk_start_disk", bdev_name="a", ublk_id=6, num_queues=2)
        await trio.to_thread.run_sync(write, "/dev/ublkb6", b"kept" * 1024)
        await client("ublk_start_disk", bdev_name="m", ublk_id=7, num_queues=2, recovery="off")
        load = Load("/dev/ublkb7")
        # 6.12's io_uring dereferenced a null pointer (io_fallback_tw) when busy workers were killed.
        if RELEASE >= (6, 15):
            await nursery.start(load.run)
        server.process.kill()
        assert await server.wait() == -signal.SIGKILL
    if RELEASE >= (6, 15):
        load.check_disk_went_away()
    async with open_control(RealKernel()) as control:
        await control.stop_device(7)
        await control.delete_device(7)
    async with operated_server(socket) as server:
        client = Client(socket)
        await client("bdev_aio_create", name="a", filename=str(image))
        await client("ublk_create_target", cpumask=MASK)
        assert await client("ublk_recover_disk", bdev_name="a", ublk_id=6) == 6
        assert await trio.to_thread.run_sync(read, "/dev/ublkb6", 4096) == b"kept" * 1024
        await client("ublk_destroy_target")
        await wait_until(lambda: workers_of(server.pid) == {})
        assert not exists("/dev/ublkb6")
