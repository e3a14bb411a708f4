"""Servers with backends that the command line has not got, each in a process of its own."""

from __future__ import annotations

import functools
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import trio

from tests.kernel.forking import ForkedProcess, fork
from tests.kernel.programs import START_SECONDS_MAX, STOP_SECONDS_MAX
from ublk_trio import Backend, DeviceOptions, RealKernel, open_target


class ForkedServer:
    """A process that serves one disk. Made by `ForkedServers.start`."""

    def __init__(self, process: ForkedProcess, dev_id: int) -> None:
        self.dev_id = dev_id
        self.disk = f"/dev/ublkb{dev_id}"
        self._process = process

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    async def kill(self) -> None:
        """End it by SIGKILL; return when it is gone."""
        self._process.kill()
        assert await self._exit_code() == -signal.SIGKILL

    async def stop(self) -> None:
        """Have it stop its disk and end, which it must do well."""
        self._process.terminate()
        assert await self._exit_code() == 0

    async def _exit_code(self) -> int:
        with trio.fail_after(STOP_SECONDS_MAX):
            return await self._process.wait()


class ForkedServers:
    """Made by `forked_servers`."""

    def __init__(self) -> None:
        self._servers: list[ForkedServer] = []

    async def start(
        self, make_backend: Callable[[], Backend], options: DeviceOptions, *, recovers: int | None = None
    ) -> ForkedServer:
        """A server whose disk is live: a new one, or with ``recovers`` the one of that id that a killed server left.

        ``make_backend`` is called in the server; it and its result's class are to be found by name in a module.
        """
        live, tell = Pipe(duplex=False)
        with live:
            with tell:
                process = fork(_serve, make_backend, options, recovers, tell)
            with trio.fail_after(START_SECONDS_MAX):
                await trio.lowlevel.wait_readable(live)
            try:
                server = ForkedServer(process, live.recv())
            except EOFError:
                raise AssertionError("the server ended before its disk was live; what it said is on stderr") from None
        self._servers.append(server)
        return server

    async def end(self) -> None:
        """No server outlives the test."""
        for server in self._servers:
            if server.is_running:
                await server.kill()


@asynccontextmanager
async def forked_servers() -> AsyncIterator[ForkedServers]:
    """Starts servers; those that still run at the end of the block are killed."""
    servers = ForkedServers()
    try:
        yield servers
    finally:
        with trio.CancelScope(shield=True):
            await servers.end()


def _serve(make_backend: Callable[[], Backend], options: DeviceOptions, recovers: int | None, live: Connection) -> None:
    trio.run(functools.partial(_serve_until_signal, make_backend, options, recovers, live))


async def _serve_until_signal(
    make_backend: Callable[[], Backend], options: DeviceOptions, recovers: int | None, live: Connection
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with open_target(RealKernel()) as target:
            if recovers is None:
                device = await target.start_device(make_backend(), options)
            else:
                device = await target.recover_device(recovers, make_backend(), options)
            with live:
                live.send(device.dev_id)
            await anext(aiter(signals))
