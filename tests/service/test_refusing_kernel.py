"""Where the kernel refuses a step, its errno is what the client gets, nothing is left, and the next try does what was asked for."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
import trio.testing

from tests.service.bench import open_bench, refused
from ublk_trio import BackendError, KernelError
from ublk_trio.control import Control, open_control
from ublk_trio.kernel_sim.kernel import SimKernel
from ublk_trio.kernel_sim.ring import SimCharDevice, SimQueueRing
from ublk_trio.ring import EVENT
from ublk_trio.service.disks import Disks


@contextmanager
def refusing(owner: type, method: str, *, number: int, at_call: int = 1) -> Iterator[None]:
    """That call of the method fails with that errno; those before and after it do not."""
    calls = 0
    usual: Callable[..., Any] = getattr(owner, method)

    def replaced(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise KernelError(number, f"{method}: {errno.errorcode[number]}")
        return usual(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, replaced)
        yield
    assert calls >= at_call, "it was called"


#: Each step of a start: whose method it is, which call of it fails, and how.
STEPS = [
    (Control, "add_device", 1, errno.ENOMEM),
    (Control, "set_params", 1, errno.EINVAL),
    (SimKernel, "open_char_device", 1, errno.EMFILE),
    (SimCharDevice, "open_queue", 1, errno.ENOMEM),
    (SimCharDevice, "open_queue", 2, errno.ENOMEM),
    (Control, "start_device", 1, errno.ENOMEM),
]


async def check_start(owner: type, method: str, at_call: int, number: int) -> None:
    async with open_bench() as bench:
        await bench.malloc("a")
        with refusing(owner, method, number=number, at_call=at_call), refused(number, errno.errorcode[number]):
            await bench.start("a", 3, num_queues=2)
        assert await bench.call("ublk_get_disks") == []
        assert (await bench.bdev("a"))["claimed"] is False
        assert bench.kernel.device_ids() == []
        disk = await bench.start("a", 3, num_queues=2)
        await disk.write(0, b"x" * 4096)
        assert await disk.read(0, 4096) == b"x" * 4096


@pytest.mark.parametrize(("owner", "method", "at_call", "number"), STEPS)
async def test_a_start_that_is_refused(owner: type, method: str, at_call: int, number: int) -> None:
    """At each step; the id and the bdev are free again."""
    await check_start(owner, method, at_call, number)


async def test_a_stop_that_is_refused(caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock) -> None:
    """The log says so, and the disk goes all the same, within its bounds: its id and its bdev can be used again."""
    async with open_bench() as bench:
        await bench.malloc("a")
        await bench.start("a", 3)
        with refusing(Control, "stop_device", number=errno.EIO), trio.fail_after(60):
            assert await bench.call("ublk_stop_disk", ublk_id=3) is True
        assert "device 3: cannot be stopped" in caplog.text
        with refused(errno.ENODEV):
            await bench.call("ublk_stop_disk", ublk_id=3)
        await bench.start("a", 3)
        assert await bench.call("ublk_stop_disk", ublk_id=3) is True


async def test_a_deletion_that_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever stopped the disk is told; its bdev is free, and the kernel's device is the only thing that is left."""
    async with open_bench() as bench:
        await bench.malloc("a")
        await bench.start("a", 3)
        with refusing(Control, "delete_device", number=errno.EIO), refused(errno.EIO, "delete_device"):
            await bench.call("ublk_stop_disk", ublk_id=3)
        assert await bench.call("ublk_get_disks") == []
        assert (await bench.bdev("a"))["claimed"] is False
        async with open_control(bench.kernel) as control:
            await control.delete_device(3)


async def test_a_fetch_that_is_refused(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A completion that is neither a request nor the end: the disk stops and the log says why; other disks go on."""
    usual = SimQueueRing.reap
    async with open_bench() as bench:
        await bench.malloc("a", "b")
        disk, other = await bench.start("a", 0), await bench.start("b", 1)

        def reap(ring: SimQueueRing) -> memoryview:
            events = [list(event) for event in EVENT.iter_unpack(usual(ring))]
            if events and ring is broken:
                events[0][2] = -errno.EINVAL
            return memoryview(b"".join(EVENT.pack(*event) for event in events))

        broken: Any = bench.service.disks.get(0).device._queues[0].ring  # type: ignore[union-attr]
        monkeypatch.setattr(SimQueueRing, "reap", reap)
        with pytest.raises(OSError, match="Input/output error"):
            await disk.read(0, 4096)
        await trio.testing.wait_all_tasks_blocked()
        assert "refused a command for queue 0" in caplog.text
        assert [shown["id"] for shown in await bench.call("ublk_get_disks")] == [1]
        assert (await bench.bdev("a"))["claimed"] is False
        assert await other.read(0, 4096) == bytes(4096)


# Planted bugs -----------------------------------------------------------------------------------------------------------


async def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that stays in the table when its start failed is noticed."""
    monkeypatch.setattr(Disks, "_forget", lambda disks, disk: disk.gone.set())
    with pytest.raises(BackendError, match="disk 3 is there already"):
        await check_start(*STEPS[-1])
