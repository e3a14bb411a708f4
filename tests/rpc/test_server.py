"""The server: calls side by side, bounds, clients that misbehave or go away, and its end."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import socket
from typing import Any
from unittest import mock

import pytest
import trio
import trio.testing

from tests.rpc.harness import Served, open_files, served, settle
from ublk_trio.rpc import Bounds, State
from ublk_trio.rpc.connection import Connection

Clock = trio.testing.MockClock


# Side by side ---------------------------------------------------------------------------------------------------------


async def test_a_long_call_blocks_nobody(autojump_clock: Clock) -> None:
    """While a call waits, others on its connection and on another are answered at once."""
    async with served() as run, await run.connect() as one, await run.connect() as other:
        await one.ask("hold", {"name": "long"}, id="long")
        begin = trio.current_time()
        for client in (one, other):
            assert (await client.call("note", id=2))["id"] == 2
        assert trio.current_time() == begin
        run.service.hold.set()
        assert (await one.answer())["id"] == "long"


@pytest.mark.parametrize("seed", range(5))
async def test_calls_begin_in_the_order_of_their_requests(seed: int, autojump_clock: Clock) -> None:
    """However Trio orders its tasks, calls begin as they were sent, and those that wait for nothing end so."""
    order = random.Random(seed)
    async with served() as run, await run.connect() as client:
        requests = [
            {"method": "sleep", "params": {"name": str(number), "seconds": 1}, "id": number}
            if order.random() < 0.4
            else {"method": "note", "params": {"name": str(number)}, "id": number}
            for number in range(30)
        ]
        await client.send("".join(map(json.dumps, requests)))
        answers = await client.answers(30)
        assert run.service.began == [str(number) for number in range(30)]
        quick = [request["id"] for request in requests if request["method"] == "note"]
        assert [answer["id"] for answer in answers][: len(quick)] == quick


async def test_answers_are_not_mixed(autojump_clock: Clock) -> None:
    """Large answers that become ready at the same time come one after the other, whole."""
    async with served() as run, await run.connect() as client:
        for number in range(8):
            await client.ask("fill", {"length": 400_000 + number}, id=number)
        answers = await client.answers(8)
        assert None not in answers, "the connection does not break"
        seen = {answer["id"]: len(answer["result"]) for answer in answers}
        assert seen == {number: 400_000 + number for number in range(8)}


async def test_answers_are_ascii(autojump_clock: Clock) -> None:
    """A client may decode each piece that it reads: no character of an answer is longer than a byte."""
    async with served() as run, await run.connect() as client:
        await client.ask("echo", {"value": "é€😀"}, id="ü")
        data = await client.stream.receive_some(1000)
        assert data.isascii()
        assert json.loads(data) == {"jsonrpc": "2.0", "id": "ü", "result": "é€😀"}


# Bounds ---------------------------------------------------------------------------------------------------------------


async def test_requests_in_progress_are_bounded(autojump_clock: Clock) -> None:
    """Beyond the bound nothing more is begun, nor read: a client that goes on sending has to wait."""
    async with served(bounds=Bounds(requests=3)) as run, await run.connect() as client:
        for number in range(5):
            await client.ask("hold", {"name": str(number)}, id=number)
        await settle()
        assert run.service.began == ["0", "1", "2"]
        with trio.move_on_after(10) as sending:
            await client.send(b" " * 10_000_000)
        assert sending.cancelled_caught, "the server does not read"
        assert await run.is_well(), "others are served"
        run.service.hold.set()
        assert sorted(answer["id"] for answer in await client.answers(5)) == [0, 1, 2, 3, 4]


async def test_connections_are_bounded(autojump_clock: Clock) -> None:
    """Beyond the bound clients wait to be accepted, and are served when another goes."""
    async with served(bounds=Bounds(connections=2)) as run:
        first, second = await run.connect(), await run.connect()
        assert (await first.call("note"))["result"] == 1
        async with second, await run.connect() as third:
            await third.ask("note", id=3)
            with trio.move_on_after(60) as waiting:
                await third.answer()
            assert waiting.cancelled_caught
            assert run.server.statistics().connections == 2
            await trio.aclose_forcefully(first.stream)
            assert (await third.answer())["id"] == 3


async def test_a_client_that_does_not_read(autojump_clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Answers that nobody reads are kept for a bounded time; then the connection is closed, and the calls go on."""
    async with served(bounds=Bounds(answer_seconds=7)) as run, await run.connect() as client:
        await client.ask("fill", {"length": 3_000_000})
        await client.ask("watch", {"name": "watch"}, id=2)
        await client.ask("sleep", {"name": "long", "seconds": 50}, id=3)
        await trio.sleep(6)
        assert not caplog.text
        assert run.service.cancelled == []
        await trio.sleep(2)
        assert "did not read its answers for 7 s" in caplog.text
        assert run.service.cancelled == ["watch"]
        await trio.sleep(50)
        assert run.service.ended == ["long"]
        assert run.server.statistics().connections == 0


async def test_a_client_that_reads_slowly_but_in_time(autojump_clock: Clock) -> None:
    """The bound counts for each answer by itself: many of them may take longer."""
    async with served(bounds=Bounds(answer_seconds=10)) as run, await run.connect() as client:
        for number in range(4):
            await client.ask("fill", {"length": 1_000_000}, id=number)
        for _ in range(4):
            await trio.sleep(8)
            assert len((await client.answer())["result"]) == 1_000_000


async def test_a_client_is_not_late_while_the_server_does_not_read(autojump_clock: Clock) -> None:
    """The time for a request counts only while the server reads."""
    async with served(bounds=Bounds(requests=1)) as run, await run.connect() as client:
        rest = json.dumps({"jsonrpc": "2.0", "method": "note", "id": 3})
        await client.ask("sleep", {"seconds": 100}, id=1)
        await client.ask("sleep", {"seconds": 100}, id=2)
        await client.send(rest[:20])
        await trio.sleep(120)
        await client.send(rest[20:])
        assert [answer["id"] for answer in await client.answers(3)] == [1, 2, 3]


@pytest.mark.parametrize("field", ["connections", "requests", "request_bytes", "nesting", "batch", "request_seconds"])
def test_bounds_are_checked(field: str) -> None:
    """A bound of nothing would serve nobody: it is refused."""
    with pytest.raises(ValueError, match=field):
        Bounds(**{field: 0})


# Clients that go ------------------------------------------------------------------------------------------------------


async def test_what_was_asked_for_is_carried_out(autojump_clock: Clock) -> None:
    """A call goes on when its client goes; one that says that it ends with its client is cancelled."""
    async with served() as run:
        async with await run.connect() as client:
            await client.ask("hold", {"name": "hold"}, id=1)
            await client.ask("watch", {"name": "watch"}, id=2)
            await settle()
        await settle()
        assert run.service.cancelled == ["watch"]
        run.service.hold.set()
        await settle()
        assert run.service.ended == ["hold"]
        assert run.server.statistics().connections == 0


async def test_a_client_that_only_stops_sending_is_still_there(autojump_clock: Clock) -> None:
    """End of file is not going away: every call goes on, and is answered."""
    async with served() as run, await run.connect() as client:
        await client.ask("hold", {"name": "hold"}, id=1)
        await client.ask("watch", {"name": "watch"}, id=2)
        await client.finish()
        await trio.sleep(100)
        assert run.service.cancelled == []
        run.service.hold.set()
        assert {answer["id"] for answer in await client.answers(2)} == {1, 2}
        assert await client.is_closed()


async def test_a_full_connection_notices_that_its_client_is_gone(autojump_clock: Clock) -> None:
    """Also while nothing is read, because too much is in progress, calls end with the client that should."""
    async with served(bounds=Bounds(requests=2)) as run:
        async with await run.connect() as client:
            for number in range(4):
                await client.ask("watch", {"name": str(number)}, id=number)
            await settle()
        await settle()
        assert sorted(run.service.cancelled) == ["0", "1"], "those that came after the client was gone never began"
        assert run.server.statistics().connections == 0


async def test_requests_of_a_client_that_is_gone(autojump_clock: Clock) -> None:
    """What a client sent before it went is carried out, though nobody reads the answers."""
    async with served() as run:
        async with await run.connect() as client:
            for number in range(50):
                await client.ask("note", {"name": str(number)}, id=number)
        await settle()
        assert run.service.began == [str(number) for number in range(50)]


# The end --------------------------------------------------------------------------------------------------------------


async def test_calls_get_a_bounded_time_at_the_end(autojump_clock: Clock) -> None:
    """At a stop nothing more is accepted or read; calls that end in time are answered, the others are cancelled and said so."""
    before = open_files()
    async with (
        served(bounds=Bounds(grace_seconds=5)) as run,
        await run.connect() as client,
        await run.connect() as idle,
    ):
        await client.ask("sleep", {"name": "short", "seconds": 3}, id="short")
        await client.ask("sleep", {"name": "long", "seconds": 50}, id="long")
        await settle()
        begin = trio.current_time()
        run.stop()
        with trio.CancelScope(shield=True):
            await settle()
            assert os.listdir(os.path.dirname(run.path)) == [], "the socket goes first"
            await client.ask("note", id="late")
            assert await idle.is_closed()
            assert trio.current_time() == begin
            assert await client.answer() == {"jsonrpc": "2.0", "id": "short", "result": "short"}
            assert trio.current_time() == begin + 3
            answer = await client.answer()
            assert (answer["id"], answer["error"]["code"]) == ("long", -errno.ECANCELED)
            assert trio.current_time() == begin + 5
            assert await client.is_closed()
    assert (run.service.ended, run.service.cancelled) == (["short"], ["long"])
    assert open_files() == before


async def test_a_batch_at_the_end(autojump_clock: Clock) -> None:
    """The calls of a batch that have not begun when the time is over never do, and are answered so."""
    async with served(bounds=Bounds(grace_seconds=5)) as run, await run.connect() as client:
        sleep = {"method": "sleep", "params": {"seconds": 50}, "id": 1}
        await client.send(json.dumps([sleep, {"method": "note", "id": 2}]))
        await settle()
        run.stop()
        with trio.CancelScope(shield=True):
            assert [one["error"]["code"] for one in await client.answer()] == [-errno.ECANCELED] * 2
    assert run.service.began == ["?"]


async def test_what_cannot_be_cancelled_is_waited_for(autojump_clock: Clock) -> None:
    """A method that shields what it does has its own bound; the server's end waits for it."""
    async with served(bounds=Bounds(grace_seconds=1)) as run, await run.connect() as client:
        await client.ask("finish_anyway", {"seconds": 30})
        await settle()
        run.stop()
    assert run.service.ended == ["?"]


async def test_a_client_that_does_not_read_at_the_end(autojump_clock: Clock) -> None:
    """Nobody's unread answers hold up the end for longer than the grace time and a second."""
    async with served(bounds=Bounds(grace_seconds=2, answer_seconds=1000)) as run, await run.connect() as client:
        await client.ask("fill", {"length": 3_000_000})
        await settle()
        begin = trio.current_time()
        run.stop()
    assert trio.current_time() - begin <= 3


async def test_a_stop_in_the_very_moment_of_a_request(autojump_clock: Clock) -> None:
    """A call that has begun is not cut off by a stop in the same pass of the scheduler."""
    for delay in range(12):
        async with served() as run, await run.connect() as client:
            await client.ask("sleep", {"name": "short", "seconds": 1})
            for _ in range(delay):
                await trio.lowlevel.checkpoint()
            run.stop()
        assert run.service.cancelled == []
        assert run.service.began == run.service.ended


# What must not end the server -----------------------------------------------------------------------------------------


async def test_no_more_descriptors(autojump_clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """When a connection cannot be accepted for want of descriptors or memory, the server waits and goes on."""
    failures = [errno.EMFILE, errno.ENOBUFS, errno.ECONNABORTED]
    made = trio.socket.from_stdlib_socket

    def failing(sock: socket.socket) -> Any:
        listener = made(sock)
        accept = listener.accept

        async def fail_first() -> Any:
            if failures:
                await trio.lowlevel.checkpoint()
                raise OSError(failures.pop(0), "cannot")
            return await accept()

        listener.accept = fail_first  # type: ignore[method-assign]
        return listener

    with mock.patch.object(trio.socket, "from_stdlib_socket", failing):
        async with served() as run:
            assert await run.is_well()
    assert not failures
    assert caplog.text.count("cannot accept a connection") == 2


async def test_no_descriptor_for_a_connection(autojump_clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A connection that cannot have what it needs is closed with a line in the log; the others go on."""
    async with served() as run, await run.connect() as before:
        await before.call("note")
        with mock.patch("select.epoll", side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE))):
            async with await run.connect() as client:
                assert await client.is_closed()
        assert (await before.call("note"))["result"] == 2
        assert await run.is_well()
    assert [record.getMessage() for record in caplog.records] == [
        f"{run.path}: a connection failed: EMFILE (Too many open files)"
    ]


async def test_a_bug_in_a_connection(autojump_clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A bug of ours in one connection closes that one, and is logged."""
    with mock.patch.object(Connection, "_read_requests", side_effect=ZeroDivisionError):
        async with served() as run, await run.connect() as client:
            assert await client.is_closed()
    assert "which is a bug" in caplog.text
    assert "ZeroDivisionError" in caplog.text


async def test_an_error_says_nothing_of_the_inside(autojump_clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A client is told that there was an internal error and its kind; the traceback and the text are for the log."""
    async with served() as run, await run.connect() as client:
        answer = await client.call("fail_for_good")
        assert answer["error"]["message"] == "internal error: ZeroDivisionError; the server's log says more"
    assert "secret" in caplog.text
    assert "fake_table.py" in caplog.text


async def test_statistics(autojump_clock: Clock) -> None:
    """Requests are counted, those of a batch each; and errors; and connections now."""
    async with served() as run, await run.connect() as client:
        await client.call("note")
        await client.call("nope")
        await client.send('[{"method": "note", "id": 1}, 1]')
        await client.answer()
        async with await run.connect() as other:
            await other.send("garbage")
            await other.answer()
            assert await other.is_closed()
        statistics = run.server.statistics()
        assert (statistics.connections, statistics.requests, statistics.errors) == (1, 4, 3)


async def test_debug_log(autojump_clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """With debugging on, each call is logged with who made it."""
    caplog.set_level(logging.DEBUG)
    async with served() as run:
        assert await run.is_well()
    assert f"pid {os.getpid()}, uid {os.getuid()}" in caplog.text


# Start-up -------------------------------------------------------------------------------------------------------------


async def test_start_up(autojump_clock: Clock) -> None:
    """Before the start-up is over only some methods can be called; those that wait for it are answered then."""

    async def names(run: Served, **params: bool) -> set[str]:
        async with await run.connect() as client:
            return set((await client.call("rpc_get_methods", params))["result"])

    async with served(state=State.STARTUP) as run, await run.connect() as client, await run.connect() as waiting:
        await waiting.ask("framework_wait_init")
        assert (await client.call("note")).get("error") == {
            "code": -1,
            "message": "note can only be called after the server has started up",
        }
        early = await names(run, current=True)
        assert {"framework_start_init", "echo"} <= early
        assert "note" not in early
        assert "note" in await names(run)
        assert (await client.call("framework_start_init"))["result"] is True
        assert (await waiting.answer())["result"] is True
        assert (await client.call("note"))["result"] == 1
        late = await names(run, current=True)
        assert "note" in late
        assert "framework_start_init" not in late
        assert "construct_echo" not in late
        assert "construct_echo" in await names(run, include_aliases=True)
        assert (await client.call("framework_start_init"))["error"]["code"] == -1


async def test_waiting_for_the_start_up_ends_with_the_client(autojump_clock: Clock) -> None:
    """Whoever waits for a start-up that never comes leaves nothing behind."""
    async with served(state=State.STARTUP) as run:
        async with await run.connect() as client:
            await client.ask("framework_wait_init")
            await settle()
            assert run.server.statistics().connections == 1
        await settle()
        assert run.server.statistics().connections == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGKILL", "SIGUSR1"])
async def test_kill(name: str, autojump_clock: Clock) -> None:
    """Each signal that SPDK takes is handed to the process, by its name or by its number as a string."""
    async with served() as run, await run.connect() as client:
        assert (await client.call("spdk_kill_instance", {"sig_name": name}))["result"] is True
        (number,) = run.signals
        assert number.name == name
        assert (await client.call("spdk_kill_instance", {"sig_name": str(int(number))}))["result"] is True
        assert run.signals == [number, number]


async def test_version(autojump_clock: Clock) -> None:
    """The version has SPDK's form."""
    async with served() as run, await run.connect() as client:
        result = (await client.call("spdk_get_version"))["result"]
        assert set(result) == {"version", "fields"}
        assert {name: type(value) for name, value in result["fields"].items()} == {
            "major": int, "minor": int, "patch": int, "suffix": str,
        }  # fmt: skip
