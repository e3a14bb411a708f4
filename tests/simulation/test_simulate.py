"""Seeded runs of the whole engine: they end well, and what is wrong is found."""

from __future__ import annotations

import ast
import errno
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from ublk_trio import Backend, DataMode, DeviceOptions, Memory, SimKernel, UblkError, kernel_sim, open_target
from ublk_trio.errors import UsageError
from ublk_trio.handlers import Handlers
from ublk_trio.kernel_sim import Bio, KernelVersion, RecordedChoices, SeededChoices
from ublk_trio.kernel_sim.faults import BY_NAME
from ublk_trio.kernel_sim.faults import FAULTS as OF_THE_TABLE
from ublk_trio.kernel_sim.uring import RING_CHOICES
from ublk_trio.queue import Queue
from ublk_trio.simulation import FAULTS, Report, RunOptions, parse_faults, simulate
from ublk_trio.simulation.clock import HangError, VirtualClock
from ublk_trio.simulation.faults import DECISIONS, OF_THE_KERNEL, format_faults
from ublk_trio.uapi import IoOp

SEEDS = 20
#: Faults that are no event of their own.
ONLY_AMONG_THE_CHOICES = {"completions-late", "completions-reordered", "late-cancel", "held-longer"}


def run(seed: int, **options: Any) -> Report:
    return simulate(RunOptions(seed=seed, **options), SeededChoices(seed))


@pytest.mark.parametrize("version", [(6, 0), (6, 12), (7, 3)])
def test_all_goes_well(version: tuple[int, int]) -> None:
    """Whatever a run enables, every operation ends once and rightly, and nothing is left."""
    counts: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    enabled: Counter[str] = Counter()
    for seed in range(SEEDS):
        report = run(seed, kernel_version=KernelVersion(*version))
        assert report.problems == (), report.options.command_line()
        counts += report.counts
        faults += report.faults
        enabled += Counter(report.plan.faults)
    # Among them the runs do everything, and none does it always.
    assert all(counts[name] for name in ("read", "write", "fua-write", "flush", "discard", "write-zeroes", "failed"))
    assert set(faults) == set(FAULTS) - ONLY_AMONG_THE_CHOICES
    assert all(0 < enabled[name] < SEEDS for name in FAULTS)


def test_without_faults_nothing_fails() -> None:
    """What is not allowed does not happen."""
    for seed in range(SEEDS):
        report = run(seed, faults=frozenset())
        assert report.problems == ()
        assert report.plan.faults == frozenset()
        assert not report.faults
        asked = {choice.what for choice in report.choices}
        assert not asked & {question for name in OF_THE_KERNEL for question in BY_NAME[name].choices}
        failed = [event for event in report.log if event[0] == "bio-done" and event[2] < 0]
        assert all(event[2] in (-errno.EIO, -errno.ENXIO) for event in failed)  # the disk was being stopped


def test_liveness_phase_asks_nothing() -> None:
    """Once the faults stop, the machine is calm: no decision is recorded any more."""
    report = run(1)
    kinds = [event[:2] for event in report.log]
    begin = kinds.index(("phase", "liveness"))
    assert "choice" in {kind for kind, _ in kinds[:begin]}
    assert "choice" not in {kind for kind, _ in kinds[begin:]}
    assert "event" in {kind for kind, _ in kinds[begin:]}


def test_replay_is_the_same_run() -> None:
    """A run's choices give its log again, to the last event."""
    for seed in range(5):
        report = run(seed)
        choices = RecordedChoices(report.choices)
        again = simulate(report.options, choices)
        assert again.log == report.log
        assert choices.remaining == 0
        assert again.log.digest() == report.log.digest() != run(seed + 1).log.digest()


def questions_of(module: Path) -> Iterator[str]:
    """What a module of the simulator asks of its choices; a question that has no fixed name is a fault's."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "choose":
            what = node.args[0]
            if isinstance(what, ast.Constant):
                yield str(what.value)


def test_every_decision_is_known() -> None:
    """What the kernel and Trio decide is a fault's question, one of raw rings, which no run has, or one that a run has free or calm."""
    asked = {what for module in Path(kernel_sim.__path__[0]).rglob("*.py") for what in questions_of(module)}
    assert set(RING_CHOICES) <= asked
    assert asked - set(RING_CHOICES) - {what for fault in OF_THE_TABLE for what in fault.choices} == set(DECISIONS)


# ---------------------------------------------------------------------- planted bugs


def swallow_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handlers, "failed", lambda self, request, exception: request.success)


def answer_reads_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Handlers.finish

    def finish_whole(self: Handlers, request: Any, outcome: object) -> int:
        return request.success if request.op == IoOp.READ else finish(self, request, outcome)

    monkeypatch.setattr(Handlers, "finish", finish_whole)


def wrong_errno(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handlers, "failed", lambda self, request, exception: -errno.ENODATA)


def commit_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    flush = Queue.flush

    def flush_twice(self: Queue) -> None:
        if len(self._answers) > 1:
            self._answers.append(self._answers[0])
        flush(self)

    monkeypatch.setattr(Queue, "flush", flush_twice)


def lose_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Bio.finish

    def finish_silently(self: Bio, result: int) -> None:
        if self.number % 37 == 0:
            self._event = None
        finish(self, result)

    monkeypatch.setattr(Bio, "finish", finish_silently)


@pytest.mark.parametrize(
    ("plant", "invariant"),
    [
        (swallow_errors, "a failed call fails its request"),
        (answer_reads_whole, "what was written is what is read"),
        (wrong_errno, "an error has its cause"),
        (commit_twice, "the kernel's contract"),
        (lose_an_end, "everything ends"),
        (lose_an_end, "nothing hangs"),
    ],
)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], invariant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check can fail: a bug that it is there for is found within some seeds, and replays."""
    plant(monkeypatch)
    for seed in range(SEEDS):
        report = run(seed)
        if any(problem.startswith(invariant + ":") for problem in report.problems):
            break
    else:
        pytest.fail(f"not found in {SEEDS} runs")
    again = simulate(report.options, RecordedChoices(report.choices))
    assert again.problems == report.problems
    assert again.log == report.log


# ---------------------------------------------------------------------- parts


@pytest.mark.parametrize("passes", range(8))
async def test_a_ring_that_closes_while_an_event_is_under_way(passes: int) -> None:
    """A server that loses its ring between the reap and the event ends as by any lost ring: found by ``sim``."""
    kernel = SimKernel()
    options = DeviceOptions(mode=DataMode.GET_DATA, depth=2)
    async with open_target(kernel) as target:
        device = await target.start_device(Memory(1 << 20), options)
        disk = kernel.block_device(device.dev_id)
        bios = [disk.submit(IoOp.READ, 0, 512), disk.submit(IoOp.WRITE, 512, bytes(512))]
        for _ in range(passes):
            await trio.lowlevel.checkpoint()
        kernel.crash_server(device.dev_id)
        try:
            await target.wait_device(device)
        except UblkError as error:
            pytest.fail(f"{error!r}")
        assert all(bio.done for bio in bios)
    assert kernel.leftovers() == []


class Held(Backend):
    """Reads go on when they are let."""

    size = 1 << 20

    def __init__(self) -> None:
        self.go = trio.Event()

    async def read(self, offset: int, buffer: memoryview) -> None:
        if offset:
            await self.go.wait()


async def test_a_ring_that_closes_under_several_tasks() -> None:
    """A leader that is parked and a follower with an answer may both meet the closed ring: found by ``sim``."""
    kernel = SimKernel()
    backend = Held()
    async with open_target(kernel) as target:
        device = await target.start_device(backend)
        disk = kernel.block_device(device.dev_id)
        bio = disk.submit(IoOp.READ, 4096, 512)
        await trio.testing.wait_all_tasks_blocked()
        backend.go.set()
        kernel.crash_server(device.dev_id)
        await target.wait_device(device)
        assert bio.result == -errno.EIO
    assert kernel.leftovers() == []


def test_faults_by_name() -> None:
    """all, none and lists of names, in words and back; an unknown one is refused."""
    assert parse_faults("all") == set(FAULTS)
    assert parse_faults("none") == frozenset()
    some = parse_faults("backend-short, server-killed")
    assert some == {"backend-short", "server-killed"}
    assert parse_faults(format_faults(some)) == some
    assert [format_faults(parse_faults(text)) for text in ("all", "none")] == ["all", "none"]
    with pytest.raises(UsageError, match="there is no fault 'rain': known are all, none, completions-late"):
        parse_faults("backend-short,rain")


def test_time_is_virtual() -> None:
    """A year passes at once, and the same in every run."""

    async def sleep() -> float:
        await trio.sleep(365 * 24 * 3600)
        return trio.current_time()

    clock = VirtualClock(lambda: pytest.fail("it hangs"))
    assert trio.run(sleep, clock=clock) == clock.current_time() == 365 * 24 * 3600


def test_a_hang_is_known_at_once() -> None:
    """Where nobody can run any more the clock says so, once; what cannot be cancelled then is an error of the run's."""
    scopes = [trio.CancelScope()]
    hangs = []

    def on_hang() -> None:
        hangs.append(trio.current_time())
        scopes[0].cancel()

    async def wait() -> None:
        with scopes[0]:
            await trio.sleep(3)
            await trio.sleep_forever()

    trio.run(wait, clock=VirtualClock(on_hang))
    assert hangs == [3.0]

    clock = VirtualClock(lambda: None)
    with pytest.raises(HangError):
        all(clock.deadline_to_sleep_time(float("inf")) == 0 for _ in range(1_000))
