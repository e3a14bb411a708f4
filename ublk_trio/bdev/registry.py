"""`Registry`: all bdevs of a process, by name.

**Removal is hot.** A bdev may go at any time. Its users are told, and it is closed when the last of them has let go: a disk
stops, a bdev that stands on it goes in its turn, a mirror goes on without it. From the moment when it is told to go a bdev
cannot be opened, and its name stays taken until it is gone.

**Scopes.** `open_registry` owns a nursery for removals, so that one that was begun goes on when the task that asked for it is
cancelled. At the end of the block every bdev is removed, the youngest first. Users who do not let go then are a bug: after
`RELEASE_SECONDS` it is said with `StuckError`, and what they use stays open, since closing it under them could do harm.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Final
from uuid import UUID

import trio

from ublk_trio.backends import Backend, check_geometry
from ublk_trio.bdev.bdev import Bdev
from ublk_trio.bdev.descriptor import Descriptor
from ublk_trio.errors import BackendError, StuckError
from ublk_trio.nursery import open_plain_nursery

logger = logging.getLogger("ublk_trio.bdev")

#: Seconds that users have to let go at the end of a registry's block. A disk needs its grace time and a little more.
RELEASE_SECONDS: Final = 30.0


class _Removal:
    """The end of one bdev, and what went wrong with it."""

    def __init__(self, *, lost: bool) -> None:
        #: It goes with a bdev that it stands on, and nobody asked for that.
        self.lost = lost
        #: Around the wait for its users.
        self.waiting = trio.CancelScope(shield=True)
        self.over = trio.Event()
        self.failure: Exception | None = None


class Registry:
    """Named backends, in the order in which they were made. Made by `open_registry`, never directly."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        #: Called when a bdev is gone with one that it stood on, which is still going.
        self.on_lost: Callable[[Bdev], None] = lambda bdev: None
        self._bdevs: dict[str, Bdev] = {}
        self._removals: dict[Bdev, _Removal] = {}
        #: Names of those that are being opened, with their UUIDs.
        self._reserved: dict[str, UUID] = {}
        self._added = trio.Event()
        self._closed = False

    def __iter__(self) -> Iterator[Bdev]:
        """Those that can be opened, in the order in which they were made."""
        return iter([bdev for bdev in self._bdevs.values() if not bdev.removing])

    def names(self) -> frozenset[str]:
        """The names that are taken: of bdevs that are there, or are still coming or going."""
        return frozenset(self._bdevs) | frozenset(self._reserved)

    def get(self, name: str) -> Bdev:
        """The bdev of that name, or with that UUID. Raises `BackendError` (ENODEV)."""
        bdev = self._bdevs.get(name)
        if bdev is None:
            bdev = next((each for each in self._bdevs.values() if str(each.uuid) == name.lower()), None)
        if bdev is None or bdev.removing:
            raise BackendError(errno.ENODEV, f"there is no bdev {name!r}: bdev_get_bdevs lists those that there are")
        return bdev

    async def wait_for(self, name: str) -> Bdev:
        """The bdev of that name, or with that UUID, as soon as there is one."""
        while True:
            try:
                return self.get(name)
            except BackendError:
                await self._added.wait()

    def descriptor(self, name: str, *, claim: str | None) -> Descriptor:
        """A view of a bdev for one user, who opens and closes it. Raises `BackendError` (ENODEV)."""
        return Descriptor(self.get(name), claim=claim)

    async def add(
        self,
        name: str,
        backend: Backend,
        *,
        product_name: str,
        uuid: UUID | None = None,
        bases: Sequence[Descriptor] = (),
    ) -> Bdev:
        """Open a backend under a name. The bdev is removed when one of the ``bases`` that the backend stands on is,
        and resized when one of them is.

        Raises `BackendError`: EEXIST when name or UUID is taken; and what the backend's `open` raises. Then, and when
        cancelled, nothing is left of it.
        """
        self._check_open()
        if not name:
            raise BackendError(errno.EINVAL, "a bdev's name is empty: give it one")
        if name in self.names():
            raise BackendError(errno.EEXIST, f"there is a bdev {name!r} already: choose another name")
        bdev = Bdev(name, backend, product_name=product_name, uuid=uuid)
        if bdev.uuid in self._reserved.values() or any(each.uuid == bdev.uuid for each in self._bdevs.values()):
            raise BackendError(errno.EEXIST, f"there is a bdev with uuid {bdev.uuid} already: choose another, or none")
        self._reserved[name] = bdev.uuid
        try:
            await bdev.open()
            try:
                check_geometry(bdev.backend)
                for base in bases:
                    base.on_removed = self._remover(bdev)
                    base.on_resized = bdev.resized
                self._check_open()
                if any(base.bdev.removing for base in bases):
                    raise BackendError(errno.ENODEV, f"what bdev {name!r} stands on is being removed")
            except BaseException:
                with trio.CancelScope(shield=True):
                    await bdev.aclose()
                raise
        finally:
            del self._reserved[name]
        self._bdevs[name] = bdev
        self._added.set()
        self._added = trio.Event()
        return bdev

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError(errno.ESHUTDOWN, "the registry is closed: make bdevs inside its block")

    async def remove(self, name: str) -> None:
        """Remove a bdev; return when its users have let go and its backend is closed.

        Raises `BackendError` (ENODEV) when there is none, and what the backend's `aclose` raises. Cancelled: the removal goes
        on.
        """
        removal = self._begin_removal(self.get(name), lost=False)
        await removal.over.wait()
        if removal.failure is not None:
            raise removal.failure

    def _remover(self, bdev: Bdev) -> Callable[[], None]:
        def remove() -> None:
            if not bdev.removing:
                self._begin_removal(bdev, lost=True)

        return remove

    def _begin_removal(self, bdev: Bdev, *, lost: bool) -> _Removal:
        self._removals[bdev] = removal = _Removal(lost=lost)
        bdev.remove()
        self._nursery.start_soon(self._finish_removal, bdev, removal, name=f"removal of bdev {bdev.name}")
        return removal

    async def _finish_removal(self, bdev: Bdev, removal: _Removal) -> None:
        # Bounded by its users: a disk by its grace time, a bdev above by what is above that.
        with removal.waiting:
            await bdev.wait_unused()
        if removal.waiting.cancelled_caught:
            return
        with trio.CancelScope(shield=True):
            try:
                await bdev.aclose()
            except Exception as failure:
                logger.error("bdev %s: closing failed: %s", bdev.name, failure)
                removal.failure = failure
        del self._bdevs[bdev.name]
        del self._removals[bdev]
        if removal.lost and not self._closed:
            self.on_lost(bdev)
        removal.over.set()

    async def _remove_all(self) -> None:
        self._closed = True
        for bdev in reversed(self._bdevs.values()):
            if not bdev.removing:
                self._begin_removal(bdev, lost=False)
        removals = dict(self._removals)
        with trio.move_on_after(RELEASE_SECONDS, shield=True):
            for removal in removals.values():
                await removal.over.wait()
        stuck = [bdev for bdev in removals if bdev.users]
        for bdev in stuck:
            removals[bdev].waiting.cancel()
        if stuck:
            names = ", ".join(f"{bdev.name} (by {bdev.claimed_by or 'a reader'})" for bdev in stuck)
            raise StuckError(f"bdevs are still in use after {RELEASE_SECONDS:g} s: {names}")


@asynccontextmanager
async def open_registry() -> AsyncIterator[Registry]:
    """A registry. At the end of the block every bdev is removed, shielded from cancellation: close first what uses them.

    Raises `StuckError` when somebody still uses one `RELEASE_SECONDS` later.
    """
    async with open_plain_nursery() as nursery:
        registry = Registry(nursery)
        try:
            yield registry
        finally:
            await registry._remove_all()
