"""A service on a simulated kernel, called as clients call it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import attrs
import pytest

from ublk_trio import SimKernel
from ublk_trio.rpc import Dispatcher, ErrorCode
from ublk_trio.rpc.errors import explain
from ublk_trio.service.methods import METHODS
from ublk_trio.service.service import Service, open_service

#: Blocks of 512 bytes of each bdev that `Bench.malloc` makes.
BLOCKS = 2048


@attrs.frozen
class Bench:
    kernel: SimKernel
    service: Service
    dispatcher: Dispatcher

    async def call(self, method: str, **params: Any) -> Any:
        return await self.dispatcher.call(method, params)

    async def malloc(self, *names: str, blocks: int = BLOCKS) -> None:
        for name in names:
            await self.call("bdev_malloc_create", name=name, block_size=512, num_blocks=blocks)

    async def start(self, bdev: str, ublk_id: int = 0, **params: Any) -> Any:
        """Serve a bdev as a disk; its applications' end."""
        await self.call("ublk_start_disk", bdev_name=bdev, ublk_id=ublk_id, **params)
        return self.kernel.block_device(ublk_id)

    async def bdev(self, name: str) -> Any:
        (found,) = await self.call("bdev_get_bdevs", name=name)
        return found

    async def names(self) -> list[str]:
        return [bdev["name"] for bdev in await self.call("bdev_get_bdevs")]


@asynccontextmanager
async def open_bench(
    *, kernel: SimKernel | None = None, target: bool = True, unprivileged: bool = False
) -> AsyncIterator[Bench]:
    kernel = kernel or SimKernel(paranoid=True)
    async with open_service(kernel, unprivileged=unprivileged) as service:
        dispatcher = Dispatcher()
        dispatcher.register(METHODS, service)
        bench = Bench(kernel, service, dispatcher)
        if target:
            await bench.call("ublk_create_target")
        yield bench
    assert not kernel.leftovers()
    assert not kernel.violations


@contextmanager
def refused(code: int, says: str = "") -> Iterator[None]:
    """A client gets this: an errno, or -32602 and the like."""
    with pytest.raises(Exception) as raised:  # noqa: PT011 - whatever it is, the client is told the code below
        yield
    error = explain(raised.value)
    assert error.code == (code if code < 0 else -code), error
    assert says in error.message
    assert len(error.message.splitlines()) == 1


INVALID = int(ErrorCode.INVALID_PARAMS)
