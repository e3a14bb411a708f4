"""Every control command in every state of a device, on the two releases that the project is tested on."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.sim.mini import Machine, RawQueue, basic_params, machine
from ublk_trio.kernel_sim import SimKernel
from ublk_trio.kernel_sim.linux_errno import ENOTSUPP
from ublk_trio.uapi import ControlCommand, DeviceState, DevInfo, Feature, Params

R, REISSUE, FAIL_IO = Feature.USER_RECOVERY, Feature.USER_RECOVERY_REISSUE, Feature.USER_RECOVERY_FAIL_IO
RECOVERS = R | REISSUE | Feature.QUIESCE
DEV_ID = 1
DEPTH = 2


class Situation:
    """A machine with one device, and its server."""

    def __init__(self, m: Machine, nursery: trio.Nursery) -> None:
        self.m = m
        self.nursery = nursery
        self.kernel = m.kernel

    async def add(self, flags: Feature = RECOVERS) -> None:
        await self.m.add(DEV_ID, depth=DEPTH, flags=flags)

    async def configure(self, flags: Feature = RECOVERS) -> None:
        await self.add(flags)
        assert await self.m.set_params(DEV_ID, basic_params()) == 0

    async def open(self) -> None:
        self.char = await self.kernel.open_char_device(await self.m.info(DEV_ID), ioctl_encoded=True)
        self.ring = self.char.open_queue(0, buffers=DEPTH)
        self.queue = RawQueue(self.ring)

    async def fetch(self, flags: Feature = RECOVERS) -> None:
        await self.configure(flags)
        await self.open()
        self.queue.fetch_all()

    async def live(self, flags: Feature = RECOVERS) -> None:
        await self.fetch(flags)
        assert await self.m.start(DEV_ID) == 0

    def close(self) -> None:
        self.ring.close()
        self.char.close()

    async def send(self, command: int, *, data: int = 0, buffer: bytearray | None = None) -> int | None:
        """The result, or None when the kernel holds the command."""
        results: list[int] = []

        async def run() -> None:
            results.append(await self.m.command(command, DEV_ID, data=data, buffer=buffer))  # type: ignore[arg-type]

        self.nursery.start_soon(run)
        await wait_all_tasks_blocked()
        return results[0] if results else None


async def absent(s: Situation) -> None:
    """No such device."""


async def added(s: Situation) -> None:
    await s.add()


async def configured(s: Situation) -> None:
    await s.configure()


async def fetched(s: Situation) -> None:
    await s.fetch()


async def live(s: Situation) -> None:
    await s.live()


async def plain(s: Situation) -> None:
    """Live, without user recovery."""
    await s.live(Feature(0))


async def dead(s: Situation) -> None:
    """Its server died, without user recovery."""
    await s.live(Feature(0))
    s.kernel.crash_server(DEV_ID)


async def stopped(s: Situation) -> None:
    """With its server still there."""
    await s.live()
    assert await s.m.stop(DEV_ID) == 0


async def quiescing(s: Situation) -> None:
    """QUIESCE_DEV came, and the server has not closed its char device."""
    await s.live()
    assert await s.m.command(ControlCommand.QUIESCE_DEV, DEV_ID) == 0


async def quiesced(s: Situation) -> None:
    await s.live()
    s.kernel.crash_server(DEV_ID)


async def failing(s: Situation) -> None:
    """FAIL_IO."""
    await s.live(R | FAIL_IO | Feature.QUIESCE)
    s.kernel.crash_server(DEV_ID)


async def recovering(s: Situation) -> None:
    """The next server has fetched its tags."""
    await quiesced(s)
    assert await s.m.command(ControlCommand.START_USER_RECOVERY, DEV_ID) == 0
    await s.open()
    s.queue.fetch_all()


async def deleted(s: Situation) -> None:
    """DEL_DEV waits for the server to close its char device."""
    await s.live()
    assert await s.send(ControlCommand.DEL_DEV) is None


STATES: dict[str, Callable[[Situation], Awaitable[None]]] = {
    state.__name__: state
    for state in (
        absent,
        added,
        configured,
        fetched,
        live,
        plain,
        dead,
        stopped,
        quiescing,
        quiesced,
        failing,
        recovering,
        deleted,
    )
}
UNKNOWN = 0x7F


async def send(s: Situation, command: int) -> str:
    """The command, with arguments that are right; its result in words."""
    info = DevInfo(dev_id=DEV_ID, nr_hw_queues=1, queue_depth=DEPTH, max_io_buf_bytes=65536)
    data, buffer = 0, None
    match command:
        case ControlCommand.ADD_DEV:
            buffer = bytearray(info.pack())
        case ControlCommand.GET_DEV_INFO:
            buffer = bytearray(64)
        case ControlCommand.GET_DEV_INFO2:
            return await _result(s, s.m.control.submit(
                ControlCommand.GET_DEV_INFO2, dev_id=DEV_ID, dev_path_length=16,
                buffer=bytearray(b"/dev/ublkc1".ljust(16, b"\0") + bytes(64)),
            ))  # fmt: skip
        case ControlCommand.GET_QUEUE_AFFINITY | ControlCommand.GET_FEATURES:
            buffer = bytearray(8)
        case ControlCommand.SET_PARAMS:
            buffer = bytearray(basic_params().pack())
        case ControlCommand.GET_PARAMS:
            buffer = bytearray(Params.query())
        case ControlCommand.START_DEV | ControlCommand.END_USER_RECOVERY:
            data = s.kernel.server_pid
        case ControlCommand.UPDATE_SIZE:
            data = 64
    return _in_words(await s.send(command, data=data, buffer=buffer))


async def _result(s: Situation, command: Awaitable[int]) -> str:
    return _in_words(await command)


def _in_words(result: int | None) -> str:
    if result is None:
        return "waits"
    if result == -ENOTSUPP:
        return "524"
    # EOPNOTSUPP has the number of ENOTSUP.
    return errno.errorcode[-result].removeprefix("E").replace("OPNOTSUPP", "NOTSUP") if result < 0 else "0"


@asynccontextmanager
async def situation(version: tuple[int, int], state: str) -> AsyncIterator[Situation]:
    kernel = SimKernel(version=version, partition_scan=False)
    async with machine(kernel) as m, trio.open_nursery() as nursery:
        s = Situation(m, nursery)
        await STATES[state](s)
        yield s
        nursery.cancel_scope.cancel()


# What each command gets in each of the states that the first line names: an errno without its E, or 0. "waits": for
# something that the test does not do.
TABLE_7_3 = """
absent added configured fetched live plain dead stopped quiescing quiesced failing recovering deleted
GET_QUEUE_AFFINITY  NODEV  0      0      0      0      0      0      0      0      0      0      0      0
GET_DEV_INFO        NODEV  0      0      0      0      0      0      0      0      0      0      0      0
ADD_DEV             0      EXIST  EXIST  EXIST  EXIST  EXIST  EXIST  EXIST  EXIST  EXIST  EXIST  EXIST  EXIST
DEL_DEV             NODEV  0      0      waits  waits  waits  0      waits  waits  0      0      waits  waits
START_DEV           NODEV  INVAL  waits  0      EXIST  EXIST  waits  BUSY   EXIST  waits  waits  EXIST  BUSY
STOP_DEV            NODEV  0      0      0      0      0      0      0      0      0      0      0      0
SET_PARAMS          NODEV  0      0      0      ACCES  ACCES  0      0      ACCES  ACCES  ACCES  ACCES  0
GET_PARAMS          NODEV  0      0      0      0      0      0      0      0      0      0      0      0
START_USER_RECOVERY NODEV  BUSY   BUSY   BUSY   BUSY   INVAL  INVAL  BUSY   BUSY   0      0      BUSY   BUSY
END_USER_RECOVERY   NODEV  waits  waits  BUSY   BUSY   INVAL  waits  BUSY   BUSY   waits  waits  0      BUSY
GET_DEV_INFO2       NODEV  0      0      0      0      0      0      0      0      0      0      0      NOENT
GET_FEATURES        0      0      0      0      0      0      0      0      0      0      0      0      0
DEL_DEV_ASYNC       NODEV  0      0      0      0      0      0      0      0      0      0      0      0
UPDATE_SIZE         NODEV  NODEV  NODEV  NODEV  0      0      NODEV  NODEV  0      0      0      0      NODEV
QUIESCE_DEV         NODEV  NODEV  NODEV  NODEV  0      NOTSUP NOTSUP NODEV  0      0      0      0      NODEV
TRY_STOP_DEV        NODEV  NODEV  NODEV  NODEV  0      0      NODEV  NODEV  0      0      0      0      NODEV
REG_BUF             NODEV  NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP
UNREG_BUF           NODEV  NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP
unknown             NODEV  NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP
"""
TABLE_6_12 = """
absent added configured fetched live plain dead stopped quiesced recovering deleted
GET_QUEUE_AFFINITY  NODEV  0      0      0      0      0      0      0      0      0      0
GET_DEV_INFO        NODEV  0      0      0      0      0      0      0      0      0      0
ADD_DEV             0      EXIST  EXIST  EXIST  EXIST  EXIST  EXIST  EXIST  EXIST  EXIST  EXIST
DEL_DEV             NODEV  0      0      waits  waits  waits  0      waits  0      waits  waits
START_DEV           NODEV  INVAL  waits  0      EXIST  EXIST  0      0      EXIST  EXIST  0
STOP_DEV            NODEV  0      0      0      0      0      0      0      0      0      0
SET_PARAMS          NODEV  0      0      0      ACCES  ACCES  0      0      ACCES  ACCES  0
GET_PARAMS          NODEV  0      0      0      0      0      0      0      0      0      0
START_USER_RECOVERY NODEV  INVAL  INVAL  BUSY   BUSY   INVAL  INVAL  BUSY   0      BUSY   BUSY
END_USER_RECOVERY   NODEV  waits  waits  BUSY   BUSY   INVAL  INVAL  BUSY   0      0      BUSY
GET_DEV_INFO2       NODEV  0      0      0      0      0      0      0      0      0      NOENT
GET_FEATURES        0      0      0      0      0      0      0      0      0      0      0
DEL_DEV_ASYNC       NODEV  0      0      0      0      0      0      0      0      0      0
UPDATE_SIZE         NODEV  NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP
QUIESCE_DEV         NODEV  NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP
TRY_STOP_DEV        NODEV  NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP
REG_BUF             NODEV  NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP
UNREG_BUF           NODEV  NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP
unknown             NODEV  NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP NOTSUP
"""


def cases() -> list[tuple[tuple[int, int], str, str, str]]:
    found = []
    for version, table in (((7, 3), TABLE_7_3), ((6, 12), TABLE_6_12)):
        header, *rows = (line.split() for line in table.strip().splitlines())
        assert {row[0] for row in rows} == {command.name for command in ControlCommand} | {"unknown"}
        for name, *cells in rows:
            found += [(version, name, state, cell) for state, cell in zip(header, cells, strict=True)]
    return found


@pytest.mark.parametrize(("version", "name", "state", "expected"), cases())
async def test_command_in_state(version: tuple[int, int], name: str, state: str, expected: str) -> None:
    """Every command, in every state, gets what the driver's source says."""
    async with situation(version, state) as s:
        assert await send(s, ControlCommand[name] if name != "unknown" else UNKNOWN) == expected


@pytest.mark.parametrize("version", [(7, 3), (6, 12)])
@pytest.mark.parametrize("state", [state for state in STATES if state not in ("absent", "quiescing", "failing")])
async def test_nothing_is_left(version: tuple[int, int], state: str) -> None:
    """Whatever the state, a STOP_DEV, the server's end and a DEL_DEV leave nothing."""
    async with situation(version, state) as s:
        assert await s.m.stop(DEV_ID) == 0
        if hasattr(s, "ring"):
            s.close()
        if state != "deleted":
            assert await s.send(ControlCommand.DEL_DEV) == 0
        assert s.kernel.device_ids() == []
    assert s.kernel.leftovers() == []


REPORTED = {
    "configured": DeviceState.DEAD, "live": DeviceState.LIVE, "quiescing": DeviceState.LIVE,
    "stopped": DeviceState.DEAD, "dead": DeviceState.DEAD, "quiesced": DeviceState.QUIESCED,
    "failing": DeviceState.FAIL_IO, "recovering": DeviceState.QUIESCED,
}  # fmt: skip


@pytest.mark.parametrize("state", REPORTED)
async def test_state_is_reported(state: str) -> None:
    """GET_DEV_INFO says which state, and whose server it is: nobody's pid once that has died."""
    async with situation((7, 3), state) as s:
        info = await s.m.info(DEV_ID)
        assert info.state is REPORTED[state]
        assert info.ublksrv_pid == (s.kernel.server_pid if state in ("live", "quiescing") else -1)


async def test_older_releases_report_a_dead_servers_pid() -> None:
    """6.12 says what START_DEV was told."""
    async with situation((6, 12), "quiesced") as s:
        assert (await s.m.info(DEV_ID)).ublksrv_pid == s.kernel.server_pid


@pytest.mark.parametrize("pid", [None, 1])
async def test_a_dead_server_opened_nothing(pid: int | None) -> None:
    """6.17, which starts a device whose tags were fetched once, refuses every pid when nobody has opened it since."""
    async with situation((6, 17), "dead") as s:
        data = s.kernel.server_pid if pid is None else pid
        assert await s.send(ControlCommand.START_DEV, data=data) == -errno.EINVAL


@pytest.mark.parametrize("what", ["char", "ring"])
async def test_whoever_has_the_char_device_is_a_server_that_was_stopped(what: str) -> None:
    """After STOP_DEV START_DEV is EBUSY, not held, while the char device is open or a ring of it is left."""
    kernel = SimKernel(partition_scan=False)
    async with machine(kernel) as m:
        info = await m.add()
        assert await m.set_params(0, basic_params()) == 0
        char = await kernel.open_char_device(info, ioctl_encoded=True)
        if what == "ring":
            ring = char.open_queue(0, buffers=1)
            char.close()
        assert await m.stop() == 0
        with trio.fail_after(5):
            assert await m.start() == -errno.EBUSY
        if what == "ring":
            ring.close()
        char.close()
