"""Wherever a server is cancelled, and wherever a client breaks off, nothing is left and nothing is done by halves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Literal

import attrs
import pytest
import trio
import trio.testing

from tests.rpc.fake_table import Service
from tests.rpc.harness import Client, make_dispatcher, open_files, socket_path
from ublk_trio.rpc import Bounds, RpcServer, serve_rpc

How = Literal["cancel the server", "drop the client", "drop the client, stop the server"]
#: The scenario must end within so many steps, or the loop over all of them would not.
STEPS_MAX = 2_000
#: Virtual: the scenario's calls together take less, and so does the server's end.
SECONDS_MAX = 100.0
LONGEST_CALL_SECONDS = 30.0


class _AtStep(trio.abc.Instrument):
    """Calls back before the step with a given number."""

    def __init__(self, number: int, interrupt: Callable[[], None]) -> None:
        self.number = number
        self.steps = 0
        self._interrupt = interrupt

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if "<init>" in task.name:
            return
        self.steps += 1
        if self.steps == self.number:
            self._interrupt()


@attrs.define
class Scenario:
    """A client with quick and slow calls, a batch, garbage at the end; and a second one that waits."""

    path: str
    how: How
    service: Service = attrs.Factory(Service)
    serving: trio.CancelScope = attrs.Factory(trio.CancelScope)
    calling: trio.CancelScope = attrs.Factory(trio.CancelScope)
    server: RpcServer | None = None
    completed: bool = False

    def interrupt(self) -> None:
        if self.how != "cancel the server":
            self.calling.cancel()
        if self.how != "drop the client":
            self.serving.cancel()

    async def main(self) -> None:
        dispatcher = make_dispatcher(self.service, [])
        bounds = Bounds(requests=3, grace_seconds=2, request_seconds=5, answer_seconds=5)
        with trio.move_on_after(SECONDS_MAX) as bound:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._serve, dispatcher, bounds)
                if not self.serving.cancel_called:
                    with self.calling:
                        async with trio.open_nursery() as clients:
                            clients.start_soon(self._talk)
                            clients.start_soon(self._wait)
                    self.completed = not self.calling.cancelled_caught
                    if self.how == "drop the client":
                        await trio.sleep(
                            LONGEST_CALL_SECONDS
                        )  # what was asked for is carried out, with nobody to answer
                self.serving.cancel()
        assert not bound.cancelled_caught, "nothing hangs"

    async def _serve(
        self, dispatcher: object, bounds: Bounds, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with self.serving:
            async with trio.open_nursery() as nursery:
                self.server = await nursery.start(
                    lambda task_status: serve_rpc(self.path, dispatcher, bounds=bounds, task_status=task_status)  # type: ignore[arg-type]
                )
                task_status.started()
        if self.server is None:
            task_status.started()

    async def _talk(self) -> None:
        try:
            async with Client(await trio.open_unix_socket(self.path)) as client:
                for name, seconds in (("a", 0.5), ("b", LONGEST_CALL_SECONDS), ("c", 0.5), ("d", 0.1)):
                    await client.ask("sleep", {"name": name, "seconds": seconds}, id=name)
                    await client.ask("note", {"name": f"after {name}"})
                await client.send(json.dumps([{"method": "note", "params": {"name": "batch"}}] * 2))
                await client.ask("finish_anyway", {"name": "e", "seconds": 1})
                await client.ask("fill", {"length": 1_000_000})
                await client.answer()
                await client.send("garbage")
                while await client.answer() is not None:
                    pass
        except (OSError, trio.BrokenResourceError):
            assert self.serving.cancel_called, "only a server that stops hangs up"

    async def _wait(self) -> None:
        try:
            async with Client(await trio.open_unix_socket(self.path)) as client:
                await client.ask("watch", {"name": "watch"})
                with trio.move_on_after(1):
                    await client.answer()
        except (OSError, trio.BrokenResourceError):
            assert self.serving.cancel_called, "only a server that stops hangs up"

    def check(self) -> None:
        service = self.service
        assert sorted(service.began) == sorted(service.ended + service.cancelled), "each call ends once"
        allowed = {"watch"} | ({"a", "b", "c", "d"} if self.how != "drop the client" else set())
        assert set(service.cancelled) <= allowed, "a call is cancelled only when it may be"
        assert self.server is None or self.server.statistics().connections == 0
        assert os.listdir(os.path.dirname(self.path)) == []


def interrupted_at(number: int, how: How) -> bool:
    """Run the scenario, interrupt it before step ``number``, and check what is left. False if it ended before."""
    with socket_path() as path:
        scenario = Scenario(path, how)
        at_step = _AtStep(number, scenario.interrupt)
        clock = trio.testing.MockClock(autojump_threshold=0)
        trio.run(scenario.main, clock=clock, instruments=[at_step])
        scenario.check()
    assert scenario.completed or at_step.steps >= number, "a run that nothing interrupted completes the scenario"
    return at_step.steps >= number


@pytest.mark.parametrize("how", ["cancel the server", "drop the client", "drop the client, stop the server"])
def test_interrupted_at_every_step(how: How) -> None:
    """Wherever it happens, every call that has begun ends once, calls that nobody may cancel end by themselves, nothing is left."""
    before = open_files()
    for number in range(1, STEPS_MAX):
        try:
            interrupted = interrupted_at(number, how)
        except BaseException as broken:
            broken.add_note(f"interrupted before step {number}")
            raise
        assert open_files() == before, f"no file is left open, interrupted before step {number}"
        if not interrupted:
            assert number > 60, "the scenario has steps to interrupt"
            return
    raise AssertionError(f"the scenario does not end within {STEPS_MAX} steps")
