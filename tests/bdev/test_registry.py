"""Whatever is opened, claimed, removed and cancelled, in whatever order: the registry does what its model does."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import attrs
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.errnos import raises
from tests.search import check_noticed
from ublk_trio import BackendError, Memory, StuckError
from ublk_trio.backends import Backend
from ublk_trio.bdev import Bdev, Descriptor, Registry, open_registry
from ublk_trio.bdev.counters import Counters
from ublk_trio.bdev.registry import RELEASE_SECONDS

SIZE = 64 * 1024


class Watched(Memory):
    """Says how often it was opened and closed."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.opened = self.closed = 0

    async def open(self) -> None:
        self.opened += 1
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.closed += 1


class SlowToOpen(Memory):
    """Opens when it is told to."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.go_on = trio.Event()

    async def open(self) -> None:
        await self.go_on.wait()


async def add(registry: Registry, name: str, backend: Backend | None = None, **options: Any) -> Bdev:
    return await registry.add(name, backend or Watched(), product_name="Watched disk", **options)


# By hand ----------------------------------------------------------------------------------------------------------------


async def test_one_writer_at_a_time() -> None:
    """A second claim is refused with EPERM and names the first; it is free again when the first has closed."""
    async with open_registry() as registry:
        bdev = await add(registry, "a")
        first, second = registry.descriptor("a", claim="first"), registry.descriptor("a", claim="second")
        await first.open()
        assert bdev.claimed_by == "first"
        with pytest.raises(BackendError, match="first") as refused:
            await second.open()
        assert refused.value.errno == errno.EPERM
        reader = registry.descriptor("a", claim=None)
        await reader.open()
        assert reader.read_only
        assert not first.read_only
        await first.aclose()
        await second.open()
        assert bdev.claimed_by == "second"
        await second.aclose()
        await reader.aclose()


async def test_names_and_uuids_are_unique() -> None:
    """A name or UUID that is taken is EEXIST, also while the first is still being opened; an empty name is EINVAL."""
    async with open_registry() as registry:
        bdev = await add(registry, "a")
        with raises(errno.EEXIST):
            await add(registry, "a")
        with raises(errno.EEXIST):
            await add(registry, "b", uuid=bdev.uuid)
        with raises(errno.EINVAL):
            await add(registry, "")
        assert registry.get(str(bdev.uuid).upper()) is bdev
        assert [each.name for each in registry] == ["a"]
        uuid = uuid4()
        slow = SlowToOpen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(functools.partial(add, registry, "c", slow, uuid=uuid))
            await trio.testing.wait_all_tasks_blocked()
            for name, other in (("c", None), ("d", uuid)):
                with raises(errno.EEXIST):
                    await add(registry, name, uuid=other)
            slow.go_on.set()


async def test_what_stands_on_a_removed_bdev_goes_too() -> None:
    """Removing the lowest of three takes those above it along, closes from the top, and waits for all of it."""
    order: list[str] = []

    class Top(Watched):
        def __init__(self, name: str, base: Descriptor) -> None:
            super().__init__()
            self.name, self.base = name, base

        async def open(self) -> None:
            await self.base.open()

        async def aclose(self) -> None:
            order.append(self.name)
            await self.base.aclose()

    async with open_registry() as registry:
        await add(registry, "a")
        for above, below in (("b", "a"), ("c", "b")):
            base = registry.descriptor(below, claim=above)
            await add(registry, above, Top(above, base), bases=[base])
        await registry.remove("a")
        assert not list(registry)
        assert order == ["c", "b"]


async def test_removal_waits_for_users_and_goes_on_when_cancelled() -> None:
    """A bdev in use stays open until its user lets go; nobody new gets in; its name is taken until it is gone."""
    async with open_registry() as registry:
        backend = Watched()
        await add(registry, "a", backend)
        told: list[str] = []
        user = registry.descriptor("a", claim="user")
        user.on_removed = lambda: told.append("removed")
        await user.open()
        late = registry.descriptor("a", claim=None)
        with trio.move_on_after(0.01) as scope:
            await registry.remove("a")
        assert scope.cancelled_caught
        assert told == ["removed"]
        assert backend.closed == 0
        with raises(errno.ENODEV):
            await late.open()
        with raises(errno.ENODEV):
            registry.get("a")
        with raises(errno.ENODEV):
            await registry.remove("a")
        with raises(errno.EEXIST):
            await add(registry, "a")
        await user.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert backend.closed == 1
        await add(registry, "a")


async def test_failures_leave_nothing() -> None:
    """What fails or is cancelled while it opens is closed again, and its name is free."""

    class Fails(Watched):
        async def open(self) -> None:
            raise OSError(errno.ENXIO, "no medium")

    class BadSize(Watched):
        async def open(self) -> None:
            self.opened += 1
            self.size = 7

    class Hangs(Watched):
        async def open(self) -> None:
            await trio.sleep_forever()

    async with open_registry() as registry:
        with pytest.raises(OSError, match="no medium"):
            await add(registry, "a", Fails())
        backend = BadSize()
        with pytest.raises(ValueError, match="size 7"):
            await add(registry, "a", backend)
        assert backend.closed == 1
        with trio.move_on_after(0.01):
            await add(registry, "a", Hangs())
        await add(registry, "a")


async def test_a_failing_close_reaches_the_remover() -> None:
    """The bdev is gone all the same, and whoever removed it hears why it did not end well."""

    class Fails(Watched):
        async def aclose(self) -> None:
            raise OSError(errno.EIO, "cannot close")

    async with open_registry() as registry:
        await add(registry, "a", Fails())
        with pytest.raises(OSError, match="cannot close"):
            await registry.remove("a")
        assert not list(registry)


async def test_the_end_of_the_block_closes_everything() -> None:
    """Also when it is cancelled; and afterwards nothing can be made."""
    backends = [Watched() for _ in range(3)]
    with trio.CancelScope() as scope:
        async with open_registry() as registry:
            for number, backend in enumerate(backends):
                await add(registry, str(number), backend)
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert [(each.opened, each.closed) for each in backends] == [(1, 1)] * 3
    with raises(errno.ESHUTDOWN):
        await add(registry, "late")


async def test_users_who_never_let_go(autojump_clock: trio.testing.MockClock) -> None:
    """The end of the block is bounded: it names what is stuck, and leaves that open rather than close it under its user."""
    backend = Watched()

    async def never_lets_go() -> None:
        async with open_registry() as registry:
            await add(registry, "a", backend)
            await add(registry, "b")
            await registry.descriptor("a", claim="user").open()

    with pytest.raises(StuckError, match=r"a \(by user\)"):
        await never_lets_go()
    assert trio.current_time() >= RELEASE_SECONDS
    assert backend.closed == 0


# What is counted --------------------------------------------------------------------------------------------------------


class Mixed(Memory):
    """Answers at once or later, all or part of it, or fails, as told."""

    awaits = True
    later = False
    failure: Exception | None = None

    def read(self, offset: int, buffer: memoryview) -> Any:
        if not self.later and self.failure is not None:
            raise self.failure
        return self._later() if self.later else 512

    async def _later(self) -> int:
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        return 1024

    def flush(self) -> None:
        """There is a cache, so to speak."""


async def read_once(backend: Any, buffer: memoryview) -> Any:
    outcome = backend.read(0, buffer)
    return outcome if isinstance(outcome, int) else await outcome


def test_times() -> None:
    """The shortest, the longest and all together, whatever comes first; those that failed count too."""
    counters = Counters()
    for ns in (5, 3, 9, 4):
        counters.done("read", 512, ns)
    counters.failed("read", OSError(errno.EIO, "broken"), 2)
    read = counters.statistics().operations["read"]
    assert (read.min_ns, read.max_ns, read.total_ns, read.count) == (2, 9, 23, 5)


async def test_counters() -> None:
    """Each operation is counted once with its bytes; a failure by errno, with none; whatever way it was answered."""
    async with open_registry() as registry:
        backend = Mixed(SIZE)
        bdev = await add(registry, "a", backend)
        user: Any = registry.descriptor("a", claim="user")
        await user.open()
        buffer = memoryview(bytearray(4096))
        assert user.read(0, buffer) == 512
        backend.later = True
        assert await user.read(0, buffer) == 1024
        for backend.later in (False, True):
            for backend.failure in (OSError(errno.ENOSPC, "full"), ValueError("bug")):
                with pytest.raises((OSError, ValueError)):
                    await read_once(user, buffer)
        user.write(0, buffer, fua=False)
        user.discard(0, 8192)
        user.write_zeroes(0, 512, unmap=True)
        user.flush()
        statistics = bdev.counters.statistics()
        counted = {name: (each.count, each.bytes) for name, each in statistics.operations.items()}
        assert counted == {
            "read": (6, 1536),
            "write": (1, 4096),
            "discard": (1, 8192),
            "write_zeroes": (1, 512),
            "flush": (1, 0),
        }
        assert statistics.errors == {errno.ENOSPC: 2, errno.EIO: 2}
        read = statistics.operations["read"]
        assert 0 < read.min_ns <= read.max_ns <= read.total_ns
        bdev.counters.reset()
        assert bdev.counters.statistics() == Counters().statistics()
        await user.aclose()


async def test_a_new_size_reaches_every_user() -> None:
    """Their view has the new size when they are told."""
    async with open_registry() as registry:
        backend = Watched()
        bdev = await add(registry, "a", backend)
        users = [registry.descriptor("a", claim=claim) for claim in ("writer", None)]
        seen: list[int] = []

        async def note_size(user: Descriptor) -> None:
            seen.append(user.size)

        for user in users:
            await user.open()
            user.on_resized = functools.partial(note_size, user)
        backend.size = SIZE // 2
        await bdev.resized()
        assert seen == [SIZE // 2] * 2
        for user in users:
            await user.aclose()


# Any order --------------------------------------------------------------------------------------------------------------


@attrs.define
class Model:
    """What a registry is, without tasks: names with their claim and users; a removed one waits for its users."""

    #: name -> the descriptors that have it open
    users: dict[str, list[Descriptor]] = attrs.field(factory=dict)
    removing: set[str] = attrs.field(factory=set)

    def claimed(self, name: str) -> bool:
        return any(user.claim is not None for user in self.users[name])

    def settle(self) -> None:
        for name in [name for name in self.removing if not self.users[name]]:
            self.removing.remove(name)
            del self.users[name]


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "open", "claim", "close", "remove"]), st.sampled_from("ab"), st.integers(0, 3)),
    min_size=8,
    max_size=30,
)


async def run_steps(steps: list[tuple[str, str, int]]) -> None:
    model = Model()
    backends: dict[str, Watched] = {}
    async with open_registry() as registry, trio.open_nursery() as nursery:

        async def remove(name: str) -> None:
            await registry.remove(name)

        for what, name, number in steps:
            there = name in model.users and name not in model.removing
            if what == "add":
                backend = Watched()
                if name in model.users:
                    with raises(errno.EEXIST):
                        await add(registry, name, backend)
                else:
                    await add(registry, name, backend)
                    model.users[name], backends[name] = [], backend
            elif what in ("open", "claim"):
                claim = "somebody" if what == "claim" else None
                if not there:
                    with raises(errno.ENODEV):
                        registry.descriptor(name, claim=claim)
                elif claim is not None and model.claimed(name):
                    with raises(errno.EPERM):
                        await registry.descriptor(name, claim=claim).open()
                else:
                    user = registry.descriptor(name, claim=claim)
                    user.on_removed = functools.partial(setattr, user, "told", True)
                    try:
                        await user.open()
                    except BackendError as error:
                        raise AssertionError(f"{what} {name} was refused") from error
                    model.users[name].append(user)
            elif what == "close" and model.users.get(name):
                users = model.users[name]
                await users.pop(number % len(users)).aclose()
            elif what == "remove" and there:
                nursery.start_soon(remove, name)
                model.removing.add(name)
            await trio.testing.wait_all_tasks_blocked()
            model.settle()
            assert [bdev.name for bdev in registry] == [each for each in model.users if each not in model.removing]
            for each, users in model.users.items():
                assert backends[each].closed == 0, "closed while it has a name"
                assert all(getattr(user, "told", False) == (each in model.removing) for user in users)
            for each, backend in backends.items():
                assert backend.closed == (each not in model.users)
        for users in model.users.values():
            for user in users:
                await user.aclose()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(STEPS)
def test_any_order(steps: list[tuple[str, str, int]]) -> None:
    """Names, claims, users, and what is open agree with the model after every step."""
    trio.run(run_steps, steps)


# Planted bugs -----------------------------------------------------------------------------------------------------------


def claim_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bdev, "claimed_by", property(lambda bdev: getattr(bdev, "_ever", None)))
    attach = Bdev.attach

    def planted(bdev: Bdev, descriptor: Descriptor) -> None:
        attach(bdev, descriptor)
        bdev._ever = getattr(bdev, "_ever", None) or descriptor.claim  # type: ignore[attr-defined]

    monkeypatch.setattr(Bdev, "attach", planted)


def two_may_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bdev, "claimed_by", property(lambda bdev: None))


def closed_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    async def planted(bdev: Bdev) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(Bdev, "wait_unused", planted)


def users_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bdev, "remove", lambda bdev: setattr(bdev, "removing", True))


def removed_is_still_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Registry, "__iter__", lambda registry: iter(list(registry._bdevs.values())))


def first_to_close_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(bdev: Bdev, descriptor: Descriptor) -> None:
        bdev._descriptors.clear()
        bdev._unused.set()

    monkeypatch.setattr(Bdev, "detach", planted)


PLANTED: list[Callable[[pytest.MonkeyPatch], None]] = [
    claim_is_kept,
    two_may_claim,
    closed_in_use,
    users_are_not_told,
    removed_is_still_listed,
    first_to_close_ends_it,
]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: str(plant.__name__))
def test_a_planted_bug_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model notices each of these bugs."""
    plant(monkeypatch)

    def run(steps: list[tuple[str, str, int]]) -> None:
        # Where a bug leaves somebody waiting, the bound of the registry's end comes at once.
        trio.run(run_steps, steps, clock=trio.testing.MockClock(autojump_threshold=0.01))

    check_noticed(run, STEPS, examples=300)
