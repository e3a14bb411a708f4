"""Requests that a backend has no resources for wait in line, against a model of the order, on the simulated kernel."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from unittest import mock

import attrs
import hypothesis.strategies as st
import pytest
import trio
import trio.testing
from hypothesis import Phase, given, settings

from tests.property.pumped import PumpedRun
from ublk_trio import Backend, DataMode, DeviceOptions, SimKernel, open_target
from ublk_trio.back_pressure import RETRY_SECONDS, WaitingLine
from ublk_trio.device import DeviceStatistics
from ublk_trio.handlers import Serve
from ublk_trio.uapi import IoOp

BLOCK = 512
#: Requests of a run; one block each, by which they are told apart, in the order in which the application sends them.
REQUESTS_MAX = 12
DEPTH = 8
STEPS_MAX = 2_000


@attrs.define
class Model:
    """What may be shown to the backend next: never a request while one that came before it waits."""

    #: What the backend's next calls come to: how long each takes (passes of the scheduler), and whether it is refused.
    script: list[tuple[int, bool]]
    shown: set[int] = attrs.Factory(set)
    waiting: set[int] = attrs.Factory(set)
    refused: set[int] = attrs.Factory(set)
    #: Something was refused, and nothing that was shown again since has been taken.
    tight: bool = False
    #: Shown again while it is tight: until it is known what comes of that, nothing else may be shown.
    probing: int | None = None
    done: list[int] = attrs.Factory(list)
    broken: list[str] = attrs.Factory(list)

    def show(self, number: int) -> tuple[int, bool]:
        older = [other for other in range(number) if other not in self.shown or other in self.waiting]
        if older:
            self.broken.append(f"request {number} overtakes {older}")
        if self.probing is not None:
            self.broken.append(f"request {number} is shown while it is not known whether {self.probing} is taken")
        if self.tight:
            self.probing = number
        self.shown.add(number)
        self.waiting.discard(number)
        return self.script.pop() if self.script else (0, False)

    def end(self, number: int, *, refused: bool) -> None:
        if self.probing == number:
            self.probing = None
            self.tight = False
        if refused:
            self.tight = True
            self.refused.add(number)
            self.waiting.add(number)
            raise OSError(errno.ENOMEM, "no resources")
        self.done.append(number)


class Plain(Backend):
    """Refuses as the script says."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.size = 64 * BLOCK

    def read(self, offset: int, buffer: memoryview) -> int | None:
        _, refused = self.model.show(offset // BLOCK)
        try:
            self.model.end(offset // BLOCK, refused=refused)
        except OSError:
            if offset % (2 * BLOCK):
                return -errno.ENOMEM  # the other way to say it
            raise
        buffer[:] = bytes([offset // BLOCK]) * len(buffer)
        return None


class Async(Backend):
    """Refuses as the script says, at once or later."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.size = 64 * BLOCK

    async def read(self, offset: int, buffer: memoryview) -> None:
        passes, refused = self.model.show(offset // BLOCK)
        for _ in range(passes):
            await trio.lowlevel.checkpoint()
        self.model.end(offset // BLOCK, refused=refused)
        buffer[:] = bytes([offset // BLOCK]) * len(buffer)


def play(
    backend: Backend, options: DeviceOptions, *, requests: int, at_once: int, choose: Callable[[str, int], int]
) -> DeviceStatistics:
    """Send the requests, ``at_once`` before the backend's answers and the rest one by one; each must come back right."""
    seen: list[DeviceStatistics] = []

    async def main() -> None:
        kernel = SimKernel(partition_scan=False)
        async with open_target(kernel) as target:
            device = await target.start_device(backend, options)
            disk = kernel.block_device(device.dev_id)
            bios = []
            for number in range(requests):
                if number >= at_once:
                    await trio.sleep(RETRY_SECONDS / 2)
                bios.append(disk.submit(IoOp.READ, number * BLOCK, BLOCK))
            for number, bio in enumerate(bios):
                assert await bio.wait() == BLOCK
                assert bytes(bio.data) == bytes([number]) * BLOCK
            seen.append(device.statistics())

    run = PumpedRun(main, choose)
    try:
        for _ in range(STEPS_MAX):
            assert run.run_until_idle(passes_max=STEPS_MAX), "busy for ever"
            if run.ended:
                break
            run.let_time_pass(run.seconds_to_next_deadline)
        if run.error is not None:
            raise run.error
        assert run.ended, "nothing waits for ever"
    finally:
        run.abandon()
    return seen[0]


scripts = st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40)
cases = given(
    script=scripts,
    requests=st.integers(1, REQUESTS_MAX),
    at_once=st.integers(0, DEPTH),
    serve=st.sampled_from(["inline", "async"]),
    mode=st.sampled_from(DataMode),
)


def check_order(script: list[tuple[int, bool]], requests: int, at_once: int, serve: Serve, mode: DataMode) -> None:
    model = Model(script)
    backend = Async(model) if serve == "async" else Plain(model)
    options = DeviceOptions(depth=DEPTH, mode=mode, pool_buffers=3, serve=serve, max_io_bytes=4096)
    statistics = play(backend, options, requests=requests, at_once=at_once, choose=lambda what, options: 0)
    (queue,) = statistics.queues
    assert model.broken == []
    assert sorted(model.done) == list(range(requests)), "each is done once"
    assert statistics.failed == 0
    assert queue.waiting == 0
    assert len(model.refused) <= queue.waited_total <= requests
    if not model.refused:
        assert queue.waited_total == 0


@cases
@settings(max_examples=60, deadline=None)
def test_nobody_is_overtaken(
    script: list[tuple[int, bool]], requests: int, at_once: int, serve: Serve, mode: DataMode
) -> None:
    """A request that waits for resources is not overtaken, is tried alone until it is taken, and never fails."""
    check_order(script, requests, at_once, serve, mode)


@pytest.mark.parametrize(
    "plant",
    [
        # A new request goes straight to the backend.
        mock.patch.object(WaitingLine, "closed_to_new", False),
        # Whoever was refused goes to the end of the line.
        mock.patch.object(WaitingLine, "began", lambda line, request: _arrive_anew(line, request.tag)),
        # The rest of the line does not wait to hear of its first.
        mock.patch.object(WaitingLine, "take", lambda line: line._line.pop(0)[1] if line._line else None),
    ],
    ids=["newcomers first", "refused last", "not alone"],
)
def test_planted_bugs_are_caught(plant: mock._patch[object]) -> None:
    """A line in another order, or one that is tried all at once, is noticed by the test of the order."""

    @cases
    @settings(max_examples=300, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def hunt(script: list[tuple[int, bool]], requests: int, at_once: int, serve: Serve, mode: DataMode) -> None:
        check_order(script, requests, at_once, serve, mode)

    with plant, pytest.raises(BaseException, match=r"overtakes|busy for ever|is shown while|waits for ever"):
        hunt()


def _arrive_anew(line: WaitingLine, tag: int) -> None:
    line._arrived += 1
    line._arrivals[tag] = line._arrived


class Never(Backend):
    """Has never any resources."""

    size = 64 * BLOCK

    def __init__(self) -> None:
        self.asked: list[float] = []

    def read(self, offset: int, buffer: memoryview) -> None:
        self.asked.append(trio.current_time())
        raise OSError(errno.ENOMEM, "none")


class NeverAsync(Never):
    async def read(self, offset: int, buffer: memoryview) -> None:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        self.asked.append(trio.current_time())
        raise OSError(errno.ENOMEM, "none")


@pytest.mark.parametrize("backend", [Never(), NeverAsync()], ids=["inline", "async"])
def test_stop_with_a_backend_that_never_has_resources(backend: Never, caplog: pytest.LogCaptureFixture) -> None:
    """Tries are bounded in number; a stop fails what waits with EIO after the grace time, and names it."""
    seen: list[float] = []

    async def main() -> None:
        kernel = SimKernel(partition_scan=False)
        async with open_target(kernel) as target:
            device = await target.start_device(backend, DeviceOptions(depth=4, grace_seconds=2.0))
            disk = kernel.block_device(device.dev_id)
            bios = [disk.submit(IoOp.READ, number * BLOCK, BLOCK) for number in range(3)]
            await trio.sleep(1.0)
            assert [bio.done for bio in bios] == [False] * 3
            (queue,) = device.statistics().queues
            assert (queue.waiting, queue.waited_total) == (3, 3)
            begin = trio.current_time()
            await target.stop_device(device)
            seen.append(trio.current_time() - begin)
            assert [await bio.wait() for bio in bios] == [-errno.EIO] * 3

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert 2.0 <= seen[0] <= 2.0 + 10 * RETRY_SECONDS
    assert len(backend.asked) <= 3.1 / RETRY_SECONDS, "there is a pause between tries"
    assert "not answered within the grace time" in caplog.text
    assert "queue 0 tag 2: READ of 512 bytes at 1024" in caplog.text
    assert all(record.levelno < logging.ERROR for record in caplog.records), "it is no bug of the backend's"
