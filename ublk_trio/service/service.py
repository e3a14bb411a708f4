"""`Service`: what an operator's process holds: bdevs, and how each was made; a target, and its disks.

A bdev that stands on others may be asked for before these are there: SPDK's own saved configurations make what stands on a bdev before the
bdev itself. It is expected then, and made as soon as the last of them has come. It may be expected again when it went with one of them.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

import attrs
import msgspec
import trio

from ublk_trio.backends import Backend
from ublk_trio.backends.stacked import Stacked
from ublk_trio.bdev import Bdev, Descriptor, Registry, open_registry
from ublk_trio.errors import BackendError, UsageError
from ublk_trio.nursery import open_plain_nursery
from ublk_trio.ring import Kernel
from ublk_trio.service.clusters import Clusters, open_clusters
from ublk_trio.service.disks import Attend, Disks, leave_alone, open_disks
from ublk_trio.service.expected import Expected

logger = logging.getLogger("ublk_trio.service")


@attrs.frozen(kw_only=True)
class Call:
    """A method with its parameters, as a saved configuration holds it."""

    method: str
    params: Mapping[str, Any]


@attrs.frozen(kw_only=True, eq=False)
class Made:
    """How a bdev was made, as of now: what changed since is in it too."""

    #: The method that makes one like it.
    method: str
    #: What `method` takes, but for name and UUID.
    params: Callable[[], dict[str, Any]]
    #: What only this kind of bdev has to say about itself.
    specific: Callable[[], dict[str, Any]]
    #: What remains to be called when all bdevs are there.
    afterwards: Callable[[], list[Call]] = list
    #: What is expected when it went with a bdev that it stood on; None: nothing.
    when_lost: Callable[[Bdev], Expected | None] = lambda bdev: None


class Service:
    """Made by `open_service`, never directly."""

    def __init__(
        self,
        kernel: Kernel,
        clusters: Clusters,
        registry: Registry,
        disks: Disks,
        tasks: trio.Nursery,
        *,
        unprivileged: bool,
    ) -> None:
        self.kernel = kernel
        #: Where the process may run; a target with a mask confines it to fewer.
        self.cpus = frozenset(os.sched_getaffinity(0))
        #: Whether disks are an ordinary user's if nothing else is said.
        self.unprivileged = unprivileged
        #: Connections to Ceph, which bdevs share.
        self.clusters = clusters
        self.registry = registry
        self.disks = disks
        #: For what goes on after the call that asked for it. Tasks end with the bdevs that they work for, and raise nothing.
        self.tasks = tasks
        #: By the names that they will have.
        self.expected: dict[str, Expected] = {}
        registry.on_lost = self._lost
        self._made: WeakKeyDictionary[Bdev, Made] = WeakKeyDictionary()

    async def make(
        self,
        made: Made,
        name: str,
        backend: Backend,
        *,
        product_name: str,
        uuid: UUID | None = None,
        bases: Sequence[Descriptor] = (),
    ) -> Bdev:
        """Add a bdev to the registry, and then those that were expected on it; see `Registry.add`."""
        self._check_not_expected(name)
        bdev = await self.registry.add(name, backend, product_name=product_name, uuid=uuid, bases=bases)
        self._made[bdev] = made
        for waiting in list(self.expected):
            # One of them may have made another by now.
            if waiting in self.expected:
                await self._look_after(waiting)
        return bdev

    async def make_on(self, name: str, expected: Expected) -> None:
        """Make a bdev that stands on others: now, or as soon as they are there. ``Expected.make`` comes down to `make`.

        Raises `BackendError`: EEXIST; EPERM when a base is claimed; and what ``make`` raises now; what it raises later is logged.
        """
        missing = self.missing(expected.bases)
        if not missing:
            await expected.make()
            return
        self._check_not_expected(name)
        if name in self.registry.names():
            raise BackendError(errno.EEXIST, f"there is a bdev {name!r} already: choose another name")
        try:
            expected.hold(self.registry)
        except BackendError:
            expected.release()
            raise
        self.expected[name] = expected
        logger.warning("bdev %s is made as soon as there is %s", name, " and ".join(missing))

    async def _look_after(self, name: str) -> None:
        """Make one that is expected if all bases are there; else it claims those that are."""
        expected = self.expected[name]
        if expected.offline:
            return
        if self.missing(expected.bases):
            self._hold(name, expected)
        else:
            await self._make_expected(name, expected)

    async def _make_expected(self, name: str, expected: Expected) -> None:
        # Nobody comes between: there is no checkpoint before it has claimed them itself.
        self._forget(name)
        try:
            await expected.make()
        except (OSError, UsageError) as error:
            if self.missing(expected.bases):
                # One went again meanwhile.
                self.expected[name] = expected
                self._hold(name, expected)
            else:
                logger.warning("bdev %s, which was expected, is not made: %s", name, error)

    def _hold(self, name: str, expected: Expected) -> None:
        try:
            expected.hold(self.registry)
        except BackendError as error:
            logger.warning("bdev %s, which is expected: %s", name, error)

    def _forget(self, name: str) -> None:
        self.expected.pop(name).release()

    def _lost(self, bdev: Bdev) -> None:
        """A bdev went with one that it stood on."""
        expected = self._made[bdev].when_lost(bdev)
        if expected is None:
            return
        name = bdev.name
        missing = " and ".join(self.missing(expected.bases))
        self.expected[name] = expected
        self._hold(name, expected)
        if not expected.offline:
            logger.warning("bdev %s is made again as soon as there is %s", name, missing)
        elif any(expected.held):
            logger.warning("bdev %s is offline without %s: it keeps the others until it is deleted", name, missing)
            expected.on_bare = partial(self._forget, name)
        else:
            self._forget(name)

    def missing(self, bases: Sequence[str]) -> list[str]:
        """Those that there is no bdev of."""
        there = {name for bdev in self.registry for name in (bdev.name, str(bdev.uuid))}
        return [base for base in bases if base not in there and base.lower() not in there]

    def _check_not_expected(self, name: str) -> None:
        expected = self.expected.get(name)
        if expected is not None and expected.offline:
            raise BackendError(errno.EEXIST, f"bdev {name!r} is offline: delete it, or choose another name")
        if expected is not None:
            missing = " and ".join(self.missing(expected.bases))
            raise BackendError(errno.EEXIST, f"bdev {name!r} waits for {missing} already: choose another name")

    def made(self, bdev: Bdev) -> Made:
        """How it was made."""
        return self._made[bdev]

    def find(self, name: str, method: str) -> Bdev:
        """The bdev of that name, made by that method. Raises `BackendError` (ENODEV)."""
        bdev = self.registry.get(name)
        maker = self._made[bdev].method
        if maker != method:
            raise BackendError(errno.ENODEV, f"bdev {name!r} was made by {maker}, not by {method}")
        return bdev

    async def delete(self, name: str, method: str) -> bool:
        """Remove the bdev of that name, made by that method; return true when it is gone. Raises `BackendError`.

        One that is expected is expected no more.
        """
        expected = self.expected.get(name)
        if expected is not None and expected.call.method == method:
            self._forget(name)
            return True
        self.find(name, method)
        await self.registry.remove(name)
        return True

    def free_name(self, prefix: str) -> str:
        """A name that no bdev has: the prefix with the first number that is free."""
        taken = self.registry.names() | self.expected.keys()
        return next(name for number in itertools.count() if (name := f"{prefix}{number}") not in taken)

    def calls(self) -> list[Call]:
        """The calls that make all bdevs again, in an order in which each finds what it stands on, if that is there.

        What went with a bdev is not made again, as that bdev is not.
        """
        calls: dict[Bdev, Call] = {}

        def add(bdev: Bdev) -> None:
            # A member that joined later is younger than what stands on it.
            for base in bdev.backend.bases if isinstance(bdev.backend, Stacked) else ():
                if isinstance(base.backend, Descriptor) and base.backend.bdev not in calls:
                    add(base.backend.bdev)
            made = self._made[bdev]
            params = {"name": bdev.name, **made.params(), "uuid": str(bdev.uuid)}
            calls[bdev] = Call(method=made.method, params=params)

        for bdev in self.registry:
            if bdev not in calls:
                add(bdev)
        return [
            *calls.values(),
            *(expected.call for expected in self.expected.values() if not expected.lost),
            *(call for bdev in calls for call in self._made[bdev].afterwards()),
        ]


def call_of(method: str, params: msgspec.Struct) -> Call:
    """A call as it was made, for a saved configuration; what was left out, or given as null, is left out."""
    given = msgspec.to_builtins(params)
    return Call(method=method, params={key: value for key, value in given.items() if value is not None})


@asynccontextmanager
async def open_service(
    kernel: Kernel, *, attend: Attend = leave_alone, unprivileged: bool = False
) -> AsyncIterator[Service]:
    """A service on a kernel. At the end of the block its disks stop, then its bdevs close, then its clusters."""
    async with (
        open_plain_nursery() as tasks,
        open_clusters() as clusters,
        open_registry() as registry,
        open_disks(kernel, registry, attend=attend) as disks,
    ):
        yield Service(kernel, clusters, registry, disks, tasks, unprivileged=unprivileged)
