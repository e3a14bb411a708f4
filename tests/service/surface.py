"""The remote calls of disks in any order, against a model: for the simulator and for the real kernel.

A call that is made while no other is under way must get exactly the model's answer. One that overlaps others may be sooner or
later than they; then its answer must be one that the surface can give, and what all agree on afterwards must hold together.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import attrs
import trio
import trio.testing
from hypothesis import strategies as st

from tests.service.test_disks import SIZE, Gate
from ublk_trio import Kernel, UsageError
from ublk_trio.rpc import Dispatcher
from ublk_trio.service.methods import METHODS
from ublk_trio.service.service import Made, Service, open_service

MIB = 1 << 20

#: The id of a disk whose server was killed before the run.
LEFT = 7
#: What a call may answer when it overlaps others.
POSSIBLE = {0, errno.ENODEV, errno.EBUSY, errno.EPERM, errno.EEXIST, errno.ENOENT, errno.ECANCELED, errno.EINVAL}
#: Seconds of the run's own clock in which everything must be answered: several grace times of 10 s.
BOUND_SECONDS = 120.0

#: What stands on others: a passthru bdev, and a raid0.
STANDS_ON = {"p": ("a",), "r": ("b", "c")}
#: SPDK's word for each kind of bdev.
KINDS = {"p": "passthru", "r": "raid"}

#: A call's kind, a bdev, an id, and whether to wait for the answer.
Step: TypeAlias = tuple[str, str, int, bool]


class Arm(Protocol):
    """A kernel, on which there is a disk without a server: `LEFT`, of `SIZE` bytes."""

    @property
    def kernel(self) -> Kernel: ...

    @property
    def resizes(self) -> bool:
        """Disks follow their bdevs' sizes."""

    async def read(self, number: int) -> None:
        """What an application does: read the first block. Raises `OSError` when the disk goes away."""

    def size(self, number: int) -> int:
        """What an application sees of a disk: bytes."""


@attrs.define
class Awaited:
    """What stands on others and is not there, but has its name."""

    #: It lost a member, and does not come back.
    offline: bool = False
    #: The bases that it has claimed.
    held: set[str] = attrs.field(factory=set)


@attrs.define
class Model:
    """What there is, when no call is under way."""

    #: Disks follow their bdevs' sizes.
    resizes: bool
    target: bool = False
    #: With their sizes.
    bdevs: dict[str, int] = attrs.field(factory=lambda: {"slow": SIZE})
    #: In the order in which they were asked for, or lost.
    awaited: dict[str, Awaited] = attrs.field(factory=dict)
    disks: dict[int, str] = attrs.field(factory=dict)
    #: Of the disks; what applications see.
    sizes: dict[int, int] = attrs.field(factory=dict)
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
        self.sizes.clear()
        return 0

    def claimed(self) -> set[str]:
        """The bdevs that somebody has."""
        stacks = [STANDS_ON[name] for name in self.bdevs if name in STANDS_ON]
        return set(self.disks.values()).union(*stacks, *(awaited.held for awaited in self.awaited.values()))

    def make(self, name: str, number: int) -> int:
        if name in self.bdevs or name in self.awaited:
            return errno.EEXIST
        if name in STANDS_ON:
            return self._stack(name)
        self.bdevs[name] = SIZE
        for waiting, awaited in list(self.awaited.items()):
            if awaited.offline:
                continue
            awaited.held |= set(STANDS_ON[waiting]) & set(self.bdevs) - self.claimed()
            if set(STANDS_ON[waiting]) <= set(self.bdevs):
                # If somebody else has a base it is not made, and no longer waited for.
                del self.awaited[waiting]
                if set(STANDS_ON[waiting]) == awaited.held:
                    self._add(waiting)
        return 0

    def _stack(self, name: str) -> int:
        there = set(STANDS_ON[name]) & set(self.bdevs)
        if there & self.claimed():
            return errno.EPERM
        if there == set(STANDS_ON[name]):
            self._add(name)
        else:
            self.awaited[name] = Awaited(held=there)
        return 0

    def _add(self, name: str) -> None:
        self.bdevs[name] = self._stacked_size(name)

    def _stacked_size(self, name: str) -> int:
        bases = STANDS_ON[name]
        return len(bases) * min(self.bdevs[base] for base in bases)

    def delete(self, name: str, number: int) -> int:
        if name in self.awaited:
            del self.awaited[name]
            return 0
        if name not in self.bdevs or name == "slow":
            return errno.ENODEV
        self._go(name)
        for waiting, awaited in list(self.awaited.items()):
            awaited.held.discard(name)
            if awaited.offline and not awaited.held:
                del self.awaited[waiting]
        for top, bases in STANDS_ON.items():
            if top in self.bdevs and name in bases:
                self._go(top)
                self.awaited[top] = Awaited(offline=top == "r", held={*bases} - {name})
        return 0

    def _go(self, name: str) -> None:
        del self.bdevs[name]
        self.disks = {number: bdev for number, bdev in self.disks.items() if bdev != name}
        self.sizes = {number: self.sizes[number] for number in self.disks}

    def resize(self, name: str, number: int) -> int:
        if name not in self.bdevs or name in STANDS_ON or name == "slow":
            return errno.ENODEV
        self.bdevs[name] = mebibytes(number) * MIB
        for top in STANDS_ON.keys() & self.bdevs.keys():
            self.bdevs[top] = self._stacked_size(top)
        if self.resizes:
            self.sizes = {number: self.bdevs[bdev] for number, bdev in self.disks.items()}
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
        if name in self.claimed():
            return errno.EPERM
        if number in self.left:
            return errno.EBUSY
        self.disks[number] = name
        self.sizes[number] = self.bdevs[name]
        return 0

    def recover(self, name: str, number: int) -> int:
        refused = self._may_begin(name, number)
        if refused:
            return refused
        if number not in self.left:
            return errno.ENODEV
        if name in self.claimed():
            return errno.EPERM
        if self.bdevs[name] != SIZE:
            return errno.EINVAL
        self.left.remove(number)
        self.disks[number] = name
        self.sizes[number] = SIZE
        return 0

    def stop(self, name: str, number: int) -> int:
        self.sizes.pop(number, None)
        return 0 if self.disks.pop(number, None) is not None else errno.ENODEV

    def look(self, name: str, number: int) -> int:
        return 0 if number in self.disks else errno.ENODEV


def mebibytes(number: int) -> int:
    """A new size, drawn as an id is."""
    return 1 + number % 2


def request(what: str, name: str, number: int) -> tuple[str, dict[str, Any]]:
    match what:
        case "create":
            return "ublk_create_target", {}
        case "destroy":
            return "ublk_destroy_target", {}
        case "make" if name == "p":
            return "bdev_passthru_create", {"name": "p", "base_bdev_name": "a"}
        case "make" if name == "r":
            members = {"base_bdevs": STANDS_ON["r"], "raid_level": "raid0", "strip_size_kb": 4}
            return "bdev_raid_create", {"name": "r", **members}
        case "make":
            return "bdev_malloc_create", {"name": name, "block_size": 512, "num_blocks": SIZE // 512}
        case "delete":
            return f"bdev_{KINDS.get(name, 'malloc')}_delete", {"name": name}
        case "resize":
            return "bdev_malloc_resize", {"name": name, "new_size": mebibytes(number)}
        case "start":
            return "ublk_start_disk", {"bdev_name": name, "ublk_id": number, "queue_depth": 4}
        case "recover":
            return "ublk_recover_disk", {"bdev_name": name, "ublk_id": number}
        case "stop":
            return "ublk_stop_disk", {"ublk_id": number}
    return "ublk_get_disks", {"ublk_id": number}


CALLS = [
    "create",
    "destroy",
    "make",
    "make",
    "make",
    "delete",
    "delete",
    "resize",
    "start",
    "start",
    "recover",
    "stop",
    "look",
]


def steps(at_most: int) -> st.SearchStrategy[list[Step]]:
    """Up to so many steps; besides calls, the slow bdev's requests are held up and released, and disks are read."""
    step = st.tuples(
        st.sampled_from([*CALLS, "hold", "release", "read"]),
        st.sampled_from(["a", "b", "c", "p", "r", "slow"]),
        st.sampled_from([0, 1, LEFT]),
        st.sampled_from([True, True, False]),
    )
    return st.lists(step, min_size=5, max_size=at_most)


#: What each run begins with, so that most of its calls find something.
FIRST: list[Step] = [
    ("create", "a", 0, True),
    ("make", "p", 0, True),
    ("make", "a", 0, True),
    ("start", "p", 0, True),
    ("make", "r", 0, True),
    ("make", "b", 0, True),
]


class Run:
    """One run: the calls, those that are under way, and the model."""

    def __init__(self, arm: Arm, service: Service, gate: Gate, nursery: trio.Nursery) -> None:
        self.arm, self.service, self.gate, self.nursery = arm, service, gate, nursery
        self.dispatcher = Dispatcher()
        self.dispatcher.register(METHODS, service)
        self.model = Model(resizes=arm.resizes)
        self.pending = 0
        self.quiet = trio.Event()
        #: The model is what there is: no two calls overlapped since it was.
        self.known = True

    async def call(self, what: str, name: str, number: int) -> int:
        try:
            await self.dispatcher.call(*request(what, name, number))
        except (OSError, UsageError) as error:
            failure = error
        else:
            return 0
        assert len(str(failure).splitlines()) == 1
        if isinstance(failure, UsageError):
            return errno.EINVAL
        assert failure.errno is not None
        return failure.errno

    async def overlapping(self, what: str, name: str, number: int) -> None:
        answer = await self.call(what, name, number)
        assert answer in POSSIBLE, f"{what} {name} {number}: {errno.errorcode[answer]}"
        self.pending -= 1
        if not self.pending:
            self.quiet.set()

    async def read(self, number: int) -> None:
        try:
            await self.arm.read(number)
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
            if number in self.arm.kernel.device_ids():
                self.nursery.start_soon(self.read, number)
        elif wait and self.pending == 0 and not (name == "slow" and what == "start" and not self.gate.gate.is_set()):
            # A start waits as long as the backend does, in the look for partitions.
            self.learn()
            expected = self.model.answer(what, name, number)
            assert await self.call(what, name, number) == expected, f"{what} {name} {number}: {self.model}"
            assert self.disks() == self.model.disks, f"{what} {name} {number} was answered too soon"
            assert self.sizes() == self.model.sizes, f"{what} {name} {number}: applications see other sizes"
            assert self.bdevs() == self.model.bdevs, f"{what} {name} {number}: {self.model}"
            assert self.awaited() == self.model.awaited, f"{what} {name} {number}: {self.model}"
            assert self.claimed() == self.model.claimed(), f"{what} {name} {number}: {self.model}"
        else:
            self.pending += 1
            self.quiet = trio.Event()
            self.known = False
            self.nursery.start_soon(self.overlapping, what, name, number)
        await trio.testing.wait_all_tasks_blocked()

    def disks(self) -> dict[int, str]:
        return {disk.ublk_id: disk.bdev_name for disk in self.service.disks if disk.ublk_id is not None}

    def sizes(self) -> dict[int, int]:
        disks = self.disks()
        assert set(disks) <= set(self.arm.kernel.device_ids()), "a disk has gone, and is still listed"
        return {number: self.arm.size(number) for number in disks}

    def bdevs(self) -> dict[str, int]:
        return {bdev.name: bdev.size for bdev in self.service.registry}

    def awaited(self) -> dict[str, Awaited]:
        return {
            name: Awaited(
                offline=expected.offline, held={member.bdev.name for member in expected.held if member is not None}
            )
            for name, expected in self.service.expected.items()
        }

    def claimed(self) -> set[str]:
        return {bdev.name for bdev in self.service.registry if bdev.claimed_by is not None}

    def learn(self) -> None:
        """What there is, after calls that overlapped; it must hold together."""
        if self.known:
            return
        service = self.service
        disks = self.disks()
        bdevs = self.bdevs()
        assert set(disks.values()) <= set(bdevs)
        ours = set(self.arm.kernel.device_ids()) - set(disks)
        assert ours <= {LEFT}
        target = service.disks.has_target
        assert target or not disks
        sizes = self.sizes()
        if self.arm.resizes:
            assert sizes == {number: bdevs[name] for number, name in disks.items()}
        self.model = Model(
            resizes=self.arm.resizes,
            target=target,
            bdevs=bdevs,
            awaited=self.awaited(),
            disks=disks,
            sizes=sizes,
            left=ours,
        )
        assert self.claimed() == self.model.claimed()
        for name in STANDS_ON.keys() & bdevs.keys():
            assert name not in self.model.awaited
            assert set(STANDS_ON[name]) <= set(bdevs)
            assert bdevs[name] == self.model._stacked_size(name)
        self.known = True

    async def settle(self) -> None:
        """Every call that is under way is answered."""
        self.gate.gate.set()
        if self.pending:
            with trio.fail_after(BOUND_SECONDS):
                await self.quiet.wait()
        self.learn()


async def run_steps(arm: Arm, steps: list[Step]) -> None:
    """A service on that kernel lives through the steps, and everything is answered; then it ends."""
    async with open_service(arm.kernel) as service, trio.open_nursery() as nursery:
        gate = Gate()
        gate.gate.set()
        made = Made(method="bdev_slow_create", params=dict, specific=dict)
        await service.make(made, "slow", gate, product_name="Slow disk")
        run = Run(arm, service, gate, nursery)
        for step in (*FIRST, *steps):
            await run.step(*step)
        await run.settle()
        # What was read of the disk that nobody serves waits for ever.
        nursery.cancel_scope.cancel()
