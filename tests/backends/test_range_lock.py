"""`RangeLock`: alone on a range, in the order of asking."""

from __future__ import annotations

import trio
import trio.testing

from ublk_trio.backends.range_lock import RangeLock


async def hold(lock: RangeLock, name: str, start: int, end: int, log: list[str], seconds: float = 1) -> None:
    async with lock.hold(start, end):
        log.append(f"+{name}")
        await trio.sleep(seconds)
        log.append(f"-{name}")


async def test_order(autojump_clock: trio.testing.MockClock) -> None:
    """Who overlaps an earlier claim waits for it, also for one that waits itself; all others go on."""
    lock, log = RangeLock(), list[str]()
    async with trio.open_nursery() as nursery:
        for name, start, end in (("a", 0, 4), ("b", 2, 8), ("c", 6, 10), ("d", 4, 5), ("e", 10, 12), ("f", 0, 2)):
            nursery.start_soon(hold, lock, name, start, end, log)
            await trio.testing.wait_all_tasks_blocked()
    # d waits for b, c for b, f for a; e meets nobody.
    assert log[:2] == ["+a", "+e"]
    assert log.index("-a") < log.index("+b") < log.index("-b") < min(log.index("+c"), log.index("+d"))
    assert log.index("-a") < log.index("+f") < log.index("-b"), "b, which does not touch it, does not keep f waiting"


async def test_cancelled_claims(autojump_clock: trio.testing.MockClock) -> None:
    """A claim that is cancelled, waiting or held, is gone; who waited for it still waits for the others."""
    lock, log = RangeLock(), list[str]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, lock, "a", 0, 4, log, 3)
        await trio.testing.wait_all_tasks_blocked()
        waiting = trio.CancelScope()

        async def wait() -> None:
            with waiting:
                await hold(lock, "b", 0, 8, log)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(hold, lock, "c", 2, 8, log)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(hold, lock, "d", 6, 8, log)
        await trio.testing.wait_all_tasks_blocked()
        assert log == ["+a"]
        waiting.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert log == ["+a"], "d waits for c, and c for a"
        with trio.move_on_after(0):
            await hold(lock, "e", 20, 21, log)
    assert log == ["+a", "+e", "-a", "+c", "-c", "+d", "-d"]
    async with lock.hold(0, 100):
        pass
