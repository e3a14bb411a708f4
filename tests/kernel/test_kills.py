"""kill -9 of one server after the other while fio writes and verifies: each way of recovery keeps what it promises.

So often: `UBLK_TRIO_KILLS=20`; by default a few times.

Before Linux 6.15 the driver follows freed memory when a server dies just while it is being handed a request. There the server is
killed when it has all that fio asks for at once, so that nothing is on its way.
"""

from __future__ import annotations

import errno
import functools
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.kernel.forked_servers import ForkedServer, ForkedServers, forked_servers
from tests.kernel.programs import RELEASE, Load, exists, make_file, requests_done, wait_until
from tests.kernel.test_recovery import kernel_has
from ublk_trio import Backend, DeviceOptions, File, RealKernel, Recovery
from ublk_trio.backends import Delay
from ublk_trio.backends.base import Result
from ublk_trio.control import open_control
from ublk_trio.uapi import DeviceState, Feature

KILLS = int(os.environ.get("UBLK_TRIO_KILLS", "3"))
SIZE = 8 << 20
#: Bytes that fio writes, then verifies, then writes again.
REGION = 4 << 20
#: As deep as fio goes, and a queue twice that: a queue that has no idle tag left learns of its server's end 30 s late before 6.15.
LOAD_DEPTH = 16
DEPTH = 2 * LOAD_DEPTH
#: Microseconds by which a server that will be killed is late with each write: so it holds some whenever it is killed.
LATE_US = 400_000


#: Errors that do not end fio, in its notation: of reads, then of writes.
NOTED = f"{errno.EIO}:{errno.EREMOTEIO}"


class VerifiedWrites(Load):
    """fio: writes a region in blocks at random, verifies it, and begins again, until it is interrupted.

    Each block has a number of its own, so that one of an earlier round is not right any more. What fails with an I/O error is
    noted, and not expected to be there; a block that is wrong ends it.
    """

    pattern = (
        *("--rw=randwrite", "--bs=4K", f"--size={REGION}", "--loops=1000000"),
        *("--verify=crc32c", "--verify_fatal=1", "--continue_on_error=io", f"--ignore_error={NOTED},{NOTED}"),
        "--error_dump=1",
    )

    def errors(self) -> Counter[str]:
        """How many requests failed, by the text of their errno."""
        return Counter(re.findall(r"io_u error on file \S+: ([^:]+):", self.output))


def late(backend: Backend) -> Backend:
    return Delay(backend, avg_read_us=0, p99_read_us=0, avg_write_us=LATE_US, p99_write_us=LATE_US)


def late_file(path: str) -> Backend:
    return late(File(path))


async def state_of(dev_id: int) -> DeviceState:
    async with open_control(RealKernel()) as control:
        return (await control.device_info(dev_id)).state


def _counts(disk: str, file: str) -> list[int]:
    return [int(word) for word in Path("/sys/block", Path(disk).name, file).read_text(encoding="ascii").split()]


def writes_in_flight(disk: str) -> int:
    return _counts(disk, "inflight")[1]


def bytes_read(disk: str) -> int:
    return _counts(disk, "stat")[2] * 512


async def _kill(server: ForkedServer, load: Load) -> None:
    """With writes in its hands."""
    handed_over = 1 if RELEASE >= (6, 15) else LOAD_DEPTH
    with trio.fail_after(60):
        while load.is_running:
            if writes_in_flight(server.disk) >= handed_over:
                before = requests_done(server.disk)
                await trio.sleep(LATE_US / 4e6 if handed_over > 1 else 0)
                # Nothing was answered meanwhile, so that fio had nothing to ask for: all is in the server's hands.
                if requests_done(server.disk) == before:
                    break
            await trio.sleep(0.01)
    await server.kill()


async def _pause_with_writes_in_flight(server: ForkedServer, load: Load) -> None:
    while load.is_running:
        await wait_until(lambda: writes_in_flight(server.disk) > 0 or not load.is_running)
        await load.pause()
        if writes_in_flight(server.disk) > 0:
            return
        load.resume()


async def _fail_some(load: Load) -> None:
    """Let a load that is paused ask for a little, a moment at a time: where all fails it gives up after a whole round of that."""
    before = requests_done(load.disk)
    while load.is_running and requests_done(load.disk) < before + LOAD_DEPTH:
        load.resume()
        await trio.sleep(0.01)
        await load.pause()


async def _verified_through_kills(
    servers: ForkedServers,
    kills: int,
    recovery: Recovery,
    make: Callable[[], Backend],
    make_last: Callable[[], Backend],
) -> VerifiedWrites:
    """The load after so many kills, a whole round of it after the last one."""
    server = await servers.start(make, DeviceOptions(queues=2, depth=DEPTH, max_io_bytes=65536, recovery=recovery))
    disk, dev_id = server.disk, server.dev_id
    load = VerifiedWrites(disk)

    async def progress(done: Callable[[str], int], much: int) -> None:
        before = done(disk)
        await wait_until(lambda: done(disk) >= before + much or not load.is_running, seconds=180)

    async with trio.open_nursery() as nursery:
        await nursery.start(load.run)
        for left in reversed(range(kills)):
            await progress(requests_done, 2 * LOAD_DEPTH)
            if recovery is Recovery.FAIL:
                await _pause_with_writes_in_flight(server, load)
                await server.kill()
                await wait_until_without_server(dev_id, DeviceState.FAIL_IO)
                await _fail_some(load)
            else:
                await _kill(server, load)
            server = await servers.start(make if left else make_last, DeviceOptions(), recovers=dev_id)
            load.resume()
        # What remains of a round that the last kill was in, and a whole one.
        await progress(bytes_read, 2 * REGION)
        if load.is_running:
            load.interrupt()
    await server.stop()
    assert not exists(disk)
    return load


async def wait_until_without_server(dev_id: int, state: DeviceState) -> None:
    """The kernel has noticed that the server is gone."""
    with trio.fail_after(60):
        while await state_of(dev_id) is not state:  # noqa: ASYNC110 - there is no event to wait for
            await trio.sleep(0.05)


def check(load: VerifiedWrites, recovery: Recovery, kills: int) -> None:
    """Every block that fio verified was right, and what failed is what the recovery promises."""
    assert load.code in (0, 128), load.output
    assert "terminating on signal 2" in load.output, load.output
    # That of what failed first, unless a block was wrong: then that is it.
    assert load.error in (0, errno.EIO, errno.EREMOTEIO), load.output
    assert "verify" not in load.output, load.output
    errors = load.errors()
    eio, remote = (errors.pop(os.strerror(number), 0) for number in (errno.EIO, errno.EREMOTEIO))
    assert not errors
    assert remote == 0 if recovery is not Recovery.FAIL else remote >= kills
    if recovery is Recovery.REISSUE:
        assert eio == 0
    elif recovery is Recovery.REQUEUE:
        assert kills <= eio <= kills * LOAD_DEPTH
    else:
        # In the moment until the kernel has noticed, more than what the server held.
        assert kills <= eio


@pytest.mark.parametrize("recovery", [Recovery.REQUEUE, Recovery.REISSUE, Recovery.FAIL])
async def test_verified_through_kills(tmp_path: Path, recovery: Recovery, capsys: pytest.CaptureFixture[str]) -> None:
    """However often the server is killed, what fio wrote is there, and only what the mode says fails: nothing with reissue."""
    if recovery is Recovery.FAIL and not await kernel_has(Feature.USER_RECOVERY_FAIL_IO):
        return  # tests/kernel/test_recovery.py has what is said then
    image = str(make_file(tmp_path / "image", SIZE))
    async with forked_servers() as servers:
        load = await _verified_through_kills(
            servers, KILLS, recovery, functools.partial(late_file, image), functools.partial(File, image)
        )
    check(load, recovery, KILLS)
    with capsys.disabled():
        failed = ", ".join(f"{count} x {text}" for text, count in sorted(load.errors().items())) or "none"
        print(f" {KILLS} kills, {failed} of fio's requests failed", end=" ")


# Planted bugs -----------------------------------------------------------------------------------------------------------


class Forgetful(File):
    """A write is answered before it is done: the last ones are lost with the process, more than those that fio still waits for."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._undone: list[tuple[int, bytes]] = []

    def write(self, offset: int, data: memoryview, *, fua: bool) -> int | None:
        self._undone.append((offset, bytes(data)))
        if len(self._undone) > 2 * LOAD_DEPTH:
            first, late = self._undone.pop(0)
            super().write(first, memoryview(late), fua=fua)
        return None

    def read(self, offset: int, buffer: memoryview) -> Result:
        for first, late in self._undone:
            super().write(first, memoryview(late), fua=False)
        self._undone.clear()
        return super().read(offset, buffer)


def late_forgetful(path: str) -> Backend:
    return late(Forgetful(path))


@pytest.mark.parametrize("bug", ["lost-writes", "reissued"])
async def test_a_planted_bug_is_found(tmp_path: Path, bug: str) -> None:
    """A backend that loses writes with its process, and a disk that reissues what it should fail, are noticed."""
    image = str(make_file(tmp_path / "image", SIZE))
    make: Callable[[], Backend] = functools.partial(late_forgetful if bug == "lost-writes" else late_file, image)
    async with forked_servers() as servers:
        load = await _verified_through_kills(servers, 1, Recovery.REISSUE, make, functools.partial(File, image))
    with pytest.raises(AssertionError):
        check(load, Recovery.REISSUE if bug == "lost-writes" else Recovery.REQUEUE, 1)
