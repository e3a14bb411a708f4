"""The calls in any order and at any moment: each is answered as the model says, and nothing hangs or is left.

A call that is made while no other is under way must get exactly the model's answer. One that overlaps others may be sooner or
later than they; then its answer must be one that the surface can give, and what all agree on afterwards must hold together.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.search import check_noticed
from tests.service.test_disks import SIZE, Gate
from tests.sim.mini import basic_params, live, machine
from ublk_trio import BackendError, Recovery, SimKernel
from ublk_trio.bdev import Bdev
from ublk_trio.options import RECOVERY_FLAGS
from ublk_trio.rpc import Dispatcher
from ublk_trio.service import disks as disks_module
from ublk_trio.service.disks import Disk, Disks
from ublk_trio.service.methods import METHODS
from ublk_trio.service.service import Made, Service, open_service

#: The id of a disk whose server was killed before the run.
LEFT = 7
#: What a call may answer when it overlaps others.
POSSIBLE = {0, errno.ENODEV, errno.EBUSY, errno.EPERM, errno.EEXIST, errno.ENOENT, errno.ECANCELED}
#: Seconds of the run's own clock in which everything must be answered: several grace times of 10 s.
BOUND_SECONDS = 120.0


@attrs.define
class Model:
    """What there is, when no call is under way."""

    target: bool = False
    bdevs: set[str] = attrs.field(factory=lambda: {"slow"})
    disks: dict[int, str] = attrs.field(factory=dict)
    left: set[int] = attrs.field(factory=lambda: {LEFT})

    def answer(self, what: str, name: str, number: int) -> int:
        """The errno of a call, 0 for none; and what there is then."""
        errno_of: Callable[[str, int], int] = getattr(self, what)
        return errno_of(name, number)

    def create(self, name: str, number: int) -> int:
        if self.target:
            return errno.EBUSY
        self.target = True
        return 0

    def destroy(self, name: str, number: int) -> int:
        if not self.target:
            return errno.ENOENT
        self.target = False
        self.disks.clear()
        return 0

    def make(self, name: str, number: int) -> int:
        if name in self.bdevs:
            return errno.EEXIST
        self.bdevs.add(name)
        return 0

    def delete(self, name: str, number: int) -> int:
        if name not in self.bdevs or name == "slow":
            return errno.ENODEV
        self.bdevs.remove(name)
        self.disks = {number: bdev for number, bdev in self.disks.items() if bdev != name}
        return 0

    def _may_begin(self, name: str, number: int) -> int:
        if not self.target:
            return errno.ENODEV
        if number in self.disks:
            return errno.EBUSY
        return 0 if name in self.bdevs else errno.ENODEV

    def start(self, name: str, number: int) -> int:
        refused = self._may_begin(name, number)
        if refused:
            return refused
        if name in self.disks.values():
            return errno.EPERM
        if number in self.left:
            return errno.EBUSY
        self.disks[number] = name
        return 0

    def recover(self, name: str, number: int) -> int:
        refused = self._may_begin(name, number)
        if refused:
            return refused
        if number not in self.left:
            return errno.ENODEV
        if name in self.disks.values():
            return errno.EPERM
        self.left.remove(number)
        self.disks[number] = name
        return 0

    def stop(self, name: str, number: int) -> int:
        return 0 if self.disks.pop(number, None) is not None else errno.ENODEV

    def look(self, name: str, number: int) -> int:
        return 0 if number in self.disks else errno.ENODEV


def request(what: str, name: str, number: int) -> tuple[str, dict[str, Any]]:
    match what:
        case "create":
            return "ublk_create_target", {}
        case "destroy":
            return "ublk_destroy_target", {}
        case "make":
            return "bdev_malloc_create", {"name": name, "block_size": 512, "num_blocks": SIZE // 512}
        case "delete":
            return "bdev_malloc_delete", {"name": name}
        case "start":
            return "ublk_start_disk", {"bdev_name": name, "ublk_id": number, "queue_depth": 4}
        case "recover":
            return "ublk_recover_disk", {"bdev_name": name, "ublk_id": number}
        case "stop":
            return "ublk_stop_disk", {"ublk_id": number}
    return "ublk_get_disks", {"ublk_id": number}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "create",
                "destroy",
                "make",
                "delete",
                "start",
                "start",
                "recover",
                "stop",
                "look",
                "hold",
                "release",
                "read",
            ]
        ),
        st.sampled_from(["a", "b", "slow"]),
        st.sampled_from([0, 1, LEFT]),
        st.sampled_from([True, True, False]),
    ),
    min_size=5,
    max_size=30,
)


#: What each run begins with, so that most of its calls find something.
FIRST = [("create", "a", 0, True), ("make", "a", 0, True), ("start", "a", 0, True), ("make", "b", 0, True)]


class Run:
    """One run: the calls, those that are under way, and the model."""

    def __init__(self, kernel: SimKernel, service: Service, gate: Gate, nursery: trio.Nursery) -> None:
        self.kernel, self.service, self.gate, self.nursery = kernel, service, gate, nursery
        self.dispatcher = Dispatcher()
        self.dispatcher.register(METHODS, service)
        self.model = Model()
        self.pending = 0
        self.quiet = trio.Event()
        #: The model is what there is: no two calls overlapped since it was.
        self.known = True

    async def call(self, what: str, name: str, number: int) -> int:
        try:
            await self.dispatcher.call(*request(what, name, number))
        except OSError as error:
            failure = error
        else:
            return 0
        assert failure.errno is not None
        assert len(str(failure).splitlines()) == 1
        return failure.errno

    async def overlapping(self, what: str, name: str, number: int) -> None:
        answer = await self.call(what, name, number)
        assert answer in POSSIBLE, f"{what} {name} {number}: {errno.errorcode[answer]}"
        self.pending -= 1
        if not self.pending:
            self.quiet.set()

    async def read(self, number: int) -> None:
        try:
            await self.kernel.block_device(number).read(0, 512)
        except OSError:
            return  # the disk has gone

    async def step(self, what: str, name: str, number: int, wait: bool) -> None:
        if what == "hold":
            # Else who waits at the gate that there is would wait for ever.
            if self.gate.gate.is_set():
                self.gate.gate = trio.Event()
        elif what == "release":
            self.gate.gate.set()
        elif what == "read":
            if number in self.kernel.device_ids():
                self.nursery.start_soon(self.read, number)
        elif wait and self.pending == 0 and not (name == "slow" and what == "start" and not self.gate.gate.is_set()):
            # A start waits as long as the backend does, in the look for partitions.
            self.learn()
            expected = self.model.answer(what, name, number)
            assert await self.call(what, name, number) == expected, f"{what} {name} {number}: {self.model}"
            assert self.disks() == self.model.disks, f"{what} {name} {number} was answered too soon"
        else:
            self.pending += 1
            self.quiet = trio.Event()
            self.known = False
            self.nursery.start_soon(self.overlapping, what, name, number)
        await trio.testing.wait_all_tasks_blocked()

    def disks(self) -> dict[int, str]:
        return {disk.ublk_id: disk.bdev_name for disk in self.service.disks if disk.ublk_id is not None}

    def learn(self) -> None:
        """What there is, after calls that overlapped; it must hold together."""
        if self.known:
            return
        service = self.service
        disks = self.disks()
        bdevs = {bdev.name: bdev for bdev in service.registry}
        assert set(disks.values()) <= set(bdevs)
        assert {name for name, bdev in bdevs.items() if bdev.claimed_by is not None} == set(disks.values())
        ours = set(self.kernel.device_ids()) - set(disks)
        assert ours <= {LEFT}
        target = service.disks.cpus is not None
        assert target or not disks
        self.model = Model(target=target, bdevs=set(bdevs), disks=disks, left=ours)
        self.known = True

    async def settle(self) -> None:
        """Every call that is under way is answered."""
        self.gate.gate.set()
        if self.pending:
            with trio.fail_after(BOUND_SECONDS):
                await self.quiet.wait()
        self.learn()


async def run_steps(steps: list[tuple[str, str, int, bool]]) -> None:
    kernel = SimKernel(version=(6, 12), partition_scan=False, paranoid=True)
    flags = RECOVERY_FLAGS[Recovery.REISSUE]
    async with (
        machine(kernel) as control,
        live(control, params=basic_params(size=SIZE), flags=flags, dev_id=LEFT),
        open_service(kernel) as service,
        trio.open_nursery() as nursery,
    ):
        kernel.crash_server(LEFT)
        kernel.partition_scan = True
        gate = Gate()
        gate.gate.set()
        made = Made(method="bdev_slow_create", params=dict, specific=dict)
        await service.make(made, "slow", gate, product_name="Slow disk")
        run = Run(kernel, service, gate, nursery)
        for step in (*FIRST, *steps):
            await run.step(*step)
        await run.settle()
        # What was read of the disk that nobody serves waits for ever.
        nursery.cancel_scope.cancel()
    assert not kernel.leftovers()
    assert not kernel.violations


async def run_bounded(steps: list[tuple[str, str, int, bool]]) -> None:
    with trio.fail_after(BOUND_SECONDS * len(steps)):
        await run_steps(steps)


def run_in_own_time(steps: list[tuple[str, str, int, bool]]) -> None:
    trio.run(run_bounded, steps, clock=trio.testing.MockClock(autojump_threshold=0.001))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(STEPS)
def test_any_order(steps: list[tuple[str, str, int, bool]]) -> None:
    """As the module says."""
    run_in_own_time(steps)


# Planted bugs -----------------------------------------------------------------------------------------------------------


def an_id_may_be_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(disks: Disks, disk: Disk) -> None:
        if disk.device is None:
            disks._disks.remove(disk)
        disk.gone.set()

    monkeypatch.setattr(Disks, "_forget", planted)


def stop_answers_too_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    async def planted(disks: Disks, ublk_id: int, *, only_if_unused: bool = False) -> None:
        disks.get(ublk_id).end()

    monkeypatch.setattr(Disks, "stop_disk", planted)


def removal_leaves_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(bdev: Bdev) -> None:
        bdev.removing = True
        bdev._descriptors.clear()
        bdev._unused.set()

    monkeypatch.setattr(Bdev, "remove", planted)


def destroy_forgets_the_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def planted(disks: Disks) -> None:
        if disks._running is None:
            raise BackendError(errno.ENOENT, "there is no target")
        disks._running = None

    monkeypatch.setattr(Disks, "destroy_target", planted)


def another_errno_for_an_id_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks_module, "_explained", lambda dev_id: contextlib.nullcontext())


PLANTED: list[Callable[[pytest.MonkeyPatch], None]] = [
    an_id_may_be_used_twice,
    stop_answers_too_soon,
    removal_leaves_the_disk,
    destroy_forgets_the_disks,
    another_errno_for_an_id_in_use,
]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: str(plant.__name__))
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model notices each of these bugs."""
    plant(monkeypatch)
    check_noticed(run_in_own_time, STEPS, examples=400)
