"""`Bdev`: a backend with a name, and the list of those who use it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import trio

from ublk_trio.backends import Backend, Limited, Limits, capabilities
from ublk_trio.bdev.counters import Counters
from ublk_trio.errors import BackendError

if TYPE_CHECKING:
    from ublk_trio.bdev.descriptor import Descriptor


class Bdev:
    """A named backend. Made by `Registry.add`, which opened it, and closed when it is removed.

    It can be given limits at any time. Until it has some for the first time its users call the backend directly, so that
    limits cost only those who have them.

    Any number of users may read it. One at a time may claim it: only the claim's holder writes, and knows that nobody else
    does.
    """

    def __init__(self, name: str, backend: Backend, *, product_name: str, uuid: UUID | None) -> None:
        self.name = name
        self._limited = Limited(backend)
        #: What it is made of. A `File` has become a `ThreadedFile`.
        self.backend = self._limited.base.backend
        #: What its users call: a backend, with those of the optional methods that are `offered`.
        self.serving: Any = self.backend
        #: What kind of bdev it is, for people: ``Malloc disk``.
        self.product_name = product_name
        self.uuid = uuid or uuid4()
        self.counters = Counters()
        #: Set when it is about to go: it can no longer be opened.
        self.removing = False
        self._descriptors: list[Descriptor] = []
        self._unused = trio.Event()
        self._unused.set()

    @property
    def limits(self) -> Limits:
        """How much it carries out in a second."""
        return self._limited.limits

    def set_limits(self, limits: Limits) -> None:
        """Puts limits in force, at once and for requests that wait, too."""
        self._limited.set_limits(limits)
        self.serving = self._limited

    async def open(self) -> None:
        """Opens the backend."""
        await self._limited.open()

    async def aclose(self) -> None:
        """Closes the backend."""
        await self._limited.aclose()

    @property
    def block_size(self) -> int:
        """Bytes."""
        return self.backend.block_size

    @property
    def size(self) -> int:
        """Bytes."""
        return self.backend.size

    @property
    def offered(self) -> frozenset[str]:
        """The methods that it answers."""
        return capabilities(self.backend)

    @property
    def claimed_by(self) -> str | None:
        """Who holds the claim."""
        return next((each.claim for each in self._descriptors if each.claim is not None), None)

    @property
    def users(self) -> int:
        """How many have it open."""
        return len(self._descriptors)

    def attach(self, descriptor: Descriptor) -> None:
        """Enters a user. Raises `BackendError`: ENODEV when it is being removed, EPERM when the claim is taken."""
        if self.removing:
            raise BackendError(errno.ENODEV, f"bdev {self.name} is being removed")
        holder = self.claimed_by
        if descriptor.claim is not None and holder is not None:
            raise BackendError(
                errno.EPERM, f"bdev {self.name} is claimed by {holder}: delete or stop what uses it, or take another"
            )
        self._descriptors.append(descriptor)
        self._unused = trio.Event()

    def detach(self, descriptor: Descriptor) -> None:
        """Takes a user out, and gives its claim back."""
        self._descriptors.remove(descriptor)
        if not self._descriptors:
            self._unused.set()

    async def resized(self) -> None:
        """Tells every user that `size` is another one. Call it when the backend has it already."""
        self._limited.settle()
        for descriptor in tuple(self._descriptors):
            await descriptor.on_resized()

    def remove(self) -> None:
        """From now on nobody can open it, and its users are told to let go. Repeatable."""
        if self.removing:
            return
        self.removing = True
        for descriptor in tuple(self._descriptors):
            descriptor.on_removed()

    async def wait_unused(self) -> None:
        """Returns when nobody has it open."""
        while self._descriptors:
            await self._unused.wait()

    def __repr__(self) -> str:
        return f"<Bdev {self.name}: {self.backend}>"
