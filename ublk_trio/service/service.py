"""`Service`: what an operator's process holds: bdevs, and how each was made; a target, and its disks."""

from __future__ import annotations

import errno
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

import attrs
import trio

from ublk_trio.backends import Backend
from ublk_trio.backends.stacked import Stacked
from ublk_trio.bdev import Bdev, Descriptor, Registry, open_registry
from ublk_trio.errors import BackendError
from ublk_trio.nursery import open_plain_nursery
from ublk_trio.ring import Kernel
from ublk_trio.service.disks import Attend, Disks, leave_alone, open_disks


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


class Service:
    """Made by `open_service`, never directly."""

    def __init__(self, kernel: Kernel, registry: Registry, disks: Disks, tasks: trio.Nursery) -> None:
        self.kernel = kernel
        self.registry = registry
        self.disks = disks
        #: For what goes on after the call that asked for it. Tasks end with the bdevs that they work for, and raise nothing.
        self.tasks = tasks
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
        """Add a bdev to the registry; see `Registry.add`."""
        bdev = await self.registry.add(name, backend, product_name=product_name, uuid=uuid, bases=bases)
        self._made[bdev] = made
        return bdev

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
        """Remove the bdev of that name, made by that method; return true when it is gone. Raises `BackendError`."""
        self.find(name, method)
        await self.registry.remove(name)
        return True

    def free_name(self, prefix: str) -> str:
        """A name that no bdev has: the prefix with the first number that is free."""
        taken = self.registry.names()
        return next(name for number in itertools.count() if (name := f"{prefix}{number}") not in taken)

    def calls(self) -> list[Call]:
        """The calls that make all bdevs again, in an order in which each finds what it stands on."""
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
        return [*calls.values(), *(call for bdev in calls for call in self._made[bdev].afterwards())]


@asynccontextmanager
async def open_service(kernel: Kernel, *, attend: Attend = leave_alone) -> AsyncIterator[Service]:
    """A service on a kernel. At the end of the block its disks stop, then its bdevs close."""
    async with (
        open_plain_nursery() as tasks,
        open_registry() as registry,
        open_disks(kernel, registry, attend=attend) as disks,
    ):
        yield Service(kernel, registry, disks, tasks)
