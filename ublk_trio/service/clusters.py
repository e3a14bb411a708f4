"""`Clusters`: the connections to Ceph that operators registered, by name; bdevs share them."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from ublk_trio.backends import CephCluster
from ublk_trio.errors import BackendError


@attrs.frozen(kw_only=True, eq=False)
class Registered:
    """A cluster, and what it was registered with."""

    cluster: CephCluster
    params: Mapping[str, Any]


class Clusters:
    """Made by `open_clusters`, never directly."""

    def __init__(self) -> None:
        self._registered: dict[str, Registered] = {}
        self._coming: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        """The names, in the order in which they were registered."""
        return iter(list(self._registered))

    def get(self, name: str) -> Registered:
        """Raises `BackendError` (ENOENT)."""
        found = self._registered.get(name)
        if found is None:
            raise BackendError(
                errno.ENOENT, f"there is no cluster {name!r}: register it with bdev_rbd_register_cluster"
            )
        return found

    async def register(self, name: str, cluster: CephCluster, params: Mapping[str, Any]) -> None:
        """Connect to a cluster. Raises `BackendError`: EEXIST, and what `CephCluster.open` raises."""
        if name in self._registered or name in self._coming:
            raise BackendError(errno.EEXIST, f"there is a cluster {name!r} already: choose another name")
        self._coming.add(name)
        try:
            await cluster.open()
        finally:
            self._coming.discard(name)
        self._registered[name] = Registered(cluster=cluster, params=params)

    async def unregister(self, name: str) -> None:
        """Disconnect from a cluster. Raises `BackendError`: ENOENT; EBUSY while bdevs use it."""
        cluster = self.get(name).cluster
        if cluster.images:
            mend = "delete them first, or wait until those that are being opened or closed have ended"
            raise BackendError(errno.EBUSY, f"{cluster.images} bdevs use cluster {name!r}: {mend}")
        del self._registered[name]
        with trio.CancelScope(shield=True):
            await cluster.aclose()

    async def _close(self) -> None:
        for name in self:
            # One whose image could not be closed stays open: a thread still uses it.
            if not self._registered[name].cluster.images:
                await self.unregister(name)


@asynccontextmanager
async def open_clusters() -> AsyncIterator[Clusters]:
    """No clusters yet. At the end of the block all are disconnected: close first what uses them."""
    clusters = Clusters()
    try:
        yield clusters
    finally:
        await clusters._close()
